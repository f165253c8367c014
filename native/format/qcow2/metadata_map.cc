#include "format/qcow2/metadata_map.h"

#include <algorithm>

namespace pqblk::format::qcow2 {

const char* part_name(Part part) {
  switch (part) {
    case Part::header:
      return "header";
    case Part::l1:
      return "L1 table";
    case Part::l2:
      return "L2 table";
    case Part::refcount_table:
      return "refcount table";
    case Part::refcount_block:
      return "refcount block";
    case Part::snapshot_table:
      return "snapshot table";
    case Part::inactive_l1:
      return "L1 table of a snapshot";
    case Part::region:
      return "region";
  }
  return "?";
}

bool MetadataMap::add_cluster(HostOffset at, Part part) {
  std::lock_guard guard(mutex_);
  return clusters_.emplace(at.bytes >> layout_.cluster_bits, part).second;
}

void MetadataMap::remove_cluster(HostOffset at, Part part) {
  std::lock_guard guard(mutex_);
  const auto found = clusters_.find(at.bytes >> layout_.cluster_bits);
  if (found != clusters_.end() && found->second == part) clusters_.erase(found);
}

void MetadataMap::add_range(HostOffset at, std::uint64_t length, Part part, std::string name) {
  if (length == 0) return;
  std::lock_guard guard(mutex_);
  ranges_.push_back(
      {at, layout_.align_to_cluster(length), part, name.empty() ? part_name(part) : name});
}

void MetadataMap::remove_range(HostOffset at, Part part) {
  std::lock_guard guard(mutex_);
  std::erase_if(ranges_, [&](const Range& r) { return r.at == at && r.part == part; });
}

Error MetadataMap::conflict(const char* what, HostOffset at, const std::string& owner) const {
  return Error(Kind::corrupt, std::string(what) + " at host offset " + std::to_string(at.bytes) +
                                  " would overlap the " + owner);
}

Error MetadataMap::check_write(Part part, HostOffset at, std::uint64_t length) const {
  std::lock_guard guard(mutex_);
  std::uint64_t owned = 0;
  for (const Range& range : ranges_) {
    if (at.bytes + length <= range.at.bytes || at.bytes >= range.at.bytes + range.length) continue;
    if (range.part != part) return conflict(part_name(part), at, range.name);
    const std::uint64_t from = std::max(at.bytes, range.at.bytes);
    owned += std::min(at.bytes + length, range.at.bytes + range.length) - from;
  }
  const std::uint64_t first = at.bytes >> layout_.cluster_bits;
  const std::uint64_t last = (at.bytes + length - 1) >> layout_.cluster_bits;
  for (std::uint64_t cluster = first; cluster <= last; ++cluster) {
    const auto found = clusters_.find(cluster);
    if (found == clusters_.end()) continue;
    if (found->second != part) return conflict(part_name(part), at, part_name(found->second));
    owned = length;  // such structures are one cluster each, and writes stay inside one
  }
  if (owned < length) {
    return Error(Kind::corrupt, std::string("write of ") + part_name(part) + " to host offset " +
                                    std::to_string(at.bytes) + ", which is none");
  }
  return Error();
}

Error MetadataMap::check_free(HostOffset at, std::uint64_t length) const {
  std::lock_guard guard(mutex_);
  for (const Range& range : ranges_) {
    if (at.bytes + length <= range.at.bytes || at.bytes >= range.at.bytes + range.length) continue;
    return conflict("a free cluster", at, range.name);
  }
  const std::uint64_t first = at.bytes >> layout_.cluster_bits;
  const std::uint64_t last = (at.bytes + length - 1) >> layout_.cluster_bits;
  for (std::uint64_t cluster = first; cluster <= last; ++cluster) {
    const auto found = clusters_.find(cluster);
    if (found != clusters_.end()) return conflict("a free cluster", at, part_name(found->second));
  }
  return Error();
}

bool MetadataMap::all_free(std::span<const std::uint64_t> hosts) const {
  std::lock_guard guard(mutex_);
  for (const std::uint64_t host : hosts) {
    for (const Range& range : ranges_) {
      if (host - range.at.bytes < range.length) return false;
    }
    if (clusters_.contains(host >> layout_.cluster_bits)) return false;
  }
  return true;
}

std::vector<MetadataMap::Range> MetadataMap::regions() const {
  std::lock_guard guard(mutex_);
  std::vector<Range> out;
  for (const Range& range : ranges_) {
    if (range.part == Part::region) out.push_back(range);
  }
  return out;
}

}  // namespace pqblk::format::qcow2
