// A histogram of latencies: logarithmic, 64 linear steps in each power of two (under 1.6 % error).
//
// Room image/. Fixed memory, no allocation when recording; one thread records, merge() joins.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

namespace pqblk::image {

class LatencyHistogram {
 public:
  void record(std::uint64_t ns) {
    ++counts_[index_of(ns)];
    ++total_;
    sum_ += ns;
    min_ = std::min(min_, ns);
    max_ = std::max(max_, ns);
  }

  void merge(const LatencyHistogram& other) {
    for (std::size_t i = 0; i < counts_.size(); ++i) counts_[i] += other.counts_[i];
    total_ += other.total_;
    sum_ += other.sum_;
    min_ = std::min(min_, other.min_);
    max_ = std::max(max_, other.max_);
  }

  std::uint64_t count() const { return total_; }
  std::uint64_t min_ns() const { return total_ == 0 ? 0 : min_; }
  std::uint64_t max_ns() const { return max_; }
  double mean_ns() const {
    return total_ == 0 ? 0 : static_cast<double>(sum_) / static_cast<double>(total_);
  }

  // The latency that `percent` of the operations did not exceed: the upper end of its step.
  std::uint64_t percentile_ns(double percent) const {
    const double wanted = percent / 100.0 * static_cast<double>(total_);
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      seen += counts_[i];
      if (seen != 0 && static_cast<double>(seen) >= wanted) return std::min(upper_of(i), max_);
    }
    return max_;
  }

 private:
  static constexpr std::uint32_t kStepBits = 6;
  static constexpr std::uint64_t kSteps = 1U << kStepBits;
  static constexpr std::uint32_t kPowers =
      36;  // up to 2^42 ns, over an hour; longer counts as that

  static std::size_t index_of(std::uint64_t ns) {
    if (ns < kSteps) return static_cast<std::size_t>(ns);
    const auto shift = static_cast<std::uint32_t>(std::bit_width(ns)) - kStepBits - 1;
    if (shift >= kPowers) return (kPowers + 1) * kSteps - 1;
    return static_cast<std::size_t>((shift + 1) * kSteps + ((ns >> shift) - kSteps));
  }
  static std::uint64_t upper_of(std::size_t index) {
    if (index < kSteps) return index;
    const std::uint64_t shift = index / kSteps - 1;
    return ((index % kSteps + kSteps + 1) << shift) - 1;
  }

  std::array<std::uint64_t, (kPowers + 1) * kSteps> counts_{};
  std::uint64_t total_ = 0, sum_ = 0, min_ = ~std::uint64_t{0}, max_ = 0;
};

}  // namespace pqblk::image
