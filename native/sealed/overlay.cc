#include "sealed/overlay.h"

#include <algorithm>
#include <cassert>

namespace pqblk::sealed {

namespace {
// So many sectors of a run are fetched ahead of the one that is looked at.
constexpr std::size_t kAhead = 8;
// And so many are done before others get the lock.
constexpr std::size_t kPieceMax = 32;
}  // namespace

Overlay::Shard& Overlay::shard_for_slot(Slot slot) {
  if (geometry_.is_entry_slot(slot)) return shard_of(slot);
  const ClusterIndex c = geometry_.cluster_of_slot(slot);
  return shard_of(geometry_.entry_slot({c.value * geometry_.sectors_per_cluster()}));
}

// An entry slot mapped anew says what all its sectors are, whatever was there before it.
Base Overlay::base_of(Generation& g, Slot entry_slot) {
  const SlotVersion* v = g.slots.find(entry_slot.value);
  if (v == nullptr) return Base::home;
  if ((v->entry & kL2Zero) != 0 || (v->old & kL2Zero) != 0) return Base::zero;
  return l2_host(v->old) == 0 ? Base::never : Base::home;
}

bool Overlay::find_in(Shard& shard, Slot entry_slot, Sector s, Version& out, Cipher cipher) {
  for (const std::uint32_t index : {shard.current, 1 - shard.current}) {
    Generation& g = shard.generations[index];
    if (const Version* v = g.sectors.find(s.value)) {
      out.entry = v->entry;
      out.place = v->place;
      out.sequence = v->sequence;
      if (cipher == Cipher::take) out.cipher = v->cipher;
      return true;
    }
    if (g.slots.empty()) continue;
    const Base base = base_of(g, entry_slot);
    if (base == Base::home) continue;
    out = Version{};
    out.entry = base == Base::zero ? Entry::zero() : Entry::never();
    if (const SlotVersion* v = g.slots.find(entry_slot.value)) out.sequence = v->sequence;
    return true;
  }
  return false;
}

bool Overlay::find(Sector s, Version& out, Cipher cipher) {
  if (empty()) return false;
  const Slot entry_slot = geometry_.entry_slot(s);
  Shard& shard = shard_of(entry_slot);
  std::lock_guard guard(shard.mutex);
  return find_in(shard, entry_slot, s, out, cipher);
}

void Overlay::prefetch(Sector s) {
  Shard& shard = shard_of(geometry_.entry_slot(s));
  std::lock_guard guard(shard.mutex);
  for (Generation& g : shard.generations) g.sectors.prefetch(s.value);
}

std::uint32_t Overlay::find_range(Sector first, std::uint32_t count, Version* out, bool* found) {
  std::fill_n(found, count, false);
  if (empty()) return 0;
  std::uint32_t n = 0;
  std::uint32_t i = 0;
  while (i < count) {
    const Sector s{first.value + i};
    const Slot entry_slot = geometry_.entry_slot(s);
    const std::uint64_t end = geometry_.end_of_entry_cluster(s).value;
    Shard& shard = shard_of(entry_slot);
    std::lock_guard guard(shard.mutex);
    for (; i < count && first.value + i < end; ++i) {
      found[i] = find_in(shard, entry_slot, {first.value + i}, out[i], Cipher::take);
      n += found[i] ? 1 : 0;
    }
  }
  return n;
}

bool Overlay::find_slot(Slot slot, SlotVersion& out) {
  if (slot_count_[0].load(std::memory_order_acquire) +
          slot_count_[1].load(std::memory_order_acquire) ==
      0) {
    return false;
  }
  Shard& shard = shard_for_slot(slot);
  std::lock_guard guard(shard.mutex);
  for (const std::uint32_t index : {shard.current, 1 - shard.current}) {
    if (const SlotVersion* v = shard.generations[index].slots.find(slot.value)) {
      out = *v;
      return true;
    }
  }
  return false;
}

void Overlay::put(Sector s, Version version) {
  Shard& shard = shard_of(geometry_.entry_slot(s));
  std::lock_guard guard(shard.mutex);
  FlatMap<Version>& sectors = shard.generations[shard.current].sectors;
  const std::size_t before = sectors.size();
  sectors[s.value] = std::move(version);
  counts_[shard.current].fetch_add(sectors.size() - before, std::memory_order_release);
}

template <class Body>
void Overlay::each_piece(Sector first, std::size_t count, Body body) {
  for (std::size_t i = 0; i < count;) {
    const Sector s{first.value + i};
    const std::size_t shard_end = geometry_.end_of_entry_cluster(s).value - first.value;
    const std::size_t end = std::min({shard_end, count, i + kPieceMax});
    Shard& shard = shard_of(geometry_.entry_slot(s));
    std::lock_guard guard(shard.mutex);
    body(shard, i, end);
    i = end;
  }
}

void Overlay::put_run(Sector first, std::span<const Entry> entries, CipherShares& ciphers,
                      std::uint64_t sequence) {
  each_piece(first, entries.size(), [&](Shard& shard, std::size_t begin, std::size_t end) {
    FlatMap<Version>& sectors = shard.generations[shard.current].sectors;
    const std::size_t before = sectors.size();
    for (std::size_t i = begin; i < end; ++i) {
      const std::uint64_t s = first.value + i;
      if (i + kAhead < end) sectors.prefetch(s + kAhead);
      sectors[s] = Version{entries[i], ciphers.next(), 0, sequence};
    }
    counts_[shard.current].fetch_add(sectors.size() - before, std::memory_order_release);
  });
}

void Overlay::put_zero_range(Sector first, std::uint64_t count, std::uint64_t sequence) {
  for (std::uint64_t i = 0; i < count; ++i) {
    Version v;
    v.entry = Entry::zero();
    v.sequence = sequence;
    put({first.value + i}, std::move(v));
  }
}

void Overlay::put_slot(Slot slot, std::uint64_t new_entry, std::uint64_t old_entry,
                       std::uint64_t sequence) {
  Shard& shard = shard_for_slot(slot);
  std::lock_guard guard(shard.mutex);
  Generation& g = shard.generations[shard.current];
  const SlotVersion* before = g.slots.find(slot.value);
  SlotVersion v{new_entry, old_entry, sequence, before != nullptr ? before->first_old : old_entry};
  if (before != nullptr && l2_host(before->entry) != 0 &&
      l2_host(before->entry) != l2_host(new_entry) && before->entry != before->first_old) {
    g.dropped.push_back({l2_host(before->entry)});
  }
  if (before == nullptr) slot_count_[shard.current].fetch_add(1, std::memory_order_release);
  g.slots[slot.value] = v;
  if (geometry_.is_entry_slot(slot) && (new_entry & kL2Zero) != 0) {
    // All sectors of the entry cluster are zero from here on: older versions are gone.
    const std::uint64_t begin = geometry_.first_sector_of_entry_slot(slot).value;
    const std::uint64_t end = geometry_.end_sector_of_entry_slot(slot).value;
    for (std::uint64_t s = begin; s < end && !g.sectors.empty(); ++s) {
      if (g.sectors.erase(s)) counts_[shard.current].fetch_sub(1, std::memory_order_release);
    }
  }
}

void Overlay::landed(Sector first, std::span<const Entry> entries) {
  CipherReturns released;  // what is left over: outside the locks
  each_piece(first, entries.size(), [&](Shard& shard, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::uint64_t s = first.value + i;
      if (i + kAhead < end) shard.generations[shard.current].sectors.prefetch(s + kAhead);
      for (Generation& g : shard.generations) {
        Version* v = g.sectors.find(s);
        if (v == nullptr || !(v->entry == entries[i])) continue;
        released.add(v->cipher);
        break;
      }
    }
  });
}

