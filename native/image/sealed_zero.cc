// Discard and write-zeroes on a sealed disk. See sealed_backend.h.
//
// Work is cut at the spans of entry clusters. A whole span costs one MAP to the zero flag; of a
// part, each sector becomes zero by a Z record. A discard also unmaps whole data clusters. Without
// a backing image, what was never written already reads as zeros and costs nothing.

#include <algorithm>

#include "image/sealed_backend.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT

namespace {
constexpr std::uint64_t kZeroPiece = 4096;  // sectors of one Z record, to bound the lock's hold
}

// Sectors [from, to) of one entry cluster.
Task<Error> SealedBackend::zero_span(QueueContext& q, Slot entry_slot, Sector from, Sector to,
                                     bool unmap, std::uint64_t& last_sequence) {
  Result<std::uint64_t> entry = co_await mapping(q.io, entry_slot);
  if (!entry) co_return entry.take_error();
  const bool mapped = l2_host(*entry) != 0;
  if (!mapped && !options_.backing) co_return Error();
  const Sector begin = geometry_.first_sector_of_entry_slot(entry_slot);
  const std::uint64_t end =
      std::min(geometry_.end_sector_of_entry_slot(entry_slot).value, geometry_.sectors());
  const bool whole = from == begin && to.value == end;
  if (!mapped && (*entry & kL2Zero) != 0) co_return Error();

  // Data clusters that lie wholly in the range.
  const std::uint64_t spc = geometry_.sectors_per_cluster();
  std::vector<std::pair<Slot, std::uint64_t>> unmapped;
  for (std::uint64_t c = div_ceil(from.value, spc); unmap; ++c) {
    const std::uint64_t cluster_end = std::min((c + 1) * spc, geometry_.sectors());
    if (c * spc >= to.value || cluster_end > to.value) break;
    const Slot slot = geometry_.data_slot({c});
    Result<std::uint64_t> raw = co_await mapping(q.io, slot);
    if (!raw) co_return raw.take_error();
    if (l2_host(*raw) != 0) unmapped.emplace_back(slot, *raw);
  }
  if (Error e = co_await ensure_table(q, entry_slot)) co_return e;
  const std::uint64_t pieces = div_ceil(to.value - from.value, kZeroPiece);
  const auto records = static_cast<std::uint32_t>(unmapped.size() + pieces + 2);
  Result<Log::Room> room = co_await log_->reserve(Log::pages_for(records, 0, 2));
  if (!room) co_return room.take_error();
  if (!whole && !mapped) {
    if (Error e = co_await ensure_entry_cluster(q, entry_slot)) co_return e;
  }
  {
    // An entry cluster is mapped under this lock too: what was read above must still hold.
    AsyncMutex::Guard lock = co_await allocation_.lock();
    entry = co_await mapping(q.io, entry_slot);
    if (!entry) co_return entry.take_error();
    Log::Appender appender(*log_);
    if (whole) {
      appender.map(MapKind::entry, entry_slot, kL2Zero, *entry);
    } else {
      for (std::uint64_t s = from.value; s < to.value; s += kZeroPiece) {
        appender.z({s}, std::min(kZeroPiece, to.value - s));
      }
    }
    for (const auto& [slot, raw] : unmapped) appender.map(MapKind::data, slot, 0, raw);
    last_sequence = appender.receipt().last;
  }
  launch_log(q);
  co_return Error();
}

Task<Error> SealedBackend::zero_range(QueueContext& q, Sector first, std::uint64_t count,
                                      bool unmap) {
  if (Error e = co_await enter_writer(q, 0)) co_return e;
  std::uint64_t last = 0;
  Error e;
  const std::uint64_t end = first.value + count;
  for (std::uint64_t s = first.value; s < end && !e;) {
    const Slot slot = geometry_.entry_slot({s});
    const std::uint64_t to = std::min(end, geometry_.end_sector_of_entry_slot(slot).value);
    e = co_await zero_span(q, slot, {s}, {to}, unmap, last);
    s = to;
    if (overlay_.sectors(false) > options_.overlay_sectors_max) {
      writers_.leave();  // let the checkpoint catch up
      Error failed = co_await checkpoint(q);
      if (failed) co_return failed;
      if ((failed = co_await enter_writer(q, 0))) co_return failed;
    }
  }
  if (!e && last != 0) e = co_await log_->wait_written(last);
  writers_.leave();
  co_return e;
}

Task<Error> SealedBackend::discard(QueueContext& q, GuestOffset at, std::uint64_t length) {
  // The last sector of a disk may be a partial one; it is discarded with its padding.
  co_return co_await zero_range(q, {at.bytes >> kSectorShift},
                                div_ceil<std::uint64_t>(length, kSectorSize), true);
}

Task<Error> SealedBackend::write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                                        std::uint32_t flags) {
  co_return co_await zero_range(q, {at.bytes >> kSectorShift},
                                div_ceil<std::uint64_t>(length, kSectorSize),
                                (flags & kZeroUnmap) != 0);
}

}  // namespace pqblk::image
