#include "image/throttle.h"

#include <algorithm>

namespace pqblk::image {
namespace {

constexpr double kNsPerSecond = 1e9;
constexpr double kDebtMaxNs = 24 * 3600 * kNsPerSecond;  // nothing waits longer

}  // namespace

Error RateLimits::check() const {
  if ((iops_burst != 0 && iops_max == 0) || (bps_burst != 0 && bps_max == 0)) {
    return Error(Kind::invalid_argument, "a burst needs the limit that it is a burst of");
  }
  return {};
}

void Throttle::Bucket::set(std::uint64_t rate, std::uint64_t burst, double now) {
  const bool was_on = ns_each != 0;
  if (rate == 0) {
    ns_each = 0;
    return;
  }
  ns_each = kNsPerSecond / static_cast<double>(rate);
  burst_ns = burst == 0 ? static_cast<double>(kBurstNs) : static_cast<double>(burst) * ns_each;
  burst_ns = std::max(burst_ns, static_cast<double>(kBurstLeastNs));
  // Debts at the old rate are forgiven, credit is kept as far as it fits.
  next_ns = was_on ? std::clamp(next_ns, now - burst_ns, now) : now - burst_ns;
}

void Throttle::Bucket::refill(double now) { next_ns = std::max(next_ns, now - burst_ns); }

void Throttle::set(const RateLimits& limits, std::uint64_t now_ns) {
  std::lock_guard guard(inner_);
  const double moved = static_cast<double>(now_ns - base_ns_);
  base_ns_ = now_ns;
  for (Bucket* bucket : {&requests_, &bytes_}) bucket->next_ns -= moved;
  requests_.set(limits.iops_max, limits.iops_burst, 0);
  bytes_.set(limits.bps_max, limits.bps_burst, 0);
  limits_ = limits;
  version_.fetch_add(1, std::memory_order_relaxed);
  update();
}

RateLimits Throttle::limits() const {
  std::lock_guard guard(inner_);
  return limits_;
}

void Throttle::lift() {
  std::lock_guard guard(inner_);
  ++lifted_;
  update();
}

void Throttle::restore() {
  std::lock_guard guard(inner_);
  --lifted_;
  update();
}

void Throttle::update() { on_.store(limits_.any() && lifted_ == 0, std::memory_order_relaxed); }

std::uint64_t Throttle::reserve(std::uint64_t bytes, std::uint64_t now_ns) {
  std::lock_guard guard(inner_);
  // The clocks of two threads are read before the lock: one may be a little behind.
  const double now = now_ns > base_ns_ ? static_cast<double>(now_ns - base_ns_) : 0;
  double due = now;
  for (Bucket* bucket : {&requests_, &bytes_}) {
    if (bucket->ns_each == 0) continue;
    bucket->refill(now);
    due = std::max(due, bucket->next_ns);
    const double cost = bucket->ns_each * (bucket == &bytes_ ? static_cast<double>(bytes) : 1.0);
    bucket->next_ns = std::min(bucket->next_ns + cost, now + kDebtMaxNs);
  }
  return base_ns_ + static_cast<std::uint64_t>(due);
}

}  // namespace pqblk::image