void Overlay::freeze() {
  assert(frozen_empty());
  const std::uint32_t next = 1 - current_;
  for (Shard& shard : shards_) {
    std::lock_guard guard(shard.mutex);
    shard.current = next;
  }
  current_ = next;
}

bool Overlay::frozen_empty() const {
  return counts_[1 - current_] == 0 && slot_count_[1 - current_] == 0;
}

std::vector<Overlay::FrozenSector> Overlay::frozen_sectors() {
  std::vector<FrozenSector> out;
  out.reserve(counts_[1 - current_]);
  for (Shard& shard : shards_) {
    std::lock_guard guard(shard.mutex);
    shard.generations[1 - shard.current].sectors.for_each([&](std::uint64_t key, const Version& v) {
      out.push_back({{key}, &v});
    });
  }
  std::sort(out.begin(), out.end(),
            [](const FrozenSector& a, const FrozenSector& b) { return a.sector < b.sector; });
  return out;
}

std::vector<Overlay::FrozenSlot> Overlay::frozen_slots() {
  std::vector<FrozenSlot> out;
  for (Shard& shard : shards_) {
    std::lock_guard guard(shard.mutex);
    shard.generations[1 - shard.current].slots.for_each(
        [&](std::uint64_t key, const SlotVersion& v) {
          out.push_back({{key}, v});
        });
  }
  std::sort(out.begin(), out.end(),
            [](const FrozenSlot& a, const FrozenSlot& b) { return a.slot < b.slot; });
  return out;
}

std::optional<SlotVersion> Overlay::frozen_slot(Slot slot) {
  Shard& shard = shard_for_slot(slot);
  std::lock_guard guard(shard.mutex);
  const SlotVersion* v = shard.generations[1 - shard.current].slots.find(slot.value);
  if (v == nullptr) return std::nullopt;
  return *v;
}

std::vector<HostOffset> Overlay::frozen_dropped() {
  std::vector<HostOffset> out;
  for (Shard& shard : shards_) {
    std::lock_guard guard(shard.mutex);
    const auto& dropped = shard.generations[1 - shard.current].dropped;
    out.insert(out.end(), dropped.begin(), dropped.end());
  }
  return out;
}

bool Overlay::frozen_holds(Sector s) {
  if (frozen_empty()) return false;
  Shard& shard = shard_of(geometry_.entry_slot(s));
  std::lock_guard guard(shard.mutex);
  return shard.generations[1 - shard.current].sectors.find(s.value) != nullptr;
}

void Overlay::drop_frozen() {
  for (Shard& shard : shards_) {
    Generation gone;  // destroyed outside the lock
    std::lock_guard guard(shard.mutex);
    std::swap(gone, shard.generations[1 - shard.current]);
  }
  counts_[1 - current_] = 0;
  slot_count_[1 - current_] = 0;
}

}  // namespace pqblk::sealed
