#include "format/qcow2/tables.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstring>

#include "format/qcow2/allocator.h"

namespace pqblk::format::qcow2 {
namespace {

constexpr std::uint64_t kCopyBytes = 64 * kKiB;

Error corrupt_entry(const char* what, std::uint64_t index, std::uint64_t raw) {
  char text[96];
  std::snprintf(text, sizeof text, "%s entry %llu is malformed (0x%016llx)", what,
                static_cast<unsigned long long>(index), static_cast<unsigned long long>(raw));
  return Error(Kind::corrupt, text);
}

}  // namespace

Tables::Tables(MetaIo& meta, const Header& header, Allocator& allocator, std::uint64_t cache_bytes,
               bool read_only)
    : meta_(meta),
      header_(header),
      layout_(header.layout),
      allocator_(allocator),
      read_only_(read_only),
      slice_bits_(static_cast<unsigned>(std::countr_zero(layout_.slice_entries()))),
      plain_bits_(layout_.extended_l2 ? 0 : kOffsetMask & ~(layout_.cluster_size() - 1)),
      cache_(
          meta, Part::l2, layout_.slice_bytes(), cache_bytes,
          {[this](std::uint64_t slice) { return locate(slice); },
           [this](std::uint64_t slice, const std::uint8_t* data) { return suspect(slice, data); },
           plain_bits_ == 0 ? std::function<bool(std::uint64_t)>()
                            : [this](std::uint64_t raw) { return plain(raw); },
           header.layout.cluster_size()}) {}

Task<Error> Tables::load(io::Queue& q) {
  l1_size_ = header_.l1_size;
  l1_ = std::make_unique<std::atomic<std::uint64_t>[]>(l1_size_);
  if (l1_size_ == 0) co_return Error();
  const std::size_t bytes = align_up<std::size_t>(l1_size_ * 8, meta_.piece());
  AlignedBuffer raw(bytes);
  Error error = co_await meta_.read(q, header_.l1_offset, raw.data(), bytes);
  if (error) co_return error;
  const auto* entries = reinterpret_cast<const Be64*>(raw.data());
  for (std::uint64_t i = 0; i < l1_size_; ++i) {
    const std::uint64_t entry = entries[i];
    l1_[i].store(entry, std::memory_order_relaxed);
    // Malformed entries are refused where they are used, so that the rest stays readable.
    if (l1_state(entry) == L1State::table) meta_.map().add_cluster(l1_host(entry), Part::l2);
  }
  co_return Error();
}

Tables::L1State Tables::l1_state(std::uint64_t raw) const {
  const std::uint64_t offset = raw & kOffsetMask;
  if ((raw & kL1Reserved) != 0 || !layout_.cluster_aligned(offset)) return L1State::corrupt;
  if (offset == 0) return (raw & kCopied) != 0 ? L1State::corrupt : L1State::none;
  return offset < meta_.host_end() ? L1State::table : L1State::corrupt;
}

HostOffset Tables::locate(std::uint64_t slice) const {
  const std::uint64_t first = slice * layout_.slice_entries();
  const std::uint64_t raw = l1_entry(layout_.l1_index({first}));
  if (l1_state(raw) != L1State::table) return {0};
  return l1_host(raw) + (layout_.l2_index({first}) << layout_.l2_entry_bits());
}

bool Tables::suspect(std::uint64_t, const std::uint8_t* data) const {
  if (read_only_) return false;
  // A data entry that points at metadata would let the guest overwrite it. Such a slice answers
  // only through entry(), which looks at each entry.
  std::array<std::uint64_t, kSliceBytesMax / 8> hosts;
  std::size_t n = 0;
  const std::size_t step = layout_.l2_entry_bytes() / 8;
  const auto* words = reinterpret_cast<const Be64*>(data);
  for (std::size_t i = 0; i < layout_.slice_bytes() / 8; i += step) {
    const std::uint64_t raw = words[i];
    if ((raw & kCompressed) == 0 && (raw & kOffsetMask) != 0) hosts[n++] = raw & kOffsetMask;
  }
  return !meta_.map().all_free({hosts.data(), n});
}

L2Entry Tables::decode(const Be64* words) const {
  return decode_entry(layout_, header_.version, words[0], layout_.extended_l2 ? words[1].get() : 0,
                      meta_.host_end());
}

bool Tables::cached_entry(Slot slot, L2Entry& out) {
  assert(slot.value < slots());
  const std::uint64_t raw = l1_entry(layout_.l1_index(slot));
  if (raw == 0) {
    out = L2Entry();
    return true;
  }
  Be64 words[2];
  if (!cache_.peek(slice_of(slot), offset_in_slice(slot), words, layout_.l2_entry_bytes())) {
    return false;
  }
  out = decode(words);
  return out.kind != EntryKind::corrupt;
}

Task<Result<L2Entry>> Tables::entry(io::Queue& q, Slot slot) {
  assert(slot.value < slots());
  const std::uint64_t index = layout_.l1_index(slot);
  const std::uint64_t raw = l1_entry(index);
  const L1State state = l1_state(raw);
  if (state == L1State::none) co_return L2Entry();
  if (state == L1State::corrupt) co_return corrupt_entry("L1", index, raw);
  Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice_of(slot));
  if (!pin) co_return pin.take_error();
  Be64 words[2];
  pin->copy_out(offset_in_slice(slot), words, layout_.l2_entry_bytes());
  L2Entry entry = decode(words);
  if (entry.kind == EntryKind::corrupt) co_return corrupt_entry("L2", slot.value, words[0]);
  const bool has_host = entry.kind == EntryKind::data || entry.kind == EntryKind::zero_allocated;
  if (has_host && !read_only_) {
    Error overlap = meta_.map().check_free(entry.host, layout_.cluster_size());
    if (overlap) co_return corrupt_entry("L2 (it points at metadata)", slot.value, words[0]);
  }
  co_return entry;
}

