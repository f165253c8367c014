// The run loop shared by the engines; see loop.h.

#include "io/loop.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <semaphore>
#include <string>

namespace pqblk::io {

namespace {
constexpr std::uint64_t kNsPerUs = 1000;
constexpr std::uint64_t kSpinSteps = 8;  // the adaptive spin grows by this fraction of its maximum
}  // namespace

Loop::Loop(const QueueOptions& options)
    : depth_(options.depth), spin_max_ns_(options.spin_us * kNsPerUs), spin_ns_(spin_max_ns_) {
  assert(depth_ > 0);
}

Loop::~Loop() {
  assert(!running_);
  while (!own_files_.empty()) close_own(own_files_.back().id);
  if (event_fd_ >= 0) ::close(event_fd_);
}

Error Loop::open_event() {
  event_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (event_fd_ < 0) return Error::from_errno(errno, "eventfd");
  return {};
}

std::uint64_t Loop::now_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000'000U +
         static_cast<std::uint64_t>(t.tv_nsec);
}

// ---- from any thread ----

void Loop::post(ReadyNode& node) {
  if (Executor::current() == this) {
    ready_.push(node);
  } else if (inbox_.push(node)) {
    // Whoever pushed onto a full inbox relies on the first pusher, who is on its way to this line.
    wake();
  }
}

void Loop::wake() {
  if (state_.exchange(kNotified, std::memory_order_acq_rel) != kSleeping) return;
  const std::uint64_t one = 1;
  // Fails only when the counter is full, and then the sleeper is awake anyway.
  [[maybe_unused]] const ssize_t r = ::write(event_fd_, &one, sizeof one);
}

void Loop::stop() {
  stopping_.store(true, std::memory_order_release);
  wake();
}

// Work on the engine itself must happen on its thread, or before or after run().
template <class F>
void Loop::on_own_thread(F&& work) {
  if (Executor::current() == this) return work();
  std::binary_semaphore done(0);
  {
    std::lock_guard guard(control_);
    if (!running_) return work();
    // Posted under the lock: run() looks once more before it ends.
    spawn([](Loop& loop, F& f, std::binary_semaphore& signal) -> Task<void> {
      co_await resume_on(loop);
      f();
      signal.release();
    }(*this, work, done));
  }
  done.acquire();
}

QueueFacts Loop::facts() {
  QueueFacts copy;
  on_own_thread([&] { copy = facts_; });
  return copy;
}

void Loop::register_buffers(std::span<const iovec> buffers) {
  on_own_thread([&] { on_register_buffers(buffers); });
}

void Loop::register_file(const File& file) {
  on_own_thread([&] {
    open_own(file);
    on_register_file(file);
  });
}

void Loop::unregister_file(const File& file) {
  on_own_thread([&] {
    close_own(file.id);
    on_unregister_file(file);
  });
}

// ---- on the queue's thread ----

void Loop::submit(Op& op) {
  begin(op);
  ++facts_.operations;
  if (op.type == OpType::poll) {
    ++polling_;
    return start(op);
  }
  if (in_flight_ == depth_) {
    waiting_.push(op);
    return;
  }
  ++in_flight_;
  launch(op);
}

void Loop::finished(Op& op) {
  worked_ = true;
  if (op.type == OpType::poll) {
    --polling_;
  } else if (Op* next = waiting_.pop()) {
    launch(*next);
  } else {
    --in_flight_;
  }
  complete(op);
}

void Loop::post_after(ReadyNode& node, std::uint64_t ns) {
  const std::uint64_t now = now_ns();
  const std::uint64_t due = ns < kForever - now ? now + ns : kForever;
  timers_.push_back({due, timer_order_++, &node});
  std::push_heap(timers_.begin(), timers_.end());
}

void Loop::cut_short(ReadyNode& node) {
  const auto timer = std::find_if(timers_.begin(), timers_.end(),
                                  [&](const Timer& each) { return each.node == &node; });
  if (timer == timers_.end()) return;
  timers_.erase(timer);
  std::make_heap(timers_.begin(), timers_.end());
  ready_.push(node);
}

void Loop::fire_timers() {
  if (timers_.empty()) return;
  const std::uint64_t now = now_ns();
  while (!timers_.empty() && timers_.front().due_ns <= now) {
    std::pop_heap(timers_.begin(), timers_.end());
    ready_.push(*timers_.back().node);
    timers_.pop_back();
  }
}

std::uint64_t Loop::time_to_timer() {
  if (timers_.empty()) return kForever;
  const std::uint64_t now = now_ns();
  const std::uint64_t due = timers_.front().due_ns;
  return due > now ? due - now : 0;
}

