#include "format/qcow2/refcounts.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

namespace pqblk::format::qcow2 {
namespace {

constexpr std::uint64_t kTableGrowthPercent = 50;  // a moved table has that much room to spare

template <class T>
T load_at(const std::uint8_t* block, std::uint64_t index) {
  T value;
  std::memcpy(&value, block + index * sizeof(T), sizeof value);
  return value;
}
template <class T>
void store_at(std::uint8_t* block, std::uint64_t index, T value) {
  std::memcpy(block + index * sizeof(T), &value, sizeof value);
}

}  // namespace

std::uint64_t get_refcount(const std::uint8_t* block, std::uint32_t order, std::uint64_t index) {
  assert(order <= kRefcountOrderMax);
  if (order < 3) {
    const std::uint32_t shift = static_cast<std::uint32_t>((index << order) & 7);
    return (block[(index << order) >> 3] >> shift) & ((1u << (1u << order)) - 1);
  }
  if (order == 3) return block[index];
  if (order == 4) return load_at<Be16>(block, index);
  if (order == 5) return load_at<Be32>(block, index);
  return load_at<Be64>(block, index);
}

void set_refcount(std::uint8_t* block, std::uint32_t order, std::uint64_t index,
                  std::uint64_t value) {
  assert(order <= kRefcountOrderMax);
  assert(order == 6 || value >> (1u << order) == 0);
  if (order < 3) {
    const std::uint32_t shift = static_cast<std::uint32_t>((index << order) & 7);
    const std::uint32_t mask = ((1u << (1u << order)) - 1) << shift;
    std::uint8_t& byte = block[(index << order) >> 3];
    byte = static_cast<std::uint8_t>((byte & ~mask) | (static_cast<std::uint32_t>(value) << shift));
  } else if (order == 3) {
    block[index] = static_cast<std::uint8_t>(value);
  } else if (order == 4) {
    store_at<Be16>(block, index, static_cast<std::uint16_t>(value));
  } else if (order == 5) {
    store_at<Be32>(block, index, static_cast<std::uint32_t>(value));
  } else {
    store_at<Be64>(block, index, value);
  }
}

Refcounts::Refcounts(MetaIo& meta, Header& header, std::uint64_t cache_bytes)
    : meta_(meta),
      header_(header),
      layout_(header.layout),
      cache_(meta, Part::refcount_block, layout_.slice_bytes(), cache_bytes,
             {[this](std::uint64_t slice) { return locate(slice); }, {}}),
      end_(layout_.clusters(meta.file().size)) {}

bool Refcounts::block_valid(std::uint64_t entry) const {
  return layout_.cluster_aligned(entry) && entry != 0 && entry < meta_.host_end();
}

Task<Error> Refcounts::load(io::Queue& q) {
  const std::size_t bytes = std::size_t{header_.refcount_table_clusters} << layout_.cluster_bits;
  AlignedBuffer raw(bytes);
  Error error = co_await meta_.read(q, header_.refcount_table_offset, raw.data(), bytes);
  if (error) co_return error;
  const auto* entries = reinterpret_cast<const Be64*>(raw.data());
  table_.assign(entries, entries + bytes / 8);
  home_ = table_;
  // Malformed entries are refused where they are used (and counted by check).
  for (std::uint64_t i = 0; i < table_.size(); ++i) {
    if (!block_valid(table_[i])) continue;
    if (!meta_.map().add_cluster({table_[i]}, Part::refcount_block)) duplicates_.insert(i);
  }
  co_return Error();
}

HostOffset Refcounts::locate(std::uint64_t slice) const {
  const std::uint64_t cluster = slice * layout_.refcount_slice_entries();
  const std::uint64_t entry = table_[cluster / layout_.refcount_block_entries()];
  const std::uint64_t in_block = cluster % layout_.refcount_block_entries();
  return {entry + in_block / layout_.refcount_slice_entries() * layout_.slice_bytes()};
}

// Is there a block for this cluster? Error when the table's entry is malformed.
Error Refcounts::block_for(std::uint64_t cluster, bool& exists) const {
  const std::uint64_t index = cluster / layout_.refcount_block_entries();
  exists = index < table_.size() && table_[index] != 0;
  if (exists && !block_usable(index)) {
    return Error(Kind::corrupt, "refcount table entry " + std::to_string(index) + " is malformed");
  }
  return Error();
}

Task<Result<std::uint64_t>> Refcounts::get(io::Queue& q, HostOffset at) {
  const std::uint64_t cluster = at.bytes >> layout_.cluster_bits;
  AsyncMutex::Guard guard = co_await lock_.lock();
  bool exists = false;
  Error error = block_for(cluster, exists);
  if (error) co_return error;
  if (!exists) co_return std::uint64_t{0};
  Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice_of(cluster));
  if (!pin) co_return pin.take_error();
  co_return get_refcount(pin->data(), layout_.refcount_order,
                         cluster % layout_.refcount_slice_entries());
}