bool Tables::has_table(Slot slot) const {
  const std::uint64_t raw = l1_entry(layout_.l1_index(slot));
  return (raw & kCopied) != 0 && l1_state(raw) == L1State::table;
}

// Makes the table and leaves L1 alone: `at` is the new one, `old` the shared one it was copied
// from (0: none).
Task<Error> Tables::new_table(io::Queue& q, std::uint64_t l1_index, HostOffset& at,
                              HostOffset& old) {
  const std::uint64_t raw = l1_entry(l1_index);
  const L1State state = l1_state(raw);
  if (state == L1State::corrupt) co_return corrupt_entry("L1", l1_index, raw);
  old = state == L1State::table ? l1_host(raw) : HostOffset{0};
  Result<HostRun> run = co_await allocator_.take(q, 1);
  if (!run) co_return run.take_error();
  at = run->at;
  meta_.map().add_cluster(at, Part::l2);
  Error error;
  if (old.bytes == 0) {
    error = co_await meta_.write_zeroes(q, Part::l2, at, layout_.cluster_size());
  } else {
    const std::uint64_t step = std::min(layout_.cluster_size(), kCopyBytes);
    AlignedBuffer buffer(static_cast<std::size_t>(step));
    for (std::uint64_t done = 0; done < layout_.cluster_size() && !error; done += step) {
      error = co_await meta_.read(q, old + done, buffer.data(), buffer.size());
      if (!error)
        error = co_await meta_.write(q, Part::l2, at + done, buffer.data(), buffer.size());
    }
  }
  if (error) {
    meta_.map().remove_cluster(at, Part::l2);
    // A failed return only leaks the cluster; the first error is the one to report.
    Error ignored = co_await allocator_.give_back(q, *run);
    static_cast<void>(ignored.ok());
  }
  co_return error;
}

// The table of `index` first, then those that its neighbours lack, while they share an L1 piece:
// each costs two syncs by itself, and where one is wanted the next soon are.
Task<Error> Tables::new_tables(io::Queue& q, std::uint64_t index, std::vector<MadeTable>& made) {
  const std::uint64_t per_piece = meta_.piece() / 8;
  const std::uint64_t end = std::min<std::uint64_t>(l1_size_, align_up(index + 1, per_piece));
  for (std::uint64_t i = index; i < end && made.size() < kTablesAtOnce; ++i) {
    if (i != index && l1_entry(i) != 0) continue;
    MadeTable table{.index = i, .before = l1_entry(i)};
    Error error = co_await new_table(q, i, table.at, table.old);
    if (error && i == index) co_return error;
    if (error) break;  // one that nobody asked for yet
    made.push_back(table);
  }
  co_return Error();
}

