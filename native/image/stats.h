// Counters of one request queue, written by its thread and read by anyone.
//
// Room image/. One writer only, so an increment is a plain load and store, not a locked add.
#pragma once

#include <atomic>
#include <cstdint>

#include "image/disk.h"

namespace pqblk::image {

class Counter {
 public:
  void add(std::uint64_t n) {
    value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }
  std::uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

struct QueueCounters {
  Counter reads, writes, flushes, discards, zeroes, errors;
  Counter read_bytes, written_bytes;

  QueueStats snapshot() const {
    return {reads.get(),  writes.get(), flushes.get(),    discards.get(),
            zeroes.get(), errors.get(), read_bytes.get(), written_bytes.get()};
  }
};

}  // namespace pqblk::image