Task<Error> Refcounts::get_run(io::Queue& q, HostOffset at, std::uint64_t clusters,
                               std::uint64_t& n, std::uint64_t& count) {
  const std::uint64_t first = at.bytes >> layout_.cluster_bits;
  const std::uint64_t end = first + clusters;
  n = 0;
  count = 0;
  AsyncMutex::Guard guard = co_await lock_.lock();
  for (std::uint64_t cluster = first; cluster < end;) {
    bool exists = false;
    Error error = block_for(cluster, exists);
    if (error) co_return error;
    const std::uint64_t per_slice = layout_.refcount_slice_entries();
    const std::uint64_t slice_end = std::min(end, align_down(cluster, per_slice) + per_slice);
    if (!exists) {
      if (n != 0 && count != 0) co_return Error();
      n += slice_end - cluster;
      cluster = slice_end;
      continue;
    }
    Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice_of(cluster));
    if (!pin) co_return pin.take_error();
    for (; cluster < slice_end; ++cluster, ++n) {
      const std::uint64_t here =
          get_refcount(pin->data(), layout_.refcount_order, cluster % per_slice);
      if (n == 0) count = here;
      if (here != count) co_return Error();
    }
  }
  co_return Error();
}

// Changes the counts of a run inside existing blocks: by `delta`, or to `*exact`.
Task<Error> Refcounts::change(io::Queue& q, std::uint64_t cluster, std::uint64_t clusters,
                              int delta, const std::uint64_t* exact) {
  const std::uint64_t per_slice = layout_.refcount_slice_entries();
  const std::uint64_t end = cluster + clusters;
  while (cluster < end) {
    bool exists = false;
    Error error = block_for(cluster, exists);
    if (!error && !exists) error = Error(Kind::corrupt, "a cluster without a refcount block");
    if (error) co_return error;
    Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice_of(cluster));
    if (!pin) co_return pin.take_error();
    std::array<std::uint8_t, kSliceBytesMax> scratch;
    const std::uint64_t first = cluster % per_slice;
    const std::uint64_t n = std::min(end - cluster, per_slice - first);
    const std::size_t from = static_cast<std::size_t>((first << layout_.refcount_order) / 8);
    const std::size_t to =
        static_cast<std::size_t>((((first + n) << layout_.refcount_order) + 7) / 8);
    std::memcpy(scratch.data() + from, pin->data() + from, to - from);
    for (std::uint64_t i = first; i < first + n; ++i) {
      const std::uint64_t old = get_refcount(scratch.data(), layout_.refcount_order, i);
      const std::uint64_t host = (cluster - first + i) << layout_.cluster_bits;
      if (exact == nullptr && delta < 0 && old == 0) {
        co_return Error(Kind::corrupt, "the refcount of the cluster at host offset " +
                                           std::to_string(host) + " would fall below zero");
      }
      if (exact == nullptr && delta > 0 && old == layout_.refcount_max()) {
        co_return Error(Kind::no_space, "the refcount of the cluster at host offset " +
                                            std::to_string(host) + " has no room to grow");
      }
      const std::uint64_t now = exact != nullptr ? *exact : delta > 0 ? old + 1 : old - 1;
      set_refcount(scratch.data(), layout_.refcount_order, i, now);
      if (now == 0) free_hint_ = std::min(free_hint_, cluster - first + i);
    }
    pin->update(from, scratch.data() + from, to - from, true);
    cluster += n;
  }
  co_return Error();
}

Task<Error> Refcounts::add(io::Queue& q, HostOffset first, std::uint64_t clusters, int delta) {
  assert(delta == 1 || delta == -1);
  AsyncMutex::Guard guard = co_await lock_.lock();
  Error error = co_await change(q, first.bytes >> layout_.cluster_bits, clusters, delta, nullptr);
  co_return error;
}

