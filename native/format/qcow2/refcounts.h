// Reference counts of host clusters: all widths, a cache of block slices, growth of the table.
//
// Room format/qcow2. Changes happen in memory; write_blocks() and then, after a sync,
// write_table() bring them home. A raise is home and synced before anything refers to the cluster;
// a lower goes home only after nothing durable refers to it. Spec: "Host cluster management".
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "base/error.h"
#include "base/sync.h"
#include "base/task.h"
#include "base/units.h"
#include "format/qcow2/header.h"
#include "format/qcow2/meta_io.h"
#include "format/qcow2/slice_cache.h"

namespace pqblk::format::qcow2 {

// Refcount `index` of a block (or slice) of the given width; order 0..6. Sub-byte widths start at
// the least significant bit.
std::uint64_t get_refcount(const std::uint8_t* block, std::uint32_t order, std::uint64_t index);
void set_refcount(std::uint8_t* block, std::uint32_t order, std::uint64_t index,
                  std::uint64_t value);

struct HostRun {
  HostOffset at;
  std::uint64_t clusters = 0;
  bool fresh = false;  // beyond everything ever written: reads as zeros without being written
};

class Refcounts {
 public:
  Refcounts(MetaIo& meta, Header& header, std::uint64_t cache_bytes);

  Task<Error> load(io::Queue& q);  // reads the table; malformed entries are refused where used

  // Writes and syncs the changed header; set by Metadata. The table's place is changed before.
  std::function<Task<Error>(io::Queue&)> switch_header;

  Task<Result<std::uint64_t>> get(io::Queue& q, HostOffset cluster);
  // The same for a run: `n` receives how many clusters from `first` on (1 at least, `clusters` at
  // most) have equal counts, and `count` that count.
  Task<Error> get_run(io::Queue& q, HostOffset first, std::uint64_t clusters, std::uint64_t& n,
                      std::uint64_t& count);
  // Adds +1 or -1 to each of `clusters` counts, in memory. Kind::corrupt on underflow, no_space on
  // overflow of the width.
  Task<Error> add(io::Queue& q, HostOffset first, std::uint64_t clusters, int delta);
  // Finds clusters with count zero and raises them to one, in memory. `contiguous`: all of them in
  // one run; else the run may be shorter (one at least).
  Task<Result<HostRun>> take(io::Queue& q, std::uint64_t clusters, bool contiguous);
  // Check and repair: sets counts; their blocks exist. Quiesced.
  Task<Error> set(io::Queue& q, HostOffset first, std::uint64_t clusters, std::uint64_t value);

  // Home-going, in this order: write_blocks, sync, write_table, sync (if it wrote). The stage holds
  // the table entries whose blocks write_blocks has brought home; entries made since wait for the
  // next one, since their blocks are not durable yet.
  struct TableStage {
    std::vector<std::uint64_t> entries;
  };
  Task<Error> write_blocks(io::Queue& q, TableStage& stage);
  Task<Error> write_table(io::Queue& q, TableStage& stage, bool& wrote);
  void restore(TableStage& stage);  // instead of write_table
  // Both with their syncs: afterwards every raise so far is durable.
  Task<Error> make_durable(io::Queue& q);

  const Layout& layout() const { return layout_; }
  // Too many changed slices for the cache: the owner should write back.
  bool crowded() const { return cache_.dirty() > kDirtySlicesMax / 4; }
  // Host offset of the refcount block for a table index, 0 when absent. Check only.
  std::uint64_t table_entry(std::uint64_t index) const { return table_[index]; }
  bool block_usable(std::uint64_t index) const {
    return index < table_.size() && block_valid(table_[index]) && !duplicates_.contains(index);
  }
  std::uint64_t table_size() const { return table_.size(); }
  std::uint64_t covered_clusters() const {
    return table_.size() * layout_.refcount_block_entries();
  }
  // Replaces table and blocks by freshly written ones (repair of a damaged structure): `count_of`
  // gives each cluster's true count, without the structure itself; new clusters are placed from
  // `first_free` upward. Writes everything, syncs, switches the header, syncs. Quiesced.
  Task<Error> rebuild(io::Queue& q, std::uint64_t clusters,
                      const std::function<std::uint64_t(std::uint64_t cluster)>& count_of);

 private:
  std::uint64_t slice_of(std::uint64_t cluster) const {
    return cluster / layout_.refcount_slice_entries();
  }
  HostOffset locate(std::uint64_t slice) const;
  struct Extension {  // clusters to add behind a run
    std::uint64_t blocks = 0;
    std::uint64_t table_clusters = 0;
    std::uint64_t total() const { return blocks + table_clusters; }
  };
  bool block_valid(std::uint64_t entry) const;
  Error block_for(std::uint64_t cluster, bool& exists) const;
  Task<Error> change(io::Queue& q, std::uint64_t cluster, std::uint64_t clusters, int delta,
                     const std::uint64_t* exact);
  Task<Error> find_free(io::Queue& q, std::uint64_t at, std::uint64_t clusters, bool contiguous,
                        std::uint64_t& first, std::uint64_t& found, std::uint64_t& lowest_free);
  Extension plan(std::uint64_t first, std::uint64_t clusters) const;
  Task<Error> extend_for(io::Queue& q, std::uint64_t first, std::uint64_t clusters, bool& done);
  Task<Error> extend(io::Queue& q, std::uint64_t first, std::uint64_t clusters);
  void undo_extend(const std::vector<std::uint64_t>& made, std::size_t table_size);
  Task<Error> move_table(io::Queue& q, HostOffset at, std::uint32_t clusters);
  Task<Error> write_blocks_locked(io::Queue& q);
  Error check_room(std::uint64_t cluster_end) const;

  MetaIo& meta_;
  Header& header_;
  const Layout layout_;
  std::vector<std::uint64_t> table_;              // host byte order
  std::vector<std::uint64_t> home_;               // what the medium may hold: durable blocks only
  std::unordered_set<std::uint64_t> duplicates_;  // entries whose block another entry has, too
  std::mutex dirty_mutex_;                        // table_dirty_
  std::vector<std::uint64_t> table_dirty_;        // entries that differ, by index
  SliceCache cache_;
  AsyncMutex lock_;              // everything below and table_
  std::uint64_t free_hint_ = 0;  // no free cluster below
  Error broken_;                 // moving the table failed half-way: nothing more is written
  std::uint64_t end_ = 0;        // clusters from here on were never written
};

}  // namespace pqblk::format::qcow2
