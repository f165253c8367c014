// Check and repair: structure and reference counts of an image.
//
// Room format/qcow2. Counts every reference (header, tables, data, snapshots, bitmaps, regions) and
// compares with the stored refcounts. Repair sets wrong counts and COPIED flags, or rebuilds a
// damaged refcount structure; it never drops guest data.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/task.h"
#include "base/units.h"
#include "format/qcow2/metadata.h"

namespace pqblk::format::qcow2 {

inline constexpr std::size_t kCheckMessagesMax = 200;

struct CheckOptions {
  bool repair = false;
  // Of repair: lower the counts of clusters that nothing refers to, and only when nothing else is
  // wrong. COPIED flags are not looked at.
  bool leaks_only = false;
  // Replaces an L2 entry as the home table has it by what it is in truth (a sealed disk folds its
  // log): returns the raw entry to use.
  std::function<std::uint64_t(Slot slot, std::uint64_t raw)> entry_override;
  // Slots that exist only in the override (their table may not exist yet).
  std::function<void(const std::function<void(Slot)>& visit)> override_slots;
  // L1 entries visited of all; return false to stop (Kind::canceled).
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress;
};

struct CheckReport {
  std::uint64_t corruptions = 0;  // left after repair
  std::uint64_t leaks = 0;        // clusters, left after repair
  std::uint64_t corruptions_fixed = 0;
  std::uint64_t leaks_fixed = 0;
  std::uint64_t total_clusters = 0;  // of the virtual disk
  std::uint64_t allocated_clusters = 0;
  std::uint64_t compressed_clusters = 0;
  std::uint64_t zero_clusters = 0;
  std::uint64_t image_end = 0;        // bytes
  std::vector<std::string> messages;  // the first kCheckMessagesMax findings
  bool clean() const { return corruptions == 0 && leaks == 0; }
};

// The image is open (for_check), quiesced and flushed.
Task<Result<CheckReport>> check(io::Queue& q, Metadata& metadata, const CheckOptions& options);

}  // namespace pqblk::format::qcow2