Task<Error> Refcounts::set(io::Queue& q, HostOffset first, std::uint64_t clusters,
                           std::uint64_t value) {
  if (value > layout_.refcount_max()) {
    co_return Error(Kind::no_space, "a refcount of " + std::to_string(value) +
                                        " does not fit the image's refcount width");
  }
  AsyncMutex::Guard guard = co_await lock_.lock();
  Error error = co_await change(q, first.bytes >> layout_.cluster_bits, clusters, 0, &value);
  co_return error;
}

Error Refcounts::check_room(std::uint64_t cluster_end) const {
  const std::uint64_t bytes = cluster_end << layout_.cluster_bits;
  if (cluster_end > kHostEnd >> layout_.cluster_bits) {
    return Error(Kind::no_space, "the image reached the largest host offset of qcow2 (64 PiB)");
  }
  if (meta_.file().block_device && bytes > meta_.file().size) {
    return Error(Kind::no_space, "the block device holding the image is full");
  }
  return Error();
}

// The first run of clusters with count zero from `at` on. Clusters of absent blocks are free. A
// contiguous run has all `clusters`; else it may be shorter. `lowest_free` falls to the first free
// cluster seen.
Task<Error> Refcounts::find_free(io::Queue& q, std::uint64_t at, std::uint64_t clusters,
                                 bool contiguous, std::uint64_t& first, std::uint64_t& found,
                                 std::uint64_t& lowest_free) {
  const std::uint64_t per_slice = layout_.refcount_slice_entries();
  first = at;
  found = 0;
  while (found < clusters) {
    bool exists = false;
    Error error = block_for(at, exists);
    if (error) co_return error;
    const std::uint64_t slice_end = align_down(at, per_slice) + per_slice;
    if (!exists) {
      if (found != 0 && !contiguous) break;
      if (found == 0) first = at;
      lowest_free = std::min(lowest_free, first);
      if (!contiguous) clusters = std::min(clusters, layout_.refcount_block_entries() / 2);
      const std::uint64_t n = std::min(clusters - found, slice_end - at);
      found += n;
      at += n;
      continue;
    }
    Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice_of(at));
    if (!pin) co_return pin.take_error();
    for (; at < slice_end && found < clusters; ++at) {
      if (get_refcount(pin->data(), layout_.refcount_order, at % per_slice) == 0) {
        if (found++ == 0) first = at;
        lowest_free = std::min(lowest_free, first);
      } else if (found != 0) {
        if (!contiguous) break;
        found = 0;
      }
    }
    if (!contiguous && found != 0 && at < slice_end) break;
  }
  co_return Error();
}

Task<Result<HostRun>> Refcounts::take(io::Queue& q, std::uint64_t clusters, bool contiguous) {
  assert(clusters != 0);
  AsyncMutex::Guard guard = co_await lock_.lock();
  std::uint64_t first = 0;
  std::uint64_t found = 0;
  std::uint64_t lowest_free = ~std::uint64_t{0};
  for (std::uint64_t from = free_hint_;;) {
    Error error = co_await find_free(q, from, clusters, contiguous, first, found, lowest_free);
    if (!error) error = check_room(first + found);
    if (error) co_return error;
    // Blocks that are missing are put right behind the run; if that is not free, look further.
    bool extended = false;
    error = co_await extend_for(q, first, found, extended);
    if (error) co_return error;
    if (extended) break;
    from = first + found;
  }
  const HostOffset at{first << layout_.cluster_bits};
  const std::uint64_t bytes = found << layout_.cluster_bits;
  Error error = meta_.map().check_free(at, bytes);
  if (!error) error = co_await change(q, first, found, 1, nullptr);
  if (error) co_return error;
  const bool fresh = first >= end_ && !meta_.file().block_device;
  end_ = std::max(end_, first + found);
  meta_.raise_host_end(at.bytes + bytes);
  free_hint_ = lowest_free == first ? first + found : lowest_free;
  co_return HostRun{at, found, fresh};
}

