// Requests in batches, completions by polling or an eventfd.
//
// Room cabi/. Two threads meet here: the queue's user, and the engine queue's thread, which pushes
// completions onto a lock-free stack and, once for each of its turns, writes the eventfd. The user
// takes the whole stack, turns it round, and hands it out.
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <limits>
#include <thread>
#include <utility>
#include <vector>

#include "cabi/convert.h"

namespace pqblk::cabi {
namespace {

constexpr std::uint32_t kDepthMax = 65536;
constexpr std::uint32_t kIovMax = 1024;

struct Slot : image::Request {
  std::uint64_t cookie = 0;
  pqblk_error* why = nullptr;
  Slot* next_slot = nullptr;  // in whichever list it is
  std::array<iovec, 4> few{};
  std::vector<iovec> many;
};

}  // namespace

class Queue : public std::enable_shared_from_this<Queue> {
 public:
  static Result<std::shared_ptr<Queue>> open(const pqblk_disk& disk, std::uint32_t index,
                                             std::uint32_t depth);
  Queue(std::shared_ptr<image::Disk> disk, std::uint32_t index, std::uint32_t depth, int event_fd);
  ~Queue() { ::close(event_fd_); }
  Queue(const Queue&) = delete;

  int submit(const pqblk_request* requests, std::uint32_t count);
  int poll(pqblk_completion* out, std::uint32_t max);
  int event_fd() const { return event_fd_; }
  void drain();

 private:
  // The user's thread.
  void take_done();
  std::uint32_t hand_out(pqblk_completion* out, std::size_t stride, std::uint32_t max);
  Slot& take_slot();
  Error prepare(const pqblk_request* request, std::size_t stride, Slot& slot);
  Error set_memory(const pqblk_request& from, Slot& slot);
  void add_taken(Slot& slot);
  // Any thread.
  void completed(Slot& slot);
  void signal();
  bool on_engine_thread() const { return Executor::current() == &disk_->ring(index_); }

  const std::shared_ptr<image::Disk> disk_;
  const std::uint32_t index_;
  const int event_fd_;
  std::vector<Slot> slots_;

  // The user's thread only.
  Slot* free_ = nullptr;
  Slot* taken_ = nullptr;  // oldest first
  Slot** taken_end_ = &taken_;
  std::uint32_t in_use_ = 0;          // submitted and not fetched
  std::uint64_t to_engine_ = 0;       // requests handed to the disk
  std::uint64_t completed_here_ = 0;  // of these: refused on the user's own thread

  // The engine's thread.
  image::Deferred announcement_;
  std::shared_ptr<Queue> keep_;  // while an announcement is due