Task<Error> Tables::ensure_table(io::Queue& q, Slot slot, HostOffset* freed) {
  if (freed != nullptr) *freed = {0};
  if (has_table(slot)) co_return Error();
  AsyncMutex::Guard guard = co_await table_lock_.lock();
  if (has_table(slot)) co_return Error();
  const std::uint64_t index = layout_.l1_index(slot);
  std::vector<MadeTable> made;
  Error error = co_await new_tables(q, index, made);
  if (error) co_return error;
  error = co_await meta_.sync(q);
  if (!error) {
    // Others may look through the new pointers at once: a table holds what they would see anyway.
    for (const MadeTable& t : made) {
      l1_[t.index].store(t.at.bytes | kCopied, std::memory_order_release);
    }
    error = co_await write_l1_piece(q, index * 8 / meta_.piece());
    if (!error) error = co_await meta_.sync(q);
    if (error) {
      for (const MadeTable& t : made) l1_[t.index].store(t.before, std::memory_order_release);
    }
  }
  // On failure the pointers may be on the medium or not: the new clusters are leaked, not reused.
  if (error) co_return error;
  const HostOffset old = made.front().old;
  if (old.bytes != 0) meta_.map().remove_cluster(old, Part::l2);
  if (freed != nullptr) *freed = old;
  co_return Error();
}

Task<Error> Tables::ensure_table_lazy(io::Queue& q, Slot slot) {
  if (has_table(slot)) co_return Error();
  AsyncMutex::Guard guard = co_await table_lock_.lock();
  if (has_table(slot)) co_return Error();
  const std::uint64_t index = layout_.l1_index(slot);
  HostOffset at;
  HostOffset old;
  Error error = co_await new_table(q, index, at, old);
  if (error) co_return error;
  l1_[index].store(at.bytes | kCopied, std::memory_order_release);
  mark_l1_dirty(index * 8 / meta_.piece());
  if (old.bytes != 0) {
    meta_.map().remove_cluster(old, Part::l2);
    allocator_.free_later(old, 1);
  }
  co_return Error();
}

void Tables::encode_entry(const SlotUpdate& update, Be64* words) const {
  words[0] = update.raw_entry;
  words[1] = update.bitmap;
}

Task<Error> Tables::set(io::Queue& q, std::span<const SlotUpdate> updates) {
  for (std::size_t i = 0; i < updates.size();) {
    assert(has_table(updates[i].slot));
    const std::uint64_t slice = slice_of(updates[i].slot);
    Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice);
    if (!pin) co_return pin.take_error();
    for (; i < updates.size() && slice_of(updates[i].slot) == slice; ++i) {
      Be64 words[2];
      encode_entry(updates[i], words);
      pin->update(offset_in_slice(updates[i].slot), words, layout_.l2_entry_bytes(), true);
    }
  }
  co_return Error();
}

Task<Error> Tables::store(io::Queue& q, std::span<const SlotUpdate> updates) {
  AsyncMutex::Guard guard = co_await store_lock_.lock();
  AlignedBuffer buffer(layout_.slice_bytes());
  for (std::size_t i = 0; i < updates.size();) {
    if (!has_table(updates[i].slot)) {
      co_return Error(Kind::invalid_argument, "store to a slot without a table of its own");
    }
    const std::uint64_t slice = slice_of(updates[i].slot);
    Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice);
    if (!pin) co_return pin.take_error();
    std::size_t first = layout_.slice_bytes();
    std::size_t end = 0;
    for (; i < updates.size() && slice_of(updates[i].slot) == slice; ++i) {
      Be64 words[2];
      encode_entry(updates[i], words);
      const std::size_t offset = offset_in_slice(updates[i].slot);
      pin->update(offset, words, layout_.l2_entry_bytes(), false);
      first = std::min(first, align_down<std::size_t>(offset, meta_.piece()));
      end = std::max(end, align_down<std::size_t>(offset, meta_.piece()) + meta_.piece());
    }
    pin->copy_out(first, buffer.data(), end - first);
    Error error =
        co_await meta_.write(q, Part::l2, locate(slice) + first, buffer.data(), end - first);
    if (error) co_return error;
  }
  co_return Error();
}

