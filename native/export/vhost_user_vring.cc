#include "export/vhost_user_vring.h"

#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <utility>

#include "io/queue_thread.h"

namespace pqblk::exports {
namespace {

constexpr std::uint64_t kEndListeningNs = 50'000;

}  // namespace

Vring::~Vring() { assert(ring_ == nullptr); }

template <class F>
void Vring::on_queue(F f) {
  io::run_sync(disk_.ring(queue_), [&]() -> Task<bool> {
    f();
    co_return true;
  });
}

// ---- the session's thread ----

Error Vring::start(const GuestMemory& memory, const RingSetup& setup, std::shared_ptr<DirtyLog> log,
                   int kick, std::function<void(const char*)> broken) {
  assert(ring_ == nullptr);
  auto opened = Virtqueue::open(memory, setup);
  if (!opened) return opened.take_error();
  (*opened)->set_log(std::move(log));
  while (requests_.size() < setup.size) {
    auto blk = std::make_unique<BlkRequest>();
    blk->context = this;
    blk->done = [](BlkRequest& done, std::uint32_t written) {
      static_cast<Vring*>(done.context)->completed(done, written);
    };
    requests_.push_back(std::move(blk));
  }
  free_ = nullptr;
  for (std::uint32_t i = 0; i < setup.size; ++i) {
    requests_[i]->next = std::exchange(free_, requests_[i].get());
  }
  on_queue([&] {
    ring_ = std::move(*opened);
    counters_.running.store(true, std::memory_order_relaxed);
    broken_ = std::move(broken);
    kick_ = kick;
    stopping_ = silent_ = failed_ = asked_ = false;
    watch_ = Watch();
    busy_ns_ = disk_.ring(queue_).now_ns();
    ring_->decline_kicks();
    poller_ = {[](image::Poller& p) { return static_cast<Vring*>(p.context)->turn(); }, this,
               nullptr};
    flush_later_.run = [](image::Deferred& d) { static_cast<Vring*>(d.context)->flush(); };
    flush_later_.context = this;
    disk_.add_poller(queue_, poller_);
    listening_ = true;
    spawn(listen());
    // Whatever an earlier life gave back without telling is seen now.
    if (ring_->tracked()) tell(call_.get());
  });
  return {};
}

std::uint32_t Vring::stop(bool orderly) {
  assert(ring_ != nullptr);
  std::uint32_t base = 0;
  const image::Disk::Hurry hurry(disk_);  // the front-end waits
  io::run_sync(disk_.ring(queue_), [&]() -> Task<bool> {
    co_await drain(orderly);
    base = ring_->base();
    ring_.reset();
    counters_.running.store(false, std::memory_order_relaxed);
    broken_ = nullptr;
    co_return true;
  });
  return base;
}

Task<bool> Vring::drain(bool orderly) {
  struct Drained : ReadyNode {
    Vring& vring;
    explicit Drained(Vring& v) : vring(v) {}
    bool await_ready() const { return vring.in_flight_ == 0; }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      vring.drained_ = this;
    }
    void await_resume() const {}
  };
  stopping_ = true;
  // Without the region, a front-end that comes back begins behind what it has seen as used: giving
  // back more now would give it back twice.
  silent_ = !orderly && !ring_->tracked();
  disk_.remove_poller(queue_, poller_);
  co_await Drained(*this);
  for (; listening_; co_await disk_.ring(queue_).sleep(kEndListeningNs)) {
    if (kick_ >= 0) tell(kick_);  // again, should somebody else have read it
  }
  flush();
  while (flush_later_.pending) co_await yield();
  // Kicks are welcome again, whoever serves the ring next.
  if (!failed_ && orderly) static_cast<void>(ring_->ask_for_kicks());
  co_return true;
}

void Vring::set_call(UniqueFd fd) {
  if (!running()) {
    call_ = std::move(fd);
    return;
  }
  on_queue([&] {
    call_ = std::move(fd);
    // The old one may have swallowed an answer that nobody waits for any more.
    tell(call_.get());
  });
}

void Vring::set_error(UniqueFd fd) {
  if (!running()) {
    error_ = std::move(fd);
    return;
  }
  on_queue([&] { error_ = std::move(fd); });
}

void Vring::set_log(std::shared_ptr<DirtyLog> log,
                    std::optional<std::uint64_t> device_log_address) {
  on_queue([&] {
    ring_->set_log(std::move(log));
    ring_->set_device_log_address(device_log_address);
  });
}

// ---- the queue's thread ----

// Ends the thread's sleep when the driver kicks; the turn that follows finds what there is.
Task<void> Vring::listen() {
  io::Queue& ring = disk_.ring(queue_);
  bool by_time = kick_ < 0;
  while (!stopping_) {
    if (by_time) {
      co_await ring.sleep(kLookEveryNs);
    } else if (Error e = co_await ring.poll(kick_, POLLIN)) {
      by_time = true;
    } else {
      take_kicks();
    }
  }
  listening_ = false;
}

