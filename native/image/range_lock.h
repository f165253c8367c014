// Which byte ranges of a disk are being written: exclusive ranges, first come first served.
//
// Room image/: knows ranges and coroutines, nothing of backends. Writers, discards and zeroes hold
// a range while they run; reads take none. Ranges are kept in shards by region of kLockRegion
// bytes, so that writers far apart never meet. A range over several regions enters their shards one
// after the other in ascending order and waits in each for every earlier range that overlaps it:
// all wait-for edges lead to a higher shard, hence no deadlock, and nobody overtakes within a
// shard.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/short_lock.h"
#include "base/task.h"
#include "base/units.h"

namespace pqblk::image {

inline constexpr std::uint64_t kLockRegion = 256 * kKiB;
inline constexpr std::uint32_t kLockShards = 256;

class RangeLocks {
  struct Shard;

 public:
  // Holds (or waits for) one range of at least a byte; it lives in its coroutine's frame:
  //   RangeLocks::Range range(locks, offset, length);
  //   co_await range;
  // Destruction releases it. Destroying one that still waits is not allowed.
  class Range {
   public:
    Range(RangeLocks& locks, std::uint64_t offset, std::uint64_t length);
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;
    ~Range();

    bool await_ready() const noexcept { return false; }
    // Does not suspend when nothing overlaps. A waiter is resumed on the executor it waited on.
    bool await_suspend(std::coroutine_handle<> handle);
    void await_resume() const noexcept {}

   private:
    friend class RangeLocks;
    struct Node {
      Range* range = nullptr;
      Node* older = nullptr;
      Node* newer = nullptr;
      std::uint32_t blockers = 0;  // older overlapping ranges in this shard
    };

    bool advance();
    void leave(std::uint32_t position);
    bool overlaps(const Range& other) const { return begin_ < other.end_ && other.begin_ < end_; }
    Node& node(std::uint32_t position);
    Shard& shard(std::uint32_t position) const;

    RangeLocks& locks_;
    const std::uint64_t begin_, end_;
    std::uint32_t positions_;    // how many shards this range enters
    std::uint32_t entered_ = 0;  // how many it entered so far; the last one may block it
    Executor* home_ = nullptr;
    ReadyNode ready_;
    Range* next_awake_ = nullptr;
    std::array<Node, 2> nodes_;           // enough for small requests: no allocation
    std::unique_ptr<Node[]> more_nodes_;  // ranges over more than two regions
  };

  RangeLocks() : shards_(new Shard[kLockShards]) {}

 private:
  struct alignas(64) Shard {
    ShortLock inner;
    Range::Node* oldest = nullptr;
    Range::Node* newest = nullptr;
  };
  std::unique_ptr<Shard[]> shards_;
};

}  // namespace pqblk::image
