// What the log says and the home places do not say yet: the newest version of each sector, and the
// newest mapping of each slot, in two generations.
//
// Room sealed/. New records go to the *current* generation; a checkpoint freezes it and writes it
// home while a new current one fills. Look-ups ask current, then frozen; what neither has is at
// home. Insertions happen under the log's lock (so that a freeze cuts both at the same record);
// look-ups take one shard's lock for a few instructions.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "base/flat_map.h"
#include "base/short_lock.h"
#include "base/units.h"
#include "sealed/cipher_pool.h"
#include "sealed/layout.h"

namespace pqblk::sealed {

// One sector's version. Where its ciphertext is: in memory when `cipher` is set; else in the
// image at `place` when that is not zero (the log, or an old cluster during recovery); else at
// home.
struct Version {
  Entry entry = Entry::never();
  CipherRef cipher;
  std::uint64_t place = 0;     // host offset, bytes
  std::uint64_t sequence = 0;  // log block of its record; 0 after recovery
};

struct SlotVersion {
  std::uint64_t entry = 0;      // raw L2 entry as it will be at home
  std::uint64_t old = 0;        // the one before the last MAP
  std::uint64_t sequence = 0;   // log block of the last MAP
  std::uint64_t first_old = 0;  // what home had when this generation began
};

// What an entry cluster's slot says about sectors that have no version of their own.
enum class Base : std::uint8_t { home, never, zero };

class Overlay {
 public:
  explicit Overlay(const SealedGeometry& geometry) : geometry_(geometry) {}

  // ---- look-ups, any thread ----
  // The version of a sector, from the overlay alone: a Version, or what its entry slot's new
  // mapping implies (a synthetic never/zero version), or nothing (ask home).
  // `leave`: without the reference to its ciphertext.
  enum class Cipher : std::uint8_t { take, leave };
  bool find(Sector s, Version& out, Cipher cipher = Cipher::take);
  // For `count` sectors from `first`, all of one data cluster: fills out[i] and sets found[i].
  // Returns how many were found.
  std::uint32_t find_range(Sector first, std::uint32_t count, Version* out, bool* found);
  // Before a put() of this sector: fetches ahead what it will look at. A large overlay lies beyond
  // the CPU's caches.
  void prefetch(Sector s);
  bool find_slot(Slot slot, SlotVersion& out);
  bool has_sectors() const {
    return counts_[0].load(std::memory_order_acquire) +
               counts_[1].load(std::memory_order_acquire) !=
           0;
  }

  // ---- changes; the caller holds the log's lock ----
  void put(Sector s, Version version);
  // Sectors one after the other whose ciphertext is on its way home.
  void put_run(Sector first, std::span<const Entry> entries, CipherShares& ciphers,
               std::uint64_t sequence);
  void put_zero_range(Sector first, std::uint64_t count, std::uint64_t sequence);
  void put_slot(Slot slot, std::uint64_t new_entry, std::uint64_t old_entry,
                std::uint64_t sequence);

  // ---- any thread ----
  // The write of these versions' data has completed, of sectors one after the other: the ciphertext
  // need not stay in memory. Where it then is: `place` (0: home). Nothing happens where a newer
  // version is there.
  void landed(Sector first, std::span<const Entry> entries);

  std::uint64_t sectors(bool frozen) const {
    return counts_[generation_index(frozen)].load(std::memory_order_acquire);
  }
  bool has_slots() const {
    return slot_count_[0].load(std::memory_order_acquire) +
               slot_count_[1].load(std::memory_order_acquire) !=
           0;
  }
  bool empty() const { return !has_sectors() && !has_slots(); }

  // ---- checkpoint ----
  // Current becomes frozen. Precondition: frozen is empty; the log's lock is held.
  void freeze();
  bool frozen_empty() const;
  // Once the log is complete up to the cut no version in the frozen half changes any more, so they
  // are pointed to, until drop_frozen(): there may be a hundred thousand.
  struct FrozenSector {
    Sector sector;
    const Version* version;
  };
  struct FrozenSlot {
    Slot slot;
    SlotVersion version;
  };
  std::vector<FrozenSector> frozen_sectors();  // sorted
  std::vector<FrozenSlot> frozen_slots();      // sorted
  std::optional<SlotVersion> frozen_slot(Slot slot);
  // Clusters that were mapped and unmapped again within the frozen generation.
  std::vector<HostOffset> frozen_dropped();
  bool frozen_holds(Sector s);  // has a data version not yet home
  void drop_frozen();

 private:
  static constexpr std::size_t kShards = 64;
  struct Generation {
    FlatMap<Version> sectors;
    FlatMap<SlotVersion> slots;
    std::vector<HostOffset> dropped;
  };
  struct Shard {
    ShortLock mutex;
    std::array<Generation, 2> generations;
    std::uint32_t current = 0;
  };
  // A shard holds all sectors of one entry cluster, and the slots of the same number.
  Shard& shard_of(Slot entry_slot) { return shards_[hash(entry_slot.value) % kShards]; }
  Shard& shard_for_slot(Slot slot);
  static std::uint64_t hash(std::uint64_t v) { return (v * 0x9e3779b97f4a7c15ULL) >> 40; }
  Base base_of(Generation& g, Slot entry_slot);
  // Calls body(shard, begin, end) for each piece of the run that one shard holds, under its lock.
  template <class Body>
  void each_piece(Sector first, std::size_t count, Body body);
  bool find_in(Shard& shard, Slot entry_slot, Sector s, Version& out, Cipher cipher);
  std::size_t generation_index(bool frozen) const {
    const std::uint32_t current = current_.load(std::memory_order_acquire);
    return frozen ? 1 - current : current;
  }

  const SealedGeometry& geometry_;
  std::array<Shard, kShards> shards_;
  std::array<std::atomic<std::uint64_t>, 2> counts_{};
  std::array<std::atomic<std::uint64_t>, 2> slot_count_{};
  std::atomic<std::uint32_t> current_{0};
};

}  // namespace pqblk::sealed
