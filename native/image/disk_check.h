// Checking (and repairing) a disk that nobody has open.
//
// Room image/: joins the structural check of format/qcow2 with, for a sealed disk, its log and
// tags.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "image/disk.h"
#include "sealed/keys.h"

namespace pqblk::image {

struct CheckSpec {
  std::string path;
  Format format = Format::raw;
  bool repair = false;                     // leaks and refcounts; guest data is never touched
  std::optional<sealed::VolumeKeys> keys;  // sealed
  sealed::Uuid expected_uuid{};
  std::vector<std::uint8_t> backup_sessions;  // see SealedOptions; not for a repair
  // Steps done of all steps (L1 entries, then sectors); false stops (Kind::canceled).
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress;
};

struct DiskCheck {
  std::uint64_t corruptions = 0, leaks = 0;  // left after repair
  std::uint64_t corruptions_fixed = 0, leaks_fixed = 0;
  std::uint64_t total_clusters = 0, allocated_clusters = 0, compressed_clusters = 0;
  std::uint64_t image_end = 0;  // bytes
  std::uint64_t grown_to = 0;   // sealed, bytes: where data beyond the size ends; 0: none is there
  std::vector<std::string> messages;                    // the first findings
  std::uint64_t sectors_verified = 0, sectors_bad = 0;  // sealed: tags
  std::vector<std::uint64_t> bad_sectors;               // the first of them
  std::uint64_t sectors_unreadable = 0;           // sealed: data that the medium does not give out
  std::vector<std::uint64_t> unreadable_sectors;  // the first of them
  bool clean() const {
    return corruptions == 0 && leaks == 0 && sectors_bad == 0 && sectors_unreadable == 0;
  }
};

// Blocking. Takes the file's lock (shared, or exclusive to repair). Findings are not errors; errors
// are what kept the check from its end.
Result<DiskCheck> check_disk(CheckSpec spec);

}  // namespace pqblk::image
