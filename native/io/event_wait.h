// Sleeping on an eventfd and on polls, for the engines whose ring cannot do it.
//
// Room io/, private to it.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <ctime>
#include <vector>

#include "io/loop.h"

namespace pqblk::io {

// The poll operations of one queue, and its sleep until one of them or the eventfd is ready.
class EventWait {
 public:
  void add(Op& op) { polls_.push_back(&op); }
  bool empty() const { return polls_.empty(); }

  // Sleeps at most wait_ns (kForever: no limit, 0: not at all) and resets the eventfd. The polls
  // that are ready afterwards; their results are final.
  NodeList<Op> wait(int event_fd, std::uint64_t wait_ns) {
    events_.assign(1, {event_fd, POLLIN, 0});
    for (const Op* op : polls_) events_.push_back({op->poll_fd, op->poll_events, 0});
    constexpr std::uint64_t kNsPerSecond = 1'000'000'000;
    timespec limit{};
    if (wait_ns != kForever) {
      limit.tv_sec = static_cast<std::time_t>(wait_ns / kNsPerSecond);
      limit.tv_nsec = static_cast<long>(wait_ns % kNsPerSecond);
    }
    NodeList<Op> ready;
    const timespec* const until = wait_ns == kForever ? nullptr : &limit;
    if (::ppoll(events_.data(), events_.size(), until, nullptr) <= 0) return ready;
    if (events_[0].revents != 0) {
      std::uint64_t count = 0;
      // EAGAIN cannot matter: the count is only a signal.
      [[maybe_unused]] const ssize_t r = ::read(event_fd, &count, sizeof count);
    }
    std::size_t kept = 0;
    for (std::size_t i = 0; i < polls_.size(); ++i) {
      Op& op = *polls_[i];
      const short revents = events_[i + 1].revents;
      if (revents == 0) {
        polls_[kept++] = &op;
        continue;
      }
      op.result = (revents & POLLNVAL) != 0 ? -EBADF : 0;
      ready.push(op);
    }
    polls_.resize(kept);
    return ready;
  }

 private:
  std::vector<Op*> polls_;
  std::vector<pollfd> events_;  // of one call; kept for its memory
};

}  // namespace pqblk::io