// The descriptor is shared with the front-end, which may read it too: this must not wait for it.
void Vring::take_kicks() const {
  std::uint64_t count = 0;
  const iovec v{&count, sizeof count};
  if (::preadv2(kick_, &v, 1, -1, RWF_NOWAIT) >= 0 || errno == EAGAIN) return;
  [[maybe_unused]] const ssize_t r = ::read(kick_, &count, sizeof count);  // an older kernel
}

bool Vring::turn() {
  if (failed_) return false;
  const std::uint32_t taken = take_some();
  if (failed_) return false;
  if (taken == 0 && asked_) return false;
  const std::uint64_t now = disk_.ring(queue_).now_ns();
  if (taken == 0) return now - busy_ns_ < watch_.limit_ns() || go_idle(now);
  asked_ ? woke(now) : watch_.found(now - busy_ns_);
  busy_ns_ = now;
  return true;
}

std::uint32_t Vring::take_some() {
  std::uint32_t taken = 0;
  while (taken < kTakeAtOnce && !failed_) {
    const std::uint32_t more = take_ahead();
    taken += more;
    if (more < kTakeAhead) break;
  }
  return taken;
}

// Takes a few before it starts the first: what the driver wrote into their headers has time to come
// from its processor's cache.
std::uint32_t Vring::take_ahead() {
  std::array<BlkRequest*, kTakeAhead> ahead;
  std::uint32_t taken = 0;
  // More than the ring holds can be in flight only when the driver breaks the rules; it then waits.
  while (taken < ahead.size() && free_ != nullptr) {
    BlkRequest& blk = *free_;
    const Take result = ring_->take(blk.chain);
    if (result == Take::none) break;
    if (result == Take::broken) {
      fail();
      break;
    }
    free_ = blk.next;
    ++in_flight_;
    if (!blk.chain.iov.empty()) __builtin_prefetch(blk.chain.iov.front().iov_base);
    __builtin_prefetch(blk.chain.last_writable, 1);
    ahead[taken++] = &blk;
  }
  for (std::uint32_t i = 0; i < taken; ++i) device_.start(queue_, *ahead[i]);
  return taken;
}

// True: there is something to do after all.
bool Vring::go_idle(std::uint64_t now) {
  if (ring_->ask_for_kicks()) {
    ring_->decline_kicks();
    busy_ns_ = now;
    return true;
  }
  asked_ = true;
  asked_ns_ = now;
  return false;
}

void Vring::woke(std::uint64_t now) {
  ring_->decline_kicks();
  asked_ = false;
  watch_.slept(now - asked_ns_);
}

void Vring::completed(BlkRequest& blk, std::uint32_t written) {
  counters_.requests.add(1);
  if (blk.answer != image::Status::ok) counters_.errors.add(1);
  if (ring_->log() != nullptr) log_data(blk.chain);
  ring_->put(blk.chain, written);
  blk.next = std::exchange(free_, &blk);
  --in_flight_;
  if (++unpublished_ >= kPublishAtOnce && !silent_) {
    unpublished_ = 0;
    ring_->publish();
  }
  if (!flush_later_.pending) disk_.defer(queue_, flush_later_);
  if (in_flight_ == 0 && drained_ != nullptr) {
    disk_.ring(queue_).post(*std::exchange(drained_, nullptr));
  }
}

void Vring::flush() {
  if (silent_) return;
  unpublished_ = 0;
  ring_->publish();
  if (ring_->wants_call()) tell(call_.get());
  if (ring_->trouble() != nullptr && !failed_) fail();
  // Whoever is answered asks for more soon.
  if (!asked_ && !stopping_) busy_ns_ = disk_.ring(queue_).now_ns();
}

void Vring::tell(int fd) const {
  if (fd < 0) return;
  // A full counter: the other side has not looked since, and will. The descriptor is the
  // front-end's too, which may make it block again.
  pollfd room{fd, POLLOUT, 0};
  if (::poll(&room, 1, 0) != 1 || (room.revents & POLLOUT) == 0) return;
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t r = ::write(fd, &one, sizeof one);
}

void Vring::log_data(const Chain& chain) const {
  const GuestMemory& memory = ring_->memory();
  for (std::size_t i = chain.readable; i < chain.iov.size(); ++i) {
    ring_->log()->mark(memory.guest_of(chain.iov[i].iov_base), chain.iov[i].iov_len);
  }
  if (chain.last_writable != nullptr) ring_->log()->mark(memory.guest_of(chain.last_writable), 1);
}

void Vring::fail() {
  failed_ = true;
  tell(error_.get());
  if (broken_) broken_(ring_->trouble());
}

}  // namespace pqblk::exports
