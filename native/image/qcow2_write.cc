// Writes that need clusters: allocation, copy-on-write, and subclusters.
//
// Room image/, part of the QCOW2 backend. The order that makes a crash harmless: data first, then
// the entry in memory; Metadata::flush brings the entry home behind a sync that covers the data.
#include <algorithm>
#include <cassert>
#include <vector>

#include "image/qcow2_image.h"

namespace pqblk::image {
namespace {

constexpr std::uint64_t kClustersAtOnce = 32;

}  // namespace

using qcow2::EntryKind;
using qcow2::L2Entry;

// One step of an allocating write: `count` clusters from `first`, contiguous on the host.
struct Qcow2Image::Allocation {
  std::uint64_t first = 0;   // guest cluster
  std::uint64_t count = 0;   // 0: another writer was faster, overwrite in place
  std::uint64_t offset = 0;  // guest range that the caller writes, within those clusters
  std::uint64_t end = 0;
  std::uint64_t fill_begin = 0;  // what holds data afterwards: the caller's range and its fill
  std::uint64_t fill_end = 0;
  std::uint64_t write_begin = 0;  // the same without fill that is there already (zeros)
  std::uint64_t write_end = 0;
  bool reuse = false;  // the cluster is ours already; only its entry changes
  bool fresh = false;  // the host place reads as zeros
  HostOffset host;     // of cluster `first`
  std::vector<L2Entry> old;