void Tables::mark_l1_dirty(std::uint64_t piece) {
  std::lock_guard guard(l1_mutex_);
  if (std::find(l1_dirty_.begin(), l1_dirty_.end(), piece) == l1_dirty_.end()) {
    l1_dirty_.push_back(piece);
  }
}

void Tables::copy_l1_piece(std::uint64_t piece, std::uint8_t* to) const {
  const std::uint64_t per_piece = meta_.piece() / 8;
  auto* out = reinterpret_cast<Be64*>(to);
  for (std::uint64_t i = 0; i < per_piece; ++i) {
    const std::uint64_t index = piece * per_piece + i;
    out[i] = index < l1_size_ ? l1_entry(index) : 0;
  }
}

Task<Error> Tables::write_l1_piece(io::Queue& q, std::uint64_t piece) {
  AlignedBuffer buffer(meta_.piece());
  copy_l1_piece(piece, buffer.data());
  Error error = co_await meta_.write(q, Part::l1, header_.l1_offset + piece * meta_.piece(),
                                     buffer.data(), buffer.size());
  co_return error;
}

Tables::Staged Tables::stage() {
  Staged staged;
  {
    std::lock_guard guard(l1_mutex_);
    staged.l1_pieces.swap(l1_dirty_);
  }
  staged.l1_copies = AlignedBuffer(staged.l1_pieces.size() * meta_.piece());
  for (std::size_t i = 0; i < staged.l1_pieces.size(); ++i) {
    copy_l1_piece(staged.l1_pieces[i], staged.l1_copies.data() + i * meta_.piece());
  }
  if (cache_.dirty() != 0) staged.slices = cache_.stage();
  return staged;
}

void Tables::restore(Staged& staged) {
  cache_.restore(staged.slices);
  for (const std::uint64_t piece : staged.l1_pieces) mark_l1_dirty(piece);
  staged.l1_pieces.clear();
}

Task<Error> Tables::write(io::Queue& q, Staged& staged) {
  Error error;
  for (std::size_t i = 0; i < staged.l1_pieces.size() && !error; ++i) {
    error =
        co_await meta_.write(q, Part::l1, header_.l1_offset + staged.l1_pieces[i] * meta_.piece(),
                             staged.l1_copies.data() + i * meta_.piece(), meta_.piece());
  }
  if (!error && !staged.slices.empty()) error = co_await cache_.write(q, staged.slices);
  if (error) restore(staged);
  co_return error;
}

Task<Error> Tables::move_l1(io::Queue& q, HostOffset new_offset, std::uint64_t new_entries) {
  assert(new_entries >= l1_size_);
  meta_.map().add_range(new_offset, new_entries * 8, Part::l1);
  const std::size_t bytes = static_cast<std::size_t>(layout_.align_to_cluster(new_entries * 8));
  AlignedBuffer raw(bytes);
  auto* out = reinterpret_cast<Be64*>(raw.data());
  for (std::uint64_t i = 0; i < l1_size_; ++i) out[i] = l1_entry(i);
  Error error = co_await meta_.write(q, Part::l1, new_offset, raw.data(), bytes);
  if (!error) error = co_await meta_.sync(q);
  if (error) {
    meta_.map().remove_range(new_offset, Part::l1);
    co_return error;
  }
  auto grown = std::make_unique<std::atomic<std::uint64_t>[]>(new_entries);
  for (std::uint64_t i = 0; i < l1_size_; ++i) {
    grown[i].store(l1_entry(i), std::memory_order_relaxed);
  }
  l1_ = std::move(grown);
  l1_size_ = new_entries;
  co_return Error();
}

Task<Error> Tables::repair_l1_entry(io::Queue& q, std::uint64_t index, std::uint64_t raw) {
  assert(index < l1_size_);
  l1_[index].store(raw, std::memory_order_release);
  Error error = co_await write_l1_piece(q, index * 8 / meta_.piece());
  co_return error;
}

}  // namespace pqblk::format::qcow2
