// A new refcount structure for an image whose old one is damaged (repair).
//
// Room format/qcow2. The new blocks and table go behind everything that is in use; the old ones
// stay untouched until the header names the new, so a crash leaves the old state.
#include <algorithm>
#include <cassert>

#include "format/qcow2/refcounts.h"

namespace pqblk::format::qcow2 {
namespace {

struct Plan {
  std::vector<std::uint64_t> blocks;  // table indices that need a block
  std::uint64_t table_clusters = 0;
  std::uint64_t end = 0;  // clusters, one past everything
};

Plan plan_rebuild(const Layout& layout, std::uint64_t clusters,
                  const std::function<std::uint64_t(std::uint64_t)>& count_of) {
  const std::uint64_t per_block = layout.refcount_block_entries();
  Plan plan;
  for (std::uint64_t first = 0; first < clusters; first += per_block) {
    const std::uint64_t end = std::min(clusters, first + per_block);
    for (std::uint64_t i = first; i < end; ++i) {
      if (count_of(i) == 0) continue;
      plan.blocks.push_back(first / per_block);
      break;
    }
  }
  // The structure itself needs counts too, which may need more structure.
  const std::size_t of_data = plan.blocks.size();
  for (;;) {
    plan.end = clusters + plan.blocks.size() + plan.table_clusters;
    const std::uint64_t table = layout.clusters(((plan.end - 1) / per_block + 1) * 8);
    std::vector<std::uint64_t> blocks(plan.blocks.begin(),
                                      plan.blocks.begin() + static_cast<std::ptrdiff_t>(of_data));
    for (std::uint64_t i = clusters / per_block; i <= (plan.end - 1) / per_block; ++i) {
      if (blocks.empty() || blocks.back() < i) blocks.push_back(i);
    }
    if (table == plan.table_clusters && blocks.size() == plan.blocks.size()) return plan;
    plan.table_clusters = std::max(table, plan.table_clusters);
    plan.blocks = std::move(blocks);
  }
}

}  // namespace

Task<Error> Refcounts::rebuild(io::Queue& q, std::uint64_t clusters,
                               const std::function<std::uint64_t(std::uint64_t)>& count_of) {
  AsyncMutex::Guard guard = co_await lock_.lock();
  const std::uint64_t per_block = layout_.refcount_block_entries();
  const Plan plan = plan_rebuild(layout_, clusters, count_of);
  Error error = check_room(plan.end);
  const std::uint64_t table_bytes = plan.table_clusters << layout_.cluster_bits;
  if (!error && table_bytes > std::max(kRefcountTableBytesMax, layout_.cluster_size())) {
    error = Error(Kind::no_space, "a rebuilt refcount table would be larger than 8 MiB");
  }
  if (error) co_return error;

  // Forget the old structure; its clusters count as nothing from here on.
  for (const std::uint64_t entry : table_) {
    if (block_valid(entry)) meta_.map().remove_cluster({entry}, Part::refcount_block);
  }
  meta_.map().remove_range(header_.refcount_table_offset, Part::refcount_table);
  cache_.forget(0, 0);
  duplicates_.clear();
  {
    std::lock_guard dirty(dirty_mutex_);
    table_dirty_.clear();
  }
  table_.assign(table_bytes / 8, 0);
  meta_.raise_host_end(plan.end << layout_.cluster_bits);
  end_ = std::max(end_, plan.end);

  AlignedBuffer block(static_cast<std::size_t>(layout_.cluster_size()));
  for (std::size_t n = 0; n < plan.blocks.size() && !error; ++n) {
    const HostOffset at{(clusters + n) << layout_.cluster_bits};
    std::fill_n(block.data(), block.size(), std::uint8_t{0});
    for (std::uint64_t i = 0; i < per_block; ++i) {
      const std::uint64_t cluster = plan.blocks[n] * per_block + i;
      if (cluster >= plan.end) break;
      const std::uint64_t count = cluster < clusters ? count_of(cluster) : 1;
      set_refcount(block.data(), layout_.refcount_order, i,
                   std::min(count, layout_.refcount_max()));
    }
    table_[plan.blocks[n]] = at.bytes;
    meta_.map().add_cluster(at, Part::refcount_block);
    error = co_await meta_.write(q, Part::refcount_block, at, block.data(), block.size());
  }
  const HostOffset table_at{(clusters + plan.blocks.size()) << layout_.cluster_bits};
  meta_.map().add_range(table_at, table_bytes, Part::refcount_table);
  AlignedBuffer raw(static_cast<std::size_t>(table_bytes));
  auto* out = reinterpret_cast<Be64*>(raw.data());
  for (std::size_t i = 0; i < table_.size(); ++i) out[i] = table_[i];
  if (!error)
    error = co_await meta_.write(q, Part::refcount_table, table_at, raw.data(), raw.size());
  if (!error) error = co_await meta_.sync(q);
  if (!error) {
    header_.refcount_table_offset = table_at;
    header_.refcount_table_clusters = static_cast<std::uint32_t>(plan.table_clusters);
    error = co_await switch_header(q);
  }
  home_ = table_;
  if (error) broken_ = error;  // memory and medium differ: nothing more is written
  free_hint_ = 0;
  co_return error;
}

}  // namespace pqblk::format::qcow2
