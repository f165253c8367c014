#include "export/vhost_user_kicks.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>

#include <cerrno>
#include <system_error>

#include "io/thread_setup.h"

namespace pqblk::exports {

Result<std::unique_ptr<KickThread>> KickThread::start(image::Disk& disk) {
  UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll) return Error::from_errno(errno, "create epoll");
  UniqueFd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake) return Error::from_errno(errno, "eventfd");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = 0;
  if (::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, wake.get(), &event) != 0) {
    return Error::from_errno(errno, "watch eventfd");
  }
  std::unique_ptr<KickThread> self(new KickThread(disk, std::move(epoll), std::move(wake)));
  try {
    self->thread_ = std::thread([raw = self.get()] { raw->run(); });
  } catch (const std::system_error& error) {
    return Error::from_errno(error.code().value(), "start kick thread");
  }
  return self;
}

KickThread::~KickThread() {
  if (!thread_.joinable()) return;
  stopping_.store(true, std::memory_order_release);
  wake();
  thread_.join();
}

void KickThread::wake() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t r = ::write(wake_.get(), &one, sizeof one);
}

Result<std::uint64_t> KickThread::add(int fd, std::uint32_t queue) {
  std::lock_guard guard(inner_);
  const std::uint64_t token = next_token_++;
  if (fd >= 0) {
    // By edges: every write to an eventfd is one, read or not.
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    event.data.u64 = token;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      return Error::from_errno(errno, "watch kick descriptor");
    }
  } else if (polled_++ == 0) {
    wake();  // the thread learns of its new pace
  }
  watches_[token] = {fd, queue};
  return token;
}

void KickThread::remove(std::uint64_t token) {
  std::lock_guard guard(inner_);
  const auto at = watches_.find(token);
  if (at == watches_.end()) return;
  if (at->second.fd >= 0) {
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, at->second.fd, nullptr);
  } else {
    --polled_;
  }
  watches_.erase(at);
}

int KickThread::timeout_ms() {
  std::lock_guard guard(inner_);
  return polled_ != 0 ? kPollEveryMs : -1;
}

void KickThread::kicked(std::uint64_t token) {
  std::lock_guard guard(inner_);
  const auto at = watches_.find(token);
  if (at == watches_.end()) return;
  // Emptied for whoever serves the ring after us; a descriptor that would make us wait is left
  // alone.
  std::uint64_t count = 0;
  const iovec v{&count, sizeof count};
  [[maybe_unused]] const ssize_t r = ::preadv2(at->second.fd, &v, 1, -1, RWF_NOWAIT);
  disk_.ring(at->second.queue).wake();
}

void KickThread::poll_all() {
  std::lock_guard guard(inner_);
  for (const auto& [token, watch] : watches_) {
    if (watch.fd < 0) disk_.ring(watch.queue).wake();
  }
}

void KickThread::run() {
  io::set_up_thread("pqblk-kick");
  constexpr int kEventsAtOnce = 64;
  epoll_event events[kEventsAtOnce];
  while (!stopping_.load(std::memory_order_acquire)) {
    const int count = ::epoll_wait(epoll_.get(), events, kEventsAtOnce, timeout_ms());
    for (int i = 0; i < count; ++i) {
      if (events[i].data.u64 != 0) {
        kicked(events[i].data.u64);
        continue;
      }
      std::uint64_t woken = 0;
      [[maybe_unused]] const ssize_t r = ::read(wake_.get(), &woken, sizeof woken);
    }
    poll_all();
  }
}

}  // namespace pqblk::exports
