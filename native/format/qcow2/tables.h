// L1 in memory and the L2 tables behind a cache: where a slot's cluster is, and how that changes.
//
// Room format/qcow2: maps a linear Slot (l1_index * l2_entries + l2_index) to an L2Entry; what a
// slot means is the caller's affair (plain qcow2: the guest cluster; sealed: data and entry
// clusters interleaved). Spec: "Cluster mapping".
//
// Two ways to change an entry, never mixed on one image:
//   plain   ensure_table_lazy, set; Metadata::flush brings them home in the safe order
//   sealed  ensure_table, store: home at once, the caller syncs (docs/format.md, rule I7)
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/sync.h"
#include "base/task.h"
#include "base/units.h"
#include "format/qcow2/entry.h"
#include "format/qcow2/header.h"
#include "format/qcow2/meta_io.h"
#include "format/qcow2/slice_cache.h"

namespace pqblk::format::qcow2 {

class Allocator;

struct SlotUpdate {
  Slot slot;
  std::uint64_t raw_entry = 0;
  std::uint64_t bitmap = 0;  // extended L2 only
};

class Tables {
 public:
  Tables(MetaIo& meta, const Header& header, Allocator& allocator, std::uint64_t cache_bytes,
         bool read_only);

  Task<Error> load(io::Queue& q);  // reads L1; malformed entries are refused where they are used

  std::uint64_t slots() const { return l1_size_ << layout_.l2_bits(); }  // addressable

  // The synchronous fast path: true when the answer was at hand. `slot` lies below slots().
  bool cached_entry(Slot slot, L2Entry& out);
  // Still faster, for what nearly every request meets: the raw entry of a cluster that is simply
  // there, data without flags but COPIED. False: ask the others. `queue` is the caller's.
  bool plain_entry(Slot slot, std::uint32_t queue, std::uint64_t& raw) {
    std::uint64_t word = 0;
    if (l1_entry(layout_.l1_index(slot)) == 0 ||
        !cache_.peek_word(slice_of(slot), offset_in_slice(slot), queue, word)) {
      return false;
    }
    raw = word;
    return plain(word);
  }
  // Loads the slice when missing. Kind::corrupt for an entry that contradicts the specification.
  Task<Result<L2Entry>> entry(io::Queue& q, Slot slot);

  // Is there an L2 table of our own (refcount one) for this slot?
  bool has_table(Slot slot) const;
  // Sealed rule I7: allocates (or copies a shared table), writes, syncs, links the 8-byte L1
  // pointer in place, syncs; tables that neighbours lack come with it. After it, store() to the
  // slot needs no allocation. `freed` receives the old table's cluster when a shared one was
  // copied: lower it once the link is durable (0: none).
  Task<Error> ensure_table(io::Queue& q, Slot slot, HostOffset* freed = nullptr);
  // Plain: as above without syncs; the L1 pointer goes home with the next flush.
  Task<Error> ensure_table_lazy(io::Queue& q, Slot slot);

  // Sealed checkpoint: sets entries and writes the touched pieces home at once, without a sync.
  // The tables must exist (ensure_table). One call at a time runs; others wait. Updates are
  // written in the order of their slots; pass them sorted.
  Task<Error> store(io::Queue& q, std::span<const SlotUpdate> updates);
  // Plain: sets entries in memory and marks them dirty. The tables must exist.
  Task<Error> set(io::Queue& q, std::span<const SlotUpdate> updates);

  // Write-back, used by Metadata::flush around its syncs.
  struct Staged {
    SliceCache::Staged slices;
    std::vector<std::uint64_t> l1_pieces;  // piece numbers
    AlignedBuffer l1_copies;
    bool empty() const { return slices.empty() && l1_pieces.empty(); }
  };
  Staged stage();
  Task<Error> write(io::Queue& q, Staged& staged);
  void restore(Staged& staged);  // instead of write(): everything is dirty again
  std::uint64_t dirty_slices() const { return cache_.dirty(); }

  // Writes L1 to a larger place, syncs, and uses it from then on; the caller switches the header
  // and frees the old place. Quiesced, nothing dirty. Errors leave the old one in use.
  Task<Error> move_l1(io::Queue& q, HostOffset new_offset, std::uint64_t new_entries);

  std::uint64_t l1_size() const { return l1_size_; }
  std::uint64_t l1_entry(std::uint64_t index) const {
    return l1_[index].load(std::memory_order_acquire);
  }
  // Check and repair only; quiesced. Written home at once.
  Task<Error> repair_l1_entry(io::Queue& q, std::uint64_t index, std::uint64_t raw);
  void drop_cache() { cache_.forget(0, 0); }
  enum class L1State : std::uint8_t { none, table, corrupt };
  L1State l1_state(std::uint64_t raw) const;
  static HostOffset l1_host(std::uint64_t raw) { return {raw & kOffsetMask}; }

  std::uint64_t cache_hits() const { return cache_.hits(); }
  std::uint64_t cache_misses() const { return cache_.misses(); }

 private:
  std::uint64_t slice_of(Slot slot) const { return slot.value >> slice_bits_; }
  std::size_t offset_in_slice(Slot slot) const {
    return (slot.value & ((std::uint64_t{1} << slice_bits_) - 1)) << layout_.l2_entry_bits();
  }
  bool plain(std::uint64_t raw) const {
    const std::uint64_t host = raw & ~kCopied;
    return host != 0 && (host & ~plain_bits_) == 0 && host < meta_.host_end();
  }
  HostOffset locate(std::uint64_t slice) const;
  bool suspect(std::uint64_t slice, const std::uint8_t* data) const;
  L2Entry decode(const Be64* words) const;
  struct MadeTable {
    std::uint64_t index = 0, before = 0;  // in L1, and what was there
    HostOffset at, old;
  };
  static constexpr std::size_t kTablesAtOnce = 8;  // of ensure_table
  Task<Error> new_table(io::Queue& q, std::uint64_t l1_index, HostOffset& at, HostOffset& old);
  Task<Error> new_tables(io::Queue& q, std::uint64_t index, std::vector<MadeTable>& made);
  Task<Error> write_l1_piece(io::Queue& q, std::uint64_t piece);
  void mark_l1_dirty(std::uint64_t piece);
  void copy_l1_piece(std::uint64_t piece, std::uint8_t* to) const;
  void encode_entry(const SlotUpdate& update, Be64* words) const;

  MetaIo& meta_;
  const Header& header_;
  const Layout layout_;
  Allocator& allocator_;
  const bool read_only_;
  const unsigned slice_bits_;       // entries of a slice
  const std::uint64_t plain_bits_;  // of a plain entry's host offset; none with extended entries
  std::uint64_t l1_size_ = 0;
  std::unique_ptr<std::atomic<std::uint64_t>[]> l1_;  // host byte order
  SliceCache cache_;
  AsyncMutex table_lock_;  // one table is made at a time
  AsyncMutex store_lock_;
  std::mutex l1_mutex_;  // l1_dirty_
  std::vector<std::uint64_t> l1_dirty_;
};

}  // namespace pqblk::format::qcow2
