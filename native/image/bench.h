// The benchmark inside the engine: keeps a number of requests in flight on each queue of a disk.
//
// Room image/. It drives Disk::start on the queues' own threads, as a hypervisor's virtqueue would,
// so that what it measures is the engine and not a hand-over between threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

#include "base/error.h"
#include "image/disk.h"
#include "image/latency.h"

namespace pqblk::image {

inline constexpr std::uint32_t kBenchDepthMax = 1024;
inline constexpr std::uint64_t kBenchBlockMax = 64 * kMiB;
inline constexpr std::uint64_t kBenchMemoryMax = 1 * kGiB;  // buffers of one queue

enum class Pattern : std::uint8_t { read, write, randread, randwrite, randrw };
Result<Pattern> parse_pattern(std::string_view name);

struct BenchSpec {
  Pattern pattern = Pattern::randread;
  std::uint64_t block_size = 4096;
  std::uint64_t stride = 0;      // bytes between two places, at least block_size; 0: block_size
  std::uint32_t iodepth = 32;    // of each queue
  std::uint64_t size = 0;        // bytes from the disk's start that are used; 0: the whole disk
  std::uint64_t runtime_ms = 0;  // 0: until `size` bytes were moved
  std::uint64_t ramp_ms = 0;     // runs before the counting starts
  std::uint64_t seed = 1;
  std::uint32_t read_percent = 50;  // randrw
  std::uint32_t flush_every = 0;    // a flush after so many writes of a queue; 0: none
  // Now and then, on the calling thread; false stops the run, whose result then stands so far.
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress;
};

struct BenchDirection {
  std::uint64_t ops = 0, bytes = 0;
  double iops = 0, bytes_per_second = 0;
  LatencyHistogram latency;
};

struct BenchResult {
  BenchDirection read, write;
  BenchDirection flush;  // its bytes are 0
  std::uint64_t elapsed_ns = 0;
  std::uint32_t queues = 0;
};

// Blocking. Uses every queue of the disk; sequential patterns give each its own part of the range.
// A stride spreads the places: a working set of a few bytes over all of a disk's tables.
// Errors: invalid_argument, read_only, and the first that a request met.
Result<BenchResult> run_bench(Disk& disk, const BenchSpec& spec);

}  // namespace pqblk::image
