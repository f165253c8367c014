// Giving a range of the image file its space ahead of use.
//
// Room format/: raw and qcow2 preallocation share it.
#pragma once

#include <cstdint>
#include <functional>

#include "base/error.h"
#include "base/task.h"
#include "io/queue.h"

namespace pqblk::format {

enum class Preallocation : std::uint8_t { off, metadata, falloc, full };

// Bytes done of all bytes; return false to stop (Kind::canceled).
using Progress = std::function<bool(std::uint64_t done, std::uint64_t total)>;

// Counts bytes of a longer job towards one Progress.
struct ProgressCount {
  const Progress& progress;
  std::uint64_t total = 0;
  std::uint64_t done = 0;
  Error add(std::uint64_t bytes);  // Kind::canceled when told to stop
};

// Reserves space (falloc) or writes zeros (full); off and metadata do nothing. Not synced.
Task<Error> fill_range(io::Queue& q, const io::File& file, std::uint64_t offset,
                       std::uint64_t length, Preallocation how, ProgressCount& count);

// Makes a range read as zeros where it may hold anything (a block device).
Task<Error> zero_range(io::Queue& q, const io::File& file, std::uint64_t offset,
                       std::uint64_t length);

}  // namespace pqblk::format
