// What a disk, its queues and an image's file tell of themselves.
//
// Room cabi/.
#include <string>
#include <utility>

#include "cabi/convert.h"
#include "image/disk_info.h"

namespace pqblk::cabi {
namespace {

std::uint32_t format_number(std::string_view name) {
  if (name == "raw") return PQBLK_RAW;
  return name == "qcow2" ? PQBLK_QCOW2 : PQBLK_SEALED;
}

pqblk_image_info to_c(const image::DiskInfo& info, std::uint32_t format) {
  pqblk_image_info out = PQBLK_IMAGE_INFO_INIT;
  out.format = format;
  out.disk_bytes = info.size;
  out.file_bytes = info.file_size;
  out.allocated_bytes = info.allocated_bytes;
  out.cluster_bytes = info.cluster_size;
  if (info.holder) {
    out.flags |= PQBLK_IMAGE_IN_USE;
    out.holder_pid = info.holder->pid;
  }
  if (info.qcow2 && !info.qcow2->backing_name.empty()) out.flags |= PQBLK_IMAGE_BACKED;
  if (info.sealed) {
    if (info.sealed->clean) out.flags |= PQBLK_IMAGE_CLEAN;
    if (!info.sealed->backing_name.empty()) out.flags |= PQBLK_IMAGE_BACKED;
    std::copy(info.sealed->uuid.begin(), info.sealed->uuid.end(), out.volume_uuid);
  }
  return out;
}

pqblk_extent to_c(const image::Extent& extent, std::uint64_t offset) {
  static_assert(PQBLK_EXTENT_DATA == static_cast<int>(image::ExtentKind::data) &&
                PQBLK_EXTENT_ZERO == static_cast<int>(image::ExtentKind::zero) &&
                PQBLK_EXTENT_HOLE == static_cast<int>(image::ExtentKind::hole));
  return {sizeof(pqblk_extent), static_cast<std::uint32_t>(extent.kind), offset, extent.length};
}

}  // namespace
}  // namespace pqblk::cabi

using namespace pqblk;        // NOLINT: the C functions live outside it
using namespace pqblk::cabi;  // NOLINT

int pqblk_get_facts(pqblk_disk* disk, pqblk_facts* facts, pqblk_error* error) {
  return guarded(error, [&] {
    const image::DiskFacts from = disk->disk->facts();
    pqblk_facts out = PQBLK_FACTS_INIT;
    out.format = format_number(from.format);
    out.disk_bytes = from.size;
    out.cluster_bytes = from.cluster_size;
    out.queues = from.queues;
    if (from.read_only) out.flags |= PQBLK_FACT_READ_ONLY;
    if (from.direct) out.flags |= PQBLK_FACT_DIRECT;
    out.session_id = from.session_id;
    put_text(out.id, from.id);
    put_text(out.engine, from.engine);
    put_text(out.suite, from.suite);
    put_text(out.aead, from.aead);
    put_text(out.durability, from.durability_class);
    put_text(out.fallback_cause, from.fallback_cause);
    return put(facts, out);
  });
}

uint64_t pqblk_size(pqblk_disk* disk) { return disk->disk->size(); }

int pqblk_get_stats(pqblk_disk* disk, pqblk_stats* stats, pqblk_error* error) {
  return guarded(error, [&] {
    const image::BackendStats from = disk->disk->backend_stats();
    pqblk_stats out = PQBLK_STATS_INIT;
    out.metadata_reads = from.metadata_reads;
    out.metadata_writes = from.metadata_writes;
    out.l2_hits = from.l2_hits;
    out.l2_misses = from.l2_misses;
    out.entry_hits = from.entry_hits;
    out.entry_misses = from.entry_misses;
    out.log_bytes = from.log_bytes;
    out.log_capacity = from.log_capacity;
    out.log_used = from.log_used;
    out.checkpoints = from.checkpoints;
    out.integrity_failures = from.integrity_failures;
    out.sectors_sealed = from.sectors_sealed;
    out.sectors_opened = from.sectors_opened;
    return put(stats, out);
  });
}

int pqblk_get_queue_stats(pqblk_disk* disk, uint32_t queue, pqblk_queue_stats* stats,
                          pqblk_error* error) {
  return guarded(error, [&] {
    if (queue >= disk->queues) return Error(Kind::not_found, "the disk has no such queue");
    const image::QueueStats from = disk->disk->queue_stats(queue);
    pqblk_queue_stats out = PQBLK_QUEUE_STATS_INIT;
    out.reads = from.reads;
    out.writes = from.writes;
    out.flushes = from.flushes;
    out.discards = from.discards;
    out.zeroes = from.zeroes;
    out.errors = from.errors;
    out.read_bytes = from.read_bytes;
    out.written_bytes = from.written_bytes;
    out.in_flight = from.in_flight;
    return put(stats, out);
  });
}

int pqblk_inspect(const char* path, uint32_t format, pqblk_image_info* info, pqblk_error* error) {
  return guarded(error, [&]() -> Error {
    if (path == nullptr) return misuse("a disk has a path");
    image::Format named{};
    if (Error e = parse_format(format, named)) return e;
    const auto found = image::read_disk_info(path, named);
    if (!found) return found.error();
    return put(info, to_c(*found, format));
  });
}

int pqblk_get_extents(pqblk_disk* disk, uint64_t offset, uint64_t length, pqblk_extent* extents,
                      uint32_t max, pqblk_error* error) {
  return counted(error, [&](int& count) -> Error {
    if (extents == nullptr || max == 0 || max > INT32_MAX || extents->size < sizeof *extents) {
      return misuse("no extents to fill: use PQBLK_EXTENT_INIT");
    }
    const std::size_t stride = extents->size;
    std::uint64_t done = 0;
    do {
      const auto found = disk->disk->extent(offset + done, length - done);
      if (!found) return found.error();
      put(element(extents, stride, static_cast<std::size_t>(count)), to_c(*found, offset + done),
          stride);
      done += found->length;
      ++count;
    } while (done < length && static_cast<std::uint32_t>(count) < max);
    return {};
  });
}
