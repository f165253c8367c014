// Counters of one request queue, written by its thread and read by anyone.
//
// Room image/. One writer only, so an increment is a plain load and store, not a locked add.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
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

// Requests by how long they took; see LatencyStats for the buckets.
class LatencyCounters {
 public:
  void record(std::uint64_t ns) {
    const std::uint64_t beyond = (std::max<std::uint64_t>(ns, 1) - 1) >> kLatencyFirstBits;
    const auto bucket = static_cast<std::size_t>(std::bit_width(beyond));
    buckets_[std::min<std::size_t>(bucket, kLatencyBuckets - 1)].add(1);
    sum_ns_.add(ns);
  }
  LatencyStats snapshot() const {
    LatencyStats s;
    for (std::size_t i = 0; i < kLatencyBuckets; ++i) s.buckets[i] = buckets_[i].get();
    s.sum_ns = sum_ns_.get();
    return s;
  }

 private:
  std::array<Counter, kLatencyBuckets> buckets_;
  Counter sum_ns_;
};

// What every request would count twice is left to snapshot(), which hardly anyone calls.
struct QueueCounters {
  struct OfType {
    LatencyCounters latency;
    Counter failed;
  };
  OfType reads, writes, flushes, discards, zeroes, others;
  Counter read_bytes, written_bytes;  // asked for
  Counter failed_read_bytes, failed_written_bytes;
  Counter accepted, throttled;

  OfType& of(RequestType type) {
    switch (type) {
      case RequestType::in:
        return reads;
      case RequestType::out:
        return writes;
      case RequestType::flush:
        return flushes;
      case RequestType::discard:
        return discards;
      case RequestType::write_zeroes:
        return zeroes;
      case RequestType::get_id:
        break;
    }
    return others;
  }

  // A request that was served, with its status.
  void count(const Request& request, std::uint64_t latency_ns) {
    OfType& type = of(request.type);
    type.latency.record(latency_ns);
    if (&type == &reads) read_bytes.add(request.length);
    if (&type == &writes) written_bytes.add(request.length);
    if (request.status == Status::ok) return;
    type.failed.add(1);
    if (&type == &reads) failed_read_bytes.add(request.length);
    if (&type == &writes) failed_written_bytes.add(request.length);
  }

  // Counters that move meanwhile never make a difference negative.
  QueueStats snapshot() const {
    QueueStats s;
    std::uint64_t completed = 0;
    const auto take = [&](const OfType& type, LatencyStats& latency, std::uint64_t& good) {
      const std::uint64_t failed = type.failed.get();
      latency = type.latency.snapshot();
      std::uint64_t all = 0;
      for (const std::uint64_t n : latency.buckets) all += n;
      good = all - std::min(all, failed);
      s.errors += failed;
      completed += all;
    };
    take(reads, s.read_latency, s.reads);
    take(writes, s.write_latency, s.writes);
    take(flushes, s.flush_latency, s.flushes);
    take(discards, s.discard_latency, s.discards);
    take(zeroes, s.zero_latency, s.zeroes);
    LatencyStats other_latency;
    std::uint64_t other = 0;
    take(others, other_latency, other);
    s.read_bytes = difference(failed_read_bytes, read_bytes);
    s.written_bytes = difference(failed_written_bytes, written_bytes);
    s.throttled = throttled.get();
    const std::uint64_t taken = accepted.get();
    s.in_flight = taken - std::min(taken, completed);
    return s;
  }

 private:
  static std::uint64_t difference(const Counter& part, const Counter& whole) {
    const std::uint64_t less = part.get();
    const std::uint64_t all = whole.get();
    return all - std::min(all, less);
  }
};

}  // namespace pqblk::image
