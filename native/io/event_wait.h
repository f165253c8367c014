// Sleeping on an eventfd, for the engines whose ring cannot do it.
//
// Room io/, private to it.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <cstdint>
#include <ctime>

#include "io/loop.h"

namespace pqblk::io {

// Sleeps until the eventfd is written or wait_ns have passed (kForever: no limit), and resets it.
inline void wait_event(int event_fd, std::uint64_t wait_ns) {
  constexpr std::uint64_t kNsPerSecond = 1'000'000'000;
  timespec limit{};
  if (wait_ns != kForever) {
    limit.tv_sec = static_cast<std::time_t>(wait_ns / kNsPerSecond);
    limit.tv_nsec = static_cast<long>(wait_ns % kNsPerSecond);
  }
  pollfd event{event_fd, POLLIN, 0};
  if (::ppoll(&event, 1, wait_ns == kForever ? nullptr : &limit, nullptr) <= 0) return;
  std::uint64_t count = 0;
  // EAGAIN cannot matter: the count is only a signal.
  [[maybe_unused]] const ssize_t r = ::read(event_fd, &count, sizeof count);
}

}  // namespace pqblk::io
