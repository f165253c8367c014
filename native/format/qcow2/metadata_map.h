// Which host clusters hold metadata, so that no write can land on the wrong structure.
//
// Room format/qcow2. Thread-safe; used on metadata writes and allocations, never on the path of a
// cached read or overwrite. The header, L1, refcount table and blocks, active L2 tables, snapshot
// tables and regions named by others (a sealed disk's log, key area) are all in here.
#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "format/qcow2/layout.h"

namespace pqblk::format::qcow2 {

enum class Part : std::uint8_t {
  header,
  l1,
  l2,
  refcount_table,
  refcount_block,
  snapshot_table,
  inactive_l1,
  region,
};
const char* part_name(Part part);

class MetadataMap {
 public:
  explicit MetadataMap(Layout layout) : layout_(layout) {}

  // Single clusters (L2 tables, refcount blocks). A cluster already taken keeps its first owner,
  // so that a contradiction shows up as a refused write. Returns false in that case.
  bool add_cluster(HostOffset at, Part part);
  void remove_cluster(HostOffset at, Part part);
  // Contiguous structures and regions, in bytes; `name` is for messages.
  void add_range(HostOffset at, std::uint64_t length, Part part, std::string name = {});
  void remove_range(HostOffset at, Part part);

  // Ok when every byte belongs to `part` and to nothing else; else Kind::corrupt, by name.
  Error check_write(Part part, HostOffset at, std::uint64_t length) const;
  // Ok when no byte belongs to any metadata; else Kind::corrupt, by name.
  Error check_free(HostOffset at, std::uint64_t length) const;

  // The same for many clusters at once, by host offset.
  bool all_free(std::span<const std::uint64_t> hosts) const;

  struct Range {
    HostOffset at;
    std::uint64_t length;
    Part part;
    std::string name;
  };
  std::vector<Range> regions() const;  // those added with Part::region

 private:
  Error conflict(const char* what, HostOffset at, const std::string& owner) const;

  const Layout layout_;
  mutable std::mutex mutex_;
  std::unordered_map<std::uint64_t, Part> clusters_;  // by cluster number
  std::vector<Range> ranges_;                         // a handful
};

}  // namespace pqblk::format::qcow2
