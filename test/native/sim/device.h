// One simulated file on a device with a volatile, reordering write cache.
//
// Room test/sim. A Device is a value: what the medium holds (`durable`), what a reader sees
// (`cache`), the writes in between, and those in flight. Copies are cheap (pages.h), so a crash is
// a function: power_loss() and killed() return the device that the next opener finds, and the world
// that crashed goes on undisturbed. It knows no queues and no time but its own count of events.
//
// Rules of the medium:
// - A completed write is visible, and durable once an fdatasync that was issued after its
// completion
//   has succeeded; on a non-volatile device at once, where the file system had written and synced
//   the block before. What changes its extents (the first write to a block, ranges, sizes) waits
//   for a sync there, too.
// - Power loss keeps or loses each other write by itself, completed or in flight, torn at
//   tear_unit(). Of two overlapping writes that are both kept the one issued after the other's
//   completion wins; when they were in flight together, either does.
// - kill -9 keeps completed writes; those in flight land or not, all or in part, before the next
//   opener's first operation. Nothing of it is durable before the next fdatasync.
// - A failed fdatasync has made durable any subset and forgets the rest, as Linux does: a later
//   fdatasync that succeeds says nothing about them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "sim/choices.h"
#include "sim/pages.h"

namespace pqblk::sim {

struct Write {
  // zero stays within the size (a punch), zero_range extends it
  enum class Type : std::uint8_t { data, zero, zero_range, resize, extend };
  bool ranged() const { return type <= Type::zero_range; }
  Type type = Type::data;
  std::uint64_t offset = 0;  // resize, extend: the new size
  std::uint64_t length = 0;  // of a range, bytes; not 0
  std::vector<std::uint8_t> bytes;
  std::uint64_t begun = 0;                         // event counts
  std::uint64_t ended = 0;                         // 0: in flight
  std::uint64_t touched_from = 0, touched_to = 0;  // the bytes it can change

  void apply(Pages& pages) const { apply(pages, offset, offset + length); }
  // The part [from, to) of a ranged write; a resize or extend as a whole.
  void apply(Pages& pages, std::uint64_t from, std::uint64_t to) const;
  bool overlaps(const Write& other) const {
    return touched_from < other.touched_to && other.touched_from < touched_to;
  }
  bool concurrent(const Write& other) const {
    return (ended == 0 || other.begun < ended) && (other.ended == 0 || begun < other.ended);
  }
  Write part(std::uint64_t from, std::uint64_t to) const;  // of a ranged one
  std::string text() const;
};

struct DeviceFacts {
  bool non_volatile = false;
  bool atomic_4k = false;
  bool allocates = true;  // the file system has fallocate
};

class Device {
 public:
  Device() = default;
  explicit Device(DeviceFacts facts) : facts_(facts) {}
  Device(DeviceFacts facts, Pages content)
      : facts_(facts), durable_(content), cache_(std::move(content)) {}

  const DeviceFacts& facts() const { return facts_; }
  void set_facts(DeviceFacts facts) { facts_ = facts; }
  std::uint32_t tear_unit() const { return facts_.atomic_4k ? 4096 : 512; }
  std::uint64_t size() const { return cache_.size(); }
  const Pages& cache() const { return cache_; }
  const Pages& durable() const { return durable_; }
  // Changes from outside while nothing runs (the adversary's); durable at once.
  void overwrite(std::uint64_t offset, const void* data, std::size_t length);
  void set_size(std::uint64_t size);

  using WriteRef = std::shared_ptr<Write>;
  WriteRef begin(Write write);           // in flight from now on
  void complete(const WriteRef& write);  // visible
  // It failed: any part may have landed.
  void fail(const WriteRef& write, Choices& choices);
  std::uint64_t begin_sync() { return ++events_; }
  void complete_sync(std::uint64_t token);
  void fail_sync(std::uint64_t token, Choices& choices);
  const std::vector<WriteRef>& in_flight() const { return in_flight_; }
  const std::vector<WriteRef>& unflushed() const { return unflushed_; }

  Device power_loss(Choices& choices) const;
  Device killed(Choices& choices) const;
  // Equal hashes: the same bytes, durable and visible, and the same writes between them.
  std::uint64_t hash() const;

 private:
  std::vector<WriteRef> possible_order(Choices& choices) const;
  void forget(const WriteRef& write);
  void land(WriteRef write);  // completes it in the cache
  // Whether a completed write to the block at `offset` needs no sync: non-volatile devices.
  bool settled(std::uint64_t offset) const;
  void land_in_part(const Write& write, Choices& choices);

  DeviceFacts facts_;
  Pages durable_;
  Pages cache_;
  std::vector<WriteRef> unflushed_;  // completed, in the order of completion
  std::vector<WriteRef> in_flight_;  // in the order of issue
  std::uint64_t events_ = 0;
};

// Calls visit(from, to) for the parts of the write that survive, by choice: all, none, or torn at
// `unit`. `keep_eighths` is the chance that a whole write (when torn: a unit) survives, 0..8.
void surviving_parts(const Write& write, std::uint32_t unit, std::uint32_t keep_eighths,
                     Choices& choices,
                     const std::function<void(std::uint64_t, std::uint64_t)>& visit);

}  // namespace pqblk::sim