// Makes sure that blocks exist for a free run. `done` is false when there is no room behind it.
Task<Error> Refcounts::extend_for(io::Queue& q, std::uint64_t first, std::uint64_t clusters,
                                  bool& done) {
  done = true;
  const std::uint64_t per_block = layout_.refcount_block_entries();
  bool complete = true;
  for (std::uint64_t i = first / per_block; i <= (first + clusters - 1) / per_block; ++i) {
    if (i >= table_.size() || table_[i] == 0) complete = false;
  }
  if (complete) co_return Error();
  const Extension needed = plan(first, clusters);
  for (std::uint64_t at = first + clusters; at < first + clusters + needed.total(); ++at) {
    bool exists = false;
    Error error = block_for(at, exists);
    if (error) co_return error;
    if (!exists) continue;
    Result<SliceCache::Pin> pin = co_await cache_.pin(q, slice_of(at));
    if (!pin) co_return pin.take_error();
    if (get_refcount(pin->data(), layout_.refcount_order, at % layout_.refcount_slice_entries()) !=
        0) {
      done = false;
      co_return Error();
    }
  }
  Error error = co_await extend(q, first, clusters);
  co_return error;
}

// What has to be added so that the run and the added structures themselves are covered.
Refcounts::Extension Refcounts::plan(std::uint64_t first, std::uint64_t clusters) const {
  const std::uint64_t per_block = layout_.refcount_block_entries();
  Extension needed;
  for (;;) {
    const std::uint64_t end = first + clusters + needed.total();
    std::uint64_t blocks = 0;
    for (std::uint64_t i = first / per_block; i <= (end - 1) / per_block; ++i) {
      if (i >= table_.size() || table_[i] == 0) ++blocks;
    }
    const std::uint64_t entries = (end - 1) / per_block + 1;
    std::uint64_t table_clusters = needed.table_clusters;
    if (entries > table_.size()) {
      const std::uint64_t roomy = entries + entries * kTableGrowthPercent / 100;
      table_clusters = std::max(table_clusters, layout_.clusters(roomy * 8));
    }
    if (blocks == needed.blocks && table_clusters == needed.table_clusters) return needed;
    needed.blocks = blocks;
    needed.table_clusters = table_clusters;
  }
}

// Adds the missing blocks (and a larger table) behind the run [first, first + clusters).
Task<Error> Refcounts::extend(io::Queue& q, std::uint64_t first, std::uint64_t clusters) {
  const std::uint64_t per_block = layout_.refcount_block_entries();
  const Extension needed = plan(first, clusters);
  const std::uint64_t place = first + clusters;
  Error error = check_room(place + needed.total());
  if (!error) {
    error = meta_.map().check_free({place << layout_.cluster_bits}, needed.total()
                                                                        << layout_.cluster_bits);
  }
  if (error) co_return error;
  const std::uint64_t table_bytes = needed.table_clusters << layout_.cluster_bits;
  if (table_bytes > std::max(kRefcountTableBytesMax, layout_.cluster_size())) {
    co_return Error(Kind::no_space, "the refcount table reached its largest size (8 MiB)");
  }
  const std::size_t old_size = table_.size();
  if (needed.table_clusters != 0) {
    table_.resize(table_bytes / 8);
    home_.resize(table_bytes / 8);
  }
  meta_.raise_host_end((place + needed.total()) << layout_.cluster_bits);
  end_ = std::max(end_, place + needed.total());
  std::vector<std::uint64_t> made;
  for (std::uint64_t i = first / per_block; i <= (place + needed.total() - 1) / per_block && !error;
       ++i) {
    if (table_[i] != 0) continue;
    const HostOffset at{(place + made.size()) << layout_.cluster_bits};
    made.push_back(i);
    meta_.map().add_cluster(at, Part::refcount_block);
    table_[i] = at.bytes;
    error = co_await meta_.write_zeroes(q, Part::refcount_block, at, layout_.cluster_size());
  }
  if (!error) error = co_await change(q, place, needed.total(), 1, nullptr);
  if (!error && needed.table_clusters != 0) {
    error = co_await move_table(q, {(place + needed.blocks) << layout_.cluster_bits},
                                static_cast<std::uint32_t>(needed.table_clusters));
  } else if (!error) {
    std::lock_guard guard(dirty_mutex_);
    table_dirty_.insert(table_dirty_.end(), made.begin(), made.end());
  }
  if (error && !broken_) undo_extend(made, old_size);
  co_return error;
}

// As if the blocks had never been made: they may lack counts, their own first of all. Counts that
// other blocks hold for the new clusters stay raised; that leaks them.
void Refcounts::undo_extend(const std::vector<std::uint64_t>& made, std::size_t table_size) {
  const std::uint64_t slices = layout_.cluster_size() / layout_.slice_bytes();
  for (const std::uint64_t i : made) {
    cache_.forget(i * slices, slices);
    meta_.map().remove_cluster({table_[i]}, Part::refcount_block);
    table_[i] = 0;
  }
  table_.resize(table_size);
  home_.resize(table_size);
}