// Runs what is ready now; what that makes ready waits for the next turn, so that completions and
// hooks get their chance between.
bool Loop::run_ready() {
  inbox_.drain_to(ready_);
  NodeList<ReadyNode> batch = ready_.take();
  const bool any = !batch.empty();
  while (ReadyNode* node = batch.pop()) node->handle.resume();
  return any;
}

bool Loop::run_direct() {
  NodeList<Op> batch = direct_.take();
  const bool any = !batch.empty();
  while (Op* op = batch.pop()) settle(*op, perform(*op, own_fd(*op->file)));
  return any;
}

// A file in memory is opened once more for the calls of this thread: the kernel counts who uses an
// open file at the moment, and threads that share one pass that count from processor to processor
// with every call. Nor is the time of access worth a look at the clock. Where that is refused the
// shared one does as well. Locks stay with the file that was opened first.
void Loop::open_own(const File& file) {
  if (!file.in_memory || file.id == 0 || file.fd < 0 || own_fd(file) != file.fd) return;
  const int flags = ::fcntl(file.fd, F_GETFL);
  if (flags < 0) return;
  const std::string path = "/proc/self/fd/" + std::to_string(file.fd);
  const int wanted = (flags & (O_ACCMODE | O_DIRECT | O_SYNC)) | O_CLOEXEC;
  int fd = ::open(path.c_str(), wanted | O_NOATIME);
  if (fd < 0) fd = ::open(path.c_str(), wanted);
  if (fd >= 0) own_files_.push_back({file.id, fd});
}

void Loop::close_own(std::uint64_t id) {
  const auto at = std::find_if(own_files_.begin(), own_files_.end(),
                               [id](const OwnFile& own) { return own.id == id; });
  if (at == own_files_.end()) return;
  ::close(at->fd);
  own_files_.erase(at);
}

int Loop::own_fd(const File& file) const {
  for (const OwnFile& own : own_files_) {
    if (own.id == file.id) return own.fd;
  }
  return file.fd;
}

void Loop::run() {
  Executor* const outer = std::exchange(Executor::current(), this);
  {
    std::lock_guard guard(control_);
    assert(!running_);
    attach();
    running_ = true;
  }
  while (turn()) {
  }
  Executor::current() = outer;
}

bool Loop::turn() {
  // Acquire: what was published before wake() is visible to the hook and the inbox below.
  if (state_.load(std::memory_order_relaxed) == kNotified) {
    state_.exchange(kRunning, std::memory_order_acq_rel);
  }
  fire_timers();
  if (run_ready()) worked_ = true;
  const bool hook_worked = poll_hook && poll_hook();
  if (before_wait) before_wait();
  if (stopping_.load(std::memory_order_acquire) && !hook_worked && try_finish()) return false;
  const bool called = run_direct();
  if (hook_worked || called || !ready_.empty() || !inbox_.empty()) {
    worked_ = false;
    spin_since_ns_ = 0;
    exchange(0);
  } else {
    exchange_or_sleep();
  }
  return true;
}

// Ends run() when nothing is left; a concurrent on_own_thread() either sees running_ false or its
// post is seen here.
bool Loop::try_finish() {
  if (in_flight_ > 0 || polling_ > 0 || !ready_.empty()) return false;
  std::lock_guard guard(control_);
  if (!inbox_.empty()) return false;
  detach();
  while (!own_files_.empty()) close_own(own_files_.back().id);
  running_ = false;
  return true;
}

void Loop::exchange_or_sleep() {
  const std::uint64_t wait_ns = time_to_timer();
  if (wait_ns == 0) return exchange(0);
  const std::uint64_t begin_ns = spin_max_ns_ > 0 ? now_ns() : 0;
  if (spin_max_ns_ > 0 && keep_spinning(begin_ns)) return exchange(0);

  int expected = kRunning;
  if (!state_.compare_exchange_strong(expected, kSleeping, std::memory_order_acq_rel)) {
    return exchange(0);
  }
  ++facts_.sleeps;
  exchange(wait_ns);
  state_.exchange(kRunning, std::memory_order_acq_rel);
  if (spin_max_ns_ > 0) adapt_spin(now_ns() - begin_ns);
}

bool Loop::keep_spinning(std::uint64_t now) {
  if (std::exchange(worked_, false) || spin_since_ns_ == 0) spin_since_ns_ = now;
  return now - spin_since_ns_ < spin_ns_;
}

// As a hypervisor adapts its halt polling: a sleep that a longer spin would have caught makes the
// spin longer, one beyond the maximum makes it shorter.
void Loop::adapt_spin(std::uint64_t slept_ns) {
  spin_since_ns_ = 0;
  if (slept_ns <= spin_max_ns_) {
    spin_ns_ = std::min(spin_max_ns_, spin_ns_ + spin_max_ns_ / kSpinSteps);
  } else {
    spin_ns_ /= 2;
  }
}

}  // namespace pqblk::io
