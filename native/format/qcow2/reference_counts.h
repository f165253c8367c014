// How often each host cluster is referred to, as check finds it.
//
// Room format/qcow2. Two bytes for each cluster of the file; larger counts go to a side table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

namespace pqblk::format::qcow2 {

class ReferenceCounts {
 public:
  explicit ReferenceCounts(std::uint64_t clusters) : small_(clusters) {}

  std::uint64_t clusters() const { return small_.size(); }
  std::uint64_t get(std::uint64_t cluster) const {
    if (cluster >= small_.size()) return 0;
    if (small_[cluster] != kLarge) return small_[cluster];
    return large_.at(cluster);
  }
  void add(std::uint64_t cluster) { set(cluster, get(cluster) + 1); }
  void subtract(std::uint64_t cluster) { set(cluster, get(cluster) - 1); }
  // One past the last cluster with a reference.
  std::uint64_t end() const {
    std::uint64_t n = small_.size();
    while (n != 0 && small_[n - 1] == 0) --n;
    return n;
  }

 private:
  static constexpr std::uint16_t kLarge = std::numeric_limits<std::uint16_t>::max();
  void set(std::uint64_t cluster, std::uint64_t count) {
    small_[cluster] = static_cast<std::uint16_t>(std::min<std::uint64_t>(count, kLarge));
    if (count >= kLarge) {
      large_[cluster] = count;
    } else if (!large_.empty()) {
      large_.erase(cluster);
    }
  }

  std::vector<std::uint16_t> small_;
  std::unordered_map<std::uint64_t, std::uint64_t> large_;
};

}  // namespace pqblk::format::qcow2