  alignas(64) std::atomic<Slot*> done_{nullptr};   // newest first
  std::atomic<std::uint64_t> completed_there_{0};  // the last thing the engine touches of us
};

Queue::Queue(std::shared_ptr<image::Disk> disk, std::uint32_t index, std::uint32_t depth,
             int event_fd)
    : disk_(std::move(disk)), index_(index), event_fd_(event_fd), slots_(depth) {
  for (Slot& slot : slots_) {
    slot.context = this;
    slot.complete = [](image::Request& r) {
      static_cast<Queue*>(r.context)->completed(static_cast<Slot&>(r));
    };
    slot.next_slot = std::exchange(free_, &slot);
  }
  announcement_.context = this;
  announcement_.run = [](image::Deferred& work) {
    // Whoever fetches the last completion may free the queue before this is over.
    const std::shared_ptr<Queue> keep = std::move(static_cast<Queue*>(work.context)->keep_);
    keep->signal();
  };
}

Result<std::shared_ptr<Queue>> Queue::open(const pqblk_disk& disk, std::uint32_t index,
                                           std::uint32_t depth) {
  if (index >= disk.queues) {
    return Error(Kind::not_found, "the disk has " + std::to_string(disk.queues) + " queues");
  }
  if (depth == 0 || depth > kDepthMax) {
    return Error(Kind::invalid_argument,
                 "a queue holds 1 to " + std::to_string(kDepthMax) + " requests");
  }
  const int fd = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (fd < 0) return Error::from_errno(errno, "make an eventfd");
  return std::make_shared<Queue>(disk.disk, index, depth, fd);
}

// ---- submitting: the user's thread ----

Slot& Queue::take_slot() {
  Slot& slot = *free_;
  free_ = slot.next_slot;
  ++in_use_;
  return slot;
}

Error Queue::set_memory(const pqblk_request& from, Slot& slot) {
  if (from.iov_count > kIovMax || (from.iov == nullptr && from.iov_count != 0)) {
    return misuse("a request has up to 1024 pieces of memory");
  }
  iovec* own = slot.few.data();
  if (from.iov_count > slot.few.size()) {
    try {
      slot.many.resize(from.iov_count);
    } catch (const std::bad_alloc&) {
      return Error(Kind::no_memory, {});
    }
    own = slot.many.data();
  }
  std::uint64_t sum = 0;
  for (std::uint32_t i = 0; i < from.iov_count; ++i) {
    own[i] = from.iov[i];
    if (own[i].iov_len > std::numeric_limits<std::uint64_t>::max() - sum) {
      return misuse("the pieces of memory are larger than any disk");
    }
    sum += own[i].iov_len;
  }
  slot.iov = own;
  slot.iov_count = from.iov_count;
  if (slot.length == 0) slot.length = sum;
  return {};
}

// The slot knows its cookie afterwards, whatever is wrong with the request.
Error Queue::prepare(const pqblk_request* request, std::size_t stride, Slot& slot) {
  slot.cookie = request->cookie;
  slot.why = request->error;
  if (request->size != stride) return misuse("the requests of an array have one size");
  pqblk_request from;
  if (Error e = take(request, sizeof *request, from)) return e;
  if (Error e = fill_request(from.type, from.flags, from.offset, from.length, slot)) return e;
  if (from.type == PQBLK_READ || from.type == PQBLK_WRITE) return set_memory(from, slot);
  if (from.iov_count != 0) return misuse("only reads and writes have memory");
  return {};
}

void Queue::add_taken(Slot& slot) {
  slot.next_slot = nullptr;
  *taken_end_ = &slot;
  taken_end_ = &slot.next_slot;
}

int Queue::submit(const pqblk_request* requests, std::uint32_t count) {
  if (count == 0) return 0;
  if (requests == nullptr || requests->size < sizeof *requests) return -PQBLK_INVALID_ARGUMENT;
  const std::size_t stride = requests->size;
  image::Request* first = nullptr;
  image::Request** end = &first;
  std::uint32_t accepted = 0;
  for (; accepted < count && free_ != nullptr; ++accepted) {
    Slot& slot = take_slot();
    if (Error error = prepare(element(requests, stride, accepted), stride, slot)) {
      slot.status = image::Status::ioerr;
      slot.error = std::move(error);
      add_taken(slot);
    } else {
      ++to_engine_;
      *end = &slot;
      end = &slot.next;
    }
  }
  if (first != nullptr) disk_->submit(index_, first);
  if (taken_ != nullptr) signal();
  return static_cast<int>(accepted);
}

// ---- completing: the engine queue's thread; the user's, for requests to a closed disk ----

void Queue::completed(Slot& slot) {
  if (!on_engine_thread()) {
    ++completed_here_;
    return add_taken(slot);  // inside submit(), which signals
  }
  Slot* head = done_.load(std::memory_order_relaxed);
  do {
    slot.next_slot = head;
  } while (!done_.compare_exchange_weak(head, &slot, std::memory_order_release,
                                        std::memory_order_relaxed));
  // Not empty: an announcement is due already, or the user has seen one and is about to take all.
  if (head == nullptr && keep_ == nullptr) {
    keep_ = shared_from_this();
    disk_->defer(index_, announcement_);
  }
  completed_there_.fetch_add(1, std::memory_order_release);
}

void Queue::signal() {
  constexpr std::uint64_t kOne = 1;
  // It can only fail where the count is at its end, and then the descriptor is readable.
  [[maybe_unused]] const ssize_t r = ::write(event_fd_, &kOne, sizeof kOne);
}

// ---- fetching: the user's thread ----

void Queue::take_done() {
  Slot* newest = done_.exchange(nullptr, std::memory_order_acquire);
  Slot* const last = newest;
  Slot* oldest = nullptr;
  while (newest != nullptr) {
    Slot* const older = std::exchange(newest->next_slot, oldest);
    oldest = newest;
    newest = older;
  }
  if (last == nullptr) return;
  *taken_end_ = oldest;
  taken_end_ = &last->next_slot;
}

std::uint32_t Queue::hand_out(pqblk_completion* out, std::size_t stride, std::uint32_t max) {
  std::uint32_t count = 0;
  for (; count < max; ++count) {
    if (taken_ == nullptr) take_done();
    if (taken_ == nullptr) break;
    Slot& slot = *taken_;
    taken_ = slot.next_slot;
    if (taken_ == nullptr) taken_end_ = &taken_;
    const bool ok = slot.status == image::Status::ok;
    const int kind = report(slot.why, ok ? Error() : slot.error);
    if (!ok) slot.error = Error();
    put(element(out, stride, count), pqblk_completion{sizeof *out, kind, slot.cookie}, stride);
    slot.next_slot = std::exchange(free_, &slot);
    --in_use_;
  }
  return count;
}

int Queue::poll(pqblk_completion* out, std::uint32_t max) {
  if (max == 0) return 0;
  if (out == nullptr || out->size < sizeof *out) return -PQBLK_INVALID_ARGUMENT;
  const std::size_t stride = out->size;
  max = std::min(max, kDepthMax);
  std::uint32_t count = hand_out(out, stride, max);
  if (count == max) return static_cast<int>(count);
  // Nothing is left: reset the descriptor, then look again. Whoever pushes after this look finds
  // the stack empty and writes the descriptor.
  std::uint64_t ignored = 0;
  [[maybe_unused]] const ssize_t r = ::read(event_fd_, &ignored, sizeof ignored);
  count += hand_out(element(out, stride, count), stride, max - count);
  if (taken_ != nullptr) signal();
  return static_cast<int>(count);
}

void Queue::drain() {
  std::array<pqblk_completion, 64> dropped{};
  dropped[0].size = sizeof(pqblk_completion);
  for (Slot& slot : slots_) slot.why = nullptr;
  while (in_use_ > 0) {
    if (poll(dropped.data(), dropped.size()) > 0) continue;
    pollfd wait{event_fd_, POLLIN, 0};
    ::poll(&wait, 1, -1);
  }
  // All were fetched; the engine's thread may still be on its last step in completed().
  while (completed_there_.load(std::memory_order_acquire) != to_engine_ - completed_here_) {
    std::this_thread::yield();
  }
}

}  // namespace pqblk::cabi

struct pqblk_queue {
  std::shared_ptr<pqblk::cabi::Queue> queue;
};

using namespace pqblk;        // NOLINT: the C functions live outside it
using namespace pqblk::cabi;  // NOLINT

int pqblk_queue_new(pqblk_disk* disk, uint32_t index, uint32_t depth, pqblk_queue** queue,
                    pqblk_error* error) {
  return guarded(error, [&]() -> Error {
    if (queue == nullptr) return misuse("nowhere to put the queue");
    *queue = nullptr;
    auto made = Queue::open(*disk, index, depth);
    if (!made) return made.take_error();
    *queue = new pqblk_queue{std::move(*made)};
    return {};
  });
}

void pqblk_queue_free(pqblk_queue* queue) {
  const std::unique_ptr<pqblk_queue> gone(queue);
  if (queue != nullptr) queue->queue->drain();
}

int pqblk_submit(pqblk_queue* queue, const pqblk_request* requests, uint32_t count) {
  return queue->queue->submit(requests, count);
}

int pqblk_poll(pqblk_queue* queue, pqblk_completion* completions, uint32_t max) {
  return queue->queue->poll(completions, max);
}

int pqblk_queue_fd(pqblk_queue* queue) { return queue->queue->event_fd(); }
