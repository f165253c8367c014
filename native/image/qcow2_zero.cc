// Discard and write-zeroes: by metadata where whole clusters (or subclusters) are concerned, by
// writing zeros where not.
//
// Room image/, part of the QCOW2 backend.
#include <algorithm>
#include <cassert>
#include <vector>

#include "image/qcow2_image.h"

namespace pqblk::image {
namespace {

constexpr std::uint64_t kZeroWriteBytes = 1 * kMiB;

}  // namespace

using qcow2::EntryKind;
using qcow2::L2Entry;

// What becomes of one whole cluster. Returns false when nothing changes.
bool Qcow2Image::zero_update(const L2Entry& entry, ZeroMode mode, qcow2::SlotUpdate& update,
                             bool& frees) const {
  const bool has_place = entry.host.bytes != 0;
  const bool keeps = mode == ZeroMode::keep && entry.copied && version_ >= 3;
  if (reads_zero(entry) && (!has_place || keeps)) return false;
  frees = has_place && !keeps;
  update.raw_entry = 0;
  update.bitmap = 0;
  if (layout_.extended_l2) {
    if (keeps) update.raw_entry = qcow2::data_entry(entry.host);
    if (keeps || backing_) update.bitmap = qcow2::subcluster_bitmap(0, ~0u);
  } else if (keeps) {
    update.raw_entry = qcow2::zero_entry(entry.host);
  } else if (backing_) {
    update.raw_entry = qcow2::zero_entry();
  }
  return true;
}

Task<Error> Qcow2Image::zero_clusters(QueueContext& q, std::uint64_t first, std::uint64_t end,
                                      ZeroMode mode) {
  std::vector<L2Entry> old;
  std::vector<qcow2::SlotUpdate> updates;
  std::vector<L2Entry> given_up;
  const std::uint64_t step = layout_.slice_entries();
  for (std::uint64_t cluster = first; cluster < end;) {
    const std::uint64_t l1_index = layout_.l1_index({cluster});
    if (tables_.l1_entry(l1_index) == 0 && (!backing_ || mode == ZeroMode::discard)) {
      cluster = (l1_index + 1) << layout_.l2_bits();  // nothing is mapped here
      continue;
    }
    const std::uint64_t batch_end = std::min(end, align_down(cluster, step) + step);
    RangeLocks::Range range(cluster_locks_, cluster << layout_.cluster_bits,
                            (batch_end - cluster) << layout_.cluster_bits);
    co_await range;
    Error error = co_await load_entries(q, cluster, batch_end, old);
    updates.clear();
    given_up.clear();
    for (std::uint64_t i = 0; i < old.size() && !error; ++i) {
      qcow2::SlotUpdate update{{cluster + i}};
      bool frees = false;
      if (!zero_update(old[i], mode, update, frees)) continue;
      updates.push_back(update);
      if (frees) given_up.push_back(old[i]);
    }
    if (!error && !updates.empty()) error = co_await tables_.ensure_table_lazy(q.io, {cluster});
    if (!error) error = co_await tables_.set(q.io, updates);
    if (error.kind() == Kind::corrupt) error = co_await corrupt_found(q, std::move(error));
    if (error) co_return error;
    for (const L2Entry& entry : given_up) free_old(entry);
    cluster = batch_end;
  }
  co_return Error();
}

// Zeros inside a cluster of an image with extended L2 entries: whole subclusters only need their
// bits. `done` is false when data has to be written instead.
Task<Error> Qcow2Image::zero_subclusters(QueueContext& q, std::uint64_t offset,
                                         std::uint64_t length, bool& done) {
  done = false;
  const std::uint64_t sub = layout_.subcluster_size();
  if (!layout_.extended_l2 || offset % sub != 0 || length % sub != 0) co_return Error();
  const std::uint64_t cluster = cluster_of(offset);
  assert(in_cluster(offset) + length <= layout_.cluster_size());
  RangeLocks::Range range(cluster_locks_, cluster << layout_.cluster_bits, layout_.cluster_size());
  co_await range;
  std::vector<L2Entry> old;
  Error error = co_await load_entries(q, cluster, cluster + 1, old);
  if (error || old[0].kind == EntryKind::compressed) co_return error;
  const std::uint64_t first_sub = in_cluster(offset) / sub;
  const std::uint32_t mask = static_cast<std::uint32_t>(
      (std::uint64_t{1} << (first_sub + length / sub)) - (std::uint64_t{1} << first_sub));
  done = true;
  const std::uint32_t zero = old[0].zero | mask;
  const std::uint32_t allocated = old[0].allocated & ~mask;
  if (zero == old[0].zero || (!backing_ && (old[0].allocated & mask) == 0)) co_return Error();
  error = co_await tables_.ensure_table_lazy(q.io, {cluster});
  const qcow2::SlotUpdate update{{cluster}, old[0].raw, qcow2::subcluster_bitmap(allocated, zero)};
  if (!error) error = co_await tables_.set(q.io, {&update, 1});
  co_return error;
}

// A range inside one cluster.
Task<Error> Qcow2Image::zero_part(QueueContext& q, std::uint64_t offset, std::uint64_t length) {
  bool by_bits = false;
  Error error = co_await zero_subclusters(q, offset, length, by_bits);
  if (error.kind() == Kind::corrupt) error = co_await corrupt_found(q, std::move(error));
  if (error || by_bits) co_return error;
  QueueContext::Buffer zeros;
  for (std::uint64_t done = 0; done < length;) {
    const std::uint64_t at = offset + done;
    Run run;
    if (!cached_run(at, length - done, Purpose::read, run)) {
      error = co_await load_run(q, at, length - done, Purpose::read, run);
      if (error) co_return error;
    }
    const std::uint64_t n = std::min(run.length, kZeroWriteBytes);
    if (run.source != Source::zero) {
      if (zeros.data() == nullptr) {
        zeros = q.buffer(static_cast<std::size_t>(std::min(length, kZeroWriteBytes)));
        std::fill_n(zeros.data(), zeros.size(), std::uint8_t{0});
      }
      iovec whole{zeros.data(), static_cast<std::size_t>(n)};
      const GuestBuffers data{{&whole, 1}, 0, n};
      error = co_await write_unlocked(q, at, data);
      if (error) co_return error;
    }
    done += n;
  }
  co_return Error();
}

Task<Error> Qcow2Image::write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                                     std::uint32_t flags) {
  Error error = check_writable();
  if (error) co_return error;
  {
    const qcow2::Readers::Inside inside(metadata_->readers(), q.index);
    const std::uint64_t cluster_size = layout_.cluster_size();
    const std::uint64_t end = at.bytes + length;
    const ZeroMode mode = (flags & kZeroUnmap) != 0 ? ZeroMode::unmap : ZeroMode::keep;
    // Version 2 cannot say "zero" over a backing file.
    const bool by_metadata = version_ >= 3 || !backing_;
    for (std::uint64_t from = at.bytes; from < end && !error;) {
      const std::uint64_t cluster_end = align_down(from, cluster_size) + cluster_size;
      // The last cluster counts as whole when the disk ends inside it.
      const std::uint64_t disk_end = size_.load(std::memory_order_relaxed);
      const std::uint64_t whole_end =
          end >= disk_end ? align_up(end, cluster_size) : align_down(end, cluster_size);
      if (by_metadata && in_cluster(from) == 0 && whole_end > from) {
        error = co_await zero_clusters(q, cluster_of(from), cluster_of(whole_end), mode);
        from = whole_end;
      } else {
        const std::uint64_t part_end = std::min(end, cluster_end);
        error = co_await zero_part(q, from, part_end - from);
        from = part_end;
      }
    }
  }
  if (!error && metadata_->crowded()) error = co_await metadata_->relieve(q.io);
  co_return error;
}

Task<Error> Qcow2Image::discard(QueueContext& q, GuestOffset at, std::uint64_t length) {
  Error error = check_writable();
  // Without a zero flag, a discarded cluster would show the backing file: keep the data instead.
  if (error || (version_ < 3 && backing_)) co_return error;
  {
    const qcow2::Readers::Inside inside(metadata_->readers(), q.index);
    const std::uint64_t cluster_size = layout_.cluster_size();
    const std::uint64_t end = at.bytes + length;
    const std::uint64_t first = div_ceil(at.bytes, cluster_size);
    const bool to_the_end = end >= size_.load(std::memory_order_relaxed);
    const std::uint64_t last = to_the_end ? div_ceil(end, cluster_size) : end / cluster_size;
    if (first < last) error = co_await zero_clusters(q, first, last, ZeroMode::discard);
  }
  if (!error && metadata_->crowded()) error = co_await metadata_->relieve(q.io);
  co_return error;
}

}  // namespace pqblk::image
