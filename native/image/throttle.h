// The limits of a disk: requests and bytes a second, with bursts, for all its queues together.
//
// Room image/. Two token buckets, kept as the time from which on the next request may start. A
// queue reserves for one request at a time, so that each of several busy queues gets every n-th
// turn; a request larger than what is left goes first and is paid off after it. Nothing here waits:
// queues do (request_queue.h), with clocks of their own that all show the same time.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "base/error.h"

namespace pqblk::image {

struct RateLimits {  // 0: none
  // Reads, writes, discards and zeroes a second; bytes of reads and writes a second. Flushes are
  // never held back: they only cover what was started before.
  std::uint64_t iops_max = 0, bps_max = 0;
  // What may go at once after a time of rest, at least kBurstLeastNs worth. 0: kBurstNs worth.
  std::uint64_t iops_burst = 0, bps_burst = 0;

  bool any() const { return iops_max != 0 || bps_max != 0; }
  // invalid_argument: a burst without its rate.
  Error check() const;
  bool operator==(const RateLimits&) const = default;
};

inline constexpr std::uint64_t kBurstNs = 100'000'000;
inline constexpr std::uint64_t kBurstLeastNs = 10'000'000;  // a timer may be late by some of it

class Throttle {
 public:
  // Any thread. What was used of the old limits is not given again.
  void set(const RateLimits& limits, std::uint64_t now_ns);
  RateLimits limits() const;
  // Any thread, counted: while lifted, nothing is held back.
  void lift();
  void restore();

  bool on() const { return on_.load(std::memory_order_relaxed); }
  // Changes with every set(): what was reserved before is void.
  std::uint64_t version() const { return version_.load(std::memory_order_relaxed); }
  // Any thread. Takes a request with this many bytes into account; when it may start, ns.
  std::uint64_t reserve(std::uint64_t bytes, std::uint64_t now_ns);

 private:
  struct Bucket {
    double ns_each = 0;  // 0: no limit
    double burst_ns = 0;
    double next_ns = 0;  // when the next one may start, from base_ns_ on
    void set(std::uint64_t rate, std::uint64_t burst, double now);
    void refill(double now);
  };
  void update();  // under the lock

  std::atomic<bool> on_{false};
  std::atomic<std::uint64_t> version_{0};
  mutable std::mutex inner_;  // guards the rest
  RateLimits limits_;
  std::uint32_t lifted_ = 0;
  std::uint64_t base_ns_ = 0;  // keeps the doubles small
  Bucket requests_, bytes_;
};

}  // namespace pqblk::image