  std::uint32_t mask(const qcow2::Layout& layout, std::uint64_t cluster) const;
};

// Subclusters of a cluster that hold data after the write.
std::uint32_t Qcow2Image::Allocation::mask(const qcow2::Layout& layout,
                                           std::uint64_t cluster) const {
  const std::uint64_t base = cluster << layout.cluster_bits;
  const std::uint64_t from = std::max(fill_begin, base) - base;
  const std::uint64_t to = std::min(fill_end, base + layout.cluster_size()) - base;
  const std::uint64_t first_sub = from / layout.subcluster_size();
  const std::uint64_t end_sub = div_ceil(to, layout.subcluster_size());
  const std::uint64_t bits = (std::uint64_t{1} << end_sub) - (std::uint64_t{1} << first_sub);
  return static_cast<std::uint32_t>(bits);
}

// Decides on the run from a.old: how many clusters go in one step, and how far it has to be filled.
void Qcow2Image::plan(Allocation& a) const {
  const std::uint64_t cluster_size = layout_.cluster_size();
  const bool ext = layout_.extended_l2;
  const auto own = [](const L2Entry& e) { return e.copied && e.host.bytes != 0; };
  if (classify(a.old[0], in_cluster(a.offset), Purpose::overwrite).source == Source::data) {
    a.count = 0;
    return;
  }
  a.reuse = own(a.old[0]);
  a.count = 1;
  while (a.count < a.old.size()) {
    const L2Entry& next = a.old[a.count];
    if (own(next) != a.reuse) break;
    if (a.reuse && next.host != a.old[0].host + a.count * cluster_size) break;
    // A cluster that takes overwrites in place needs nothing from here.
    if (a.reuse && !ext && next.kind == EntryKind::data) break;
    ++a.count;
  }
  a.host = a.old[0].host;
}

// How far the clusters have to be filled around the caller's range.
void Qcow2Image::plan_fill(Allocation& a) const {
  const std::uint64_t begin = a.first << layout_.cluster_bits;
  const std::uint64_t end = begin + (a.count << layout_.cluster_bits);
  const L2Entry& head = a.old.front();
  const L2Entry& tail = a.old[a.count - 1];
  bool head_zero = reads_zero(head);
  bool tail_zero = reads_zero(tail);
  a.fill_begin = begin;
  a.fill_end = end;
  if (layout_.extended_l2) {
    const std::uint64_t sub = layout_.subcluster_size();
    // Data that moves to a new place moves as a whole; else only the touched subclusters matter.
    const auto moves = [&](const L2Entry& e) {
      return !a.reuse && (e.kind == EntryKind::compressed || e.allocated != 0);
    };
    const auto bit_of = [&](std::uint32_t bits, std::uint64_t at) {
      return (bits >> (in_cluster(at) / sub) & 1) != 0;
    };
    if (!moves(head)) {
      const bool there = a.reuse && bit_of(head.allocated, a.offset);
      a.fill_begin = there ? a.offset : align_down(a.offset, sub);
      head_zero = backing_ == nullptr || bit_of(head.zero, a.offset);
    }
    if (!moves(tail)) {
      const bool there = a.reuse && bit_of(tail.allocated, a.end - 1);
      a.fill_end = there ? a.end : align_up(a.end, sub);
      tail_zero = backing_ == nullptr || bit_of(tail.zero, a.end - 1);
    }
  }
  a.write_begin = a.fresh && head_zero ? a.offset : a.fill_begin;
  a.write_end = a.fresh && tail_zero ? a.end : a.fill_end;
  assert(a.write_begin <= a.offset && a.write_end >= a.end);
}

// Old content of clusters that are locked; zeros behind the end of the disk.
Task<Error> Qcow2Image::read_old(QueueContext& q, std::uint64_t offset, iovec& into) {
  const std::uint64_t size = size_.load(std::memory_order_relaxed);
  const GuestBuffers data{{&into, 1}, 0, into.iov_len};
  const std::uint64_t inside =
      offset >= size ? 0 : std::min<std::uint64_t>(data.size, size - offset);
  if (inside < data.size) data.part(inside, data.size - inside).zero();
  if (inside == 0) co_return Error();
  // Up to the next block of the device, which the file has even where the disk ends before.
  const std::uint64_t whole =
      std::min<std::uint64_t>(align_up<std::uint64_t>(inside, geometry().request_align), data.size);
  Error error = co_await read_unlocked(q, offset, data.part(0, whole));
  if (!error && whole > inside) data.part(inside, whole - inside).zero();
  co_return error;
}

Task<Error> Qcow2Image::write_allocating(QueueContext& q, std::uint64_t offset, GuestBuffers data,
                                         std::uint64_t& written) {
  written = 0;
  const std::uint64_t first = cluster_of(offset);
  const std::uint64_t table_end = (layout_.l1_index({first}) + 1) << layout_.l2_bits();
  const std::uint64_t last_end =
      std::min({cluster_of(offset + data.size - 1) + 1, first + kClustersAtOnce, table_end});
  // Another write to the same clusters is either done before we look, or waits for us.
  RangeLocks::Range range(cluster_locks_, first << layout_.cluster_bits,
                          (last_end - first) << layout_.cluster_bits);
  co_await range;

  Allocation a;
  a.first = first;
  a.offset = offset;
  Error error = co_await tables_.ensure_table_lazy(q.io, {first});
  if (!error) error = co_await load_entries(q, first, last_end, a.old);
  if (error.kind() == Kind::corrupt) error = co_await corrupt_found(q, std::move(error));
  if (error) co_return error;
  plan(a);
  if (a.count == 0) co_return Error();

  qcow2::HostRun run;
  if (!a.reuse) {
    Result<qcow2::HostRun> taken = co_await metadata_->allocator().take(q.io, a.count, false);
    if (!taken) {
      if (taken.error().kind() != Kind::corrupt) co_return taken.take_error();
      co_return co_await corrupt_found(q, taken.take_error());
    }
    run = *taken;
    a.host = run.at;
    a.count = run.clusters;
    a.fresh = run.fresh;
  }
  a.end = std::min(offset + data.size, (first + a.count) << layout_.cluster_bits);
  plan_fill(a);
  error = co_await write_filled(q, a, data.part(0, a.end - offset));
  if (error) {
    if (!a.reuse) {
      // Nothing refers to the new clusters; if they cannot be given back they are leaked.
      Error ignored = co_await metadata_->allocator().give_back(q.io, run);
      static_cast<void>(ignored.ok());
    }
    co_return error;
  }
  error = co_await commit(q, a);
  if (error.kind() == Kind::corrupt) error = co_await corrupt_found(q, std::move(error));
  if (!error) written = a.end - offset;
  co_return error;
}

// Writes the caller's data together with what surrounds it in its first and last cluster (or
// subcluster), as one transfer.
Task<Error> Qcow2Image::write_filled(QueueContext& q, const Allocation& a, GuestBuffers data) {
  const std::uint64_t head = a.offset - a.write_begin;
  const std::uint64_t tail = a.write_end - a.end;
  const HostOffset host = a.host + (a.write_begin - (a.first << layout_.cluster_bits));
  if (head == 0 && tail == 0) co_return co_await transfer(q, false, host, data);

  QueueContext::Buffer before;
  QueueContext::Buffer after;
  std::vector<iovec> iov;
  iov.reserve(data.iov.size() + 2);
  if (head != 0) {
    before = q.buffer(static_cast<std::size_t>(head));
    iov.push_back({before.data(), static_cast<std::size_t>(head)});
    Error error = co_await read_old(q, a.write_begin, iov.back());
    if (error) co_return error;
  }
  std::uint64_t left = data.size;
  std::size_t skip = data.skip;
  for (const iovec& v : data.iov) {
    if (left == 0) break;
    const std::size_t n = static_cast<std::size_t>(std::min<std::uint64_t>(v.iov_len - skip, left));
    iov.push_back({static_cast<std::uint8_t*>(v.iov_base) + skip, n});
    left -= n;
    skip = 0;
  }
  if (tail != 0) {
    after = q.buffer(static_cast<std::size_t>(tail));
    iov.push_back({after.data(), static_cast<std::size_t>(tail)});
    Error error = co_await read_old(q, a.end, iov.back());
    if (error) co_return error;
  }
  const GuestBuffers whole{iov, 0, a.write_end - a.write_begin};
  co_return co_await transfer(q, false, host, whole);
}

// The entries name the new data; what they named before is given up.
Task<Error> Qcow2Image::commit(QueueContext& q, const Allocation& a) {
  std::vector<qcow2::SlotUpdate> updates;
  updates.reserve(a.count);
  for (std::uint64_t i = 0; i < a.count; ++i) {
    const HostOffset host = a.host + (i << layout_.cluster_bits);
    std::uint64_t bitmap = 0;
    if (layout_.extended_l2) {
      const std::uint32_t written = a.mask(layout_, a.first + i);
      const std::uint32_t kept = a.reuse ? a.old[i].allocated : 0;
      bitmap = qcow2::subcluster_bitmap(kept | written, a.old[i].zero & ~written);
    }
    updates.push_back({{a.first + i}, qcow2::data_entry(host), bitmap});
  }
  Error error = co_await tables_.set(q.io, updates);
  if (error) co_return error;
  for (std::uint64_t i = 0; i < a.count && !a.reuse; ++i) free_old(a.old[i]);
  co_return Error();
}

void Qcow2Image::free_old(const L2Entry& entry) {
  if (entry.host.bytes == 0) return;
  const std::uint64_t first = align_down(entry.host.bytes, layout_.cluster_size());
  std::uint64_t end = first + layout_.cluster_size();
  if (entry.kind == EntryKind::compressed) {
    end = layout_.align_to_cluster(entry.host.bytes + entry.compressed_bytes);
  }
  metadata_->allocator().free_later({first}, (end - first) >> layout_.cluster_bits);
}

}  // namespace pqblk::image