// The grown table_ goes to its new place: blocks and table, sync, header, sync, old one freed.
Task<Error> Refcounts::move_table(io::Queue& q, HostOffset at, std::uint32_t clusters) {
  const HostOffset old = header_.refcount_table_offset;
  const std::uint32_t old_clusters = header_.refcount_table_clusters;
  meta_.map().add_range(at, std::uint64_t{clusters} << layout_.cluster_bits, Part::refcount_table);
  AlignedBuffer raw(std::size_t{clusters} << layout_.cluster_bits);
  auto* out = reinterpret_cast<Be64*>(raw.data());
  for (std::size_t i = 0; i < table_.size(); ++i) out[i] = table_[i];
  Error error = co_await write_blocks_locked(q);
  if (!error) error = co_await meta_.write(q, Part::refcount_table, at, raw.data(), raw.size());
  if (!error) error = co_await meta_.sync(q);
  if (error) {
    meta_.map().remove_range(at, Part::refcount_table);
    co_return error;
  }
  header_.refcount_table_offset = at;
  header_.refcount_table_clusters = clusters;
  error = co_await switch_header(q);
  if (error) {
    // The larger table stays in memory only; the header names the old one, which ends earlier.
    header_.refcount_table_offset = old;
    header_.refcount_table_clusters = old_clusters;
    broken_ = error;
    co_return error;
  }
  home_ = table_;
  {
    std::lock_guard guard(dirty_mutex_);
    table_dirty_.clear();
  }
  meta_.map().remove_range(old, Part::refcount_table);
  error = co_await change(q, old.bytes >> layout_.cluster_bits, old_clusters, -1, nullptr);
  co_return error;
}

Task<Error> Refcounts::write_blocks_locked(io::Queue& q) {
  if (broken_) co_return Error(broken_);
  if (cache_.dirty() == 0) co_return Error();
  SliceCache::Staged staged = cache_.stage();
  Error error = co_await cache_.write(q, staged);
  co_return error;
}

Task<Error> Refcounts::write_blocks(io::Queue& q, TableStage& stage) {
  AsyncMutex::Guard guard = co_await lock_.lock();
  {
    std::lock_guard dirty(dirty_mutex_);
    stage.entries = std::exchange(table_dirty_, {});
  }
  Error error = co_await write_blocks_locked(q);
  if (error) restore(stage);
  co_return error;
}

void Refcounts::restore(TableStage& stage) {
  std::lock_guard guard(dirty_mutex_);
  table_dirty_.insert(table_dirty_.end(), stage.entries.begin(), stage.entries.end());
  stage.entries.clear();
}

Task<Error> Refcounts::write_table(io::Queue& q, TableStage& stage, bool& wrote) {
  wrote = false;
  if (stage.entries.empty()) co_return Error();
  AsyncMutex::Guard guard = co_await lock_.lock();
  if (broken_) co_return Error(broken_);
  const std::uint64_t per_piece = meta_.piece() / 8;
  for (const std::uint64_t index : stage.entries) home_[index] = table_[index];
  std::sort(stage.entries.begin(), stage.entries.end());
  AlignedBuffer buffer(meta_.piece());
  for (std::size_t i = 0; i < stage.entries.size();) {
    const std::uint64_t piece = stage.entries[i] / per_piece;
    while (i < stage.entries.size() && stage.entries[i] / per_piece == piece) ++i;
    auto* out = reinterpret_cast<Be64*>(buffer.data());
    for (std::uint64_t n = 0; n < per_piece; ++n) out[n] = home_[piece * per_piece + n];
    Error error = co_await meta_.write(q, Part::refcount_table,
                                       header_.refcount_table_offset + piece * meta_.piece(),
                                       buffer.data(), buffer.size());
    if (error) {
      restore(stage);
      co_return error;
    }
    wrote = true;
  }
  co_return Error();
}

Task<Error> Refcounts::make_durable(io::Queue& q) {
  TableStage stage;
  Error error = co_await write_blocks(q, stage);
  if (error) co_return error;
  // Always: another caller may have written blocks of ours without a sync.
  error = co_await meta_.sync(q);
  if (error) {
    restore(stage);
    co_return error;
  }
  bool wrote = false;
  error = co_await write_table(q, stage, wrote);
  if (!error && wrote) error = co_await meta_.sync(q);
  co_return error;
}

}  // namespace pqblk::format::qcow2
