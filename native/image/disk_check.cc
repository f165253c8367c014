#include "image/disk_check.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "format/qcow2/check.h"
#include "image/sealed_backend.h"
#include "io/queue_thread.h"
#include "storage/file.h"

namespace pqblk::image {
namespace {

namespace qcow2 = format::qcow2;

constexpr std::uint64_t kVerifyStep = 4 * kMiB;  // guest bytes between two reports

void take_report(DiskCheck& out, qcow2::CheckReport&& report) {
  out.corruptions = report.corruptions;
  out.leaks = report.leaks;
  out.corruptions_fixed = report.corruptions_fixed;
  out.leaks_fixed = report.leaks_fixed;
  out.total_clusters = report.total_clusters;
  out.allocated_clusters = report.allocated_clusters;
  out.compressed_clusters = report.compressed_clusters;
  out.image_end = report.image_end;
  out.messages = std::move(report.messages);
}

Task<Error> check_qcow2(QueueContext& q, const io::File& file, CheckSpec& spec, DiskCheck& out) {
  qcow2::OpenOptions how;
  how.read_only = !spec.repair;
  how.for_check = true;
  auto metadata = co_await qcow2::Metadata::open(q.io, file, how);
  if (!metadata) co_return metadata.take_error();
  qcow2::CheckOptions options;
  options.repair = spec.repair;
  options.progress = spec.progress;
  auto report = co_await qcow2::check(q.io, **metadata, options);
  if (!report) co_return report.take_error();
  take_report(out, std::move(*report));
  co_return Error();
}

// Every tag of every sector that has data.
Task<Error> verify_tags(QueueContext& q, SealedBackend& backend, CheckSpec& spec, DiskCheck& out) {
  const std::uint64_t size = align_up<std::uint64_t>(backend.geometry().size, kSectorSize);
  const auto bad = [&out](Sector s) {
    ++out.sectors_bad;
    if (out.bad_sectors.size() < kDamagedNamed) out.bad_sectors.push_back(s.value);
  };
  const auto unreadable = [&out](Sector s) {
    ++out.sectors_unreadable;
    if (out.unreadable_sectors.size() < kDamagedNamed) out.unreadable_sectors.push_back(s.value);
  };
  for (std::uint64_t at = 0; at < size;) {
    auto extent = co_await backend.extent(q, {at}, size - at);
    // Where the entries cannot be read, nobody knows what there is: it is looked at as data is.
    if (!extent && extent.error().kind() != Kind::io_error) co_return extent.take_error();
    const bool data = !extent || extent->kind == ExtentKind::data;
    const std::uint64_t most = extent ? extent->length : size - at;
    const std::uint64_t length = data ? std::min(most, kVerifyStep) : most;
    if (data) {
      const std::uint64_t count = div_ceil<std::uint64_t>(length, kSectorSize);
      auto looked = co_await backend.verify(q, {at / kSectorSize}, count, bad, unreadable);
      if (!looked) co_return looked.take_error();
      out.sectors_verified += *looked;
    }
    at += length;
    if (spec.progress && !spec.progress(std::min(at, size), size)) {
      co_return Error(Kind::canceled, "stopped while verifying tags");
    }
  }
  co_return Error();
}

Task<Error> look_beyond(QueueContext& q, SealedBackend& backend, DiskCheck& out) {
  auto end = co_await backend.end_beyond_size(q);
  if (!end) co_return end.take_error();
  out.grown_to = *end;
  co_return Error();
}

// The structure as it is in truth: home tables with the log's mappings over them.
Task<Error> check_structure(QueueContext& q, SealedBackend& backend, CheckSpec& spec,
                            DiskCheck& out) {
  std::unordered_map<std::uint64_t, std::uint64_t> mapped;
  if (spec.repair) {
    // Everything goes home first: a repair that ignored the log would free live clusters.
    if (Error e = co_await backend.checkpoint(q)) co_return e;
  } else {
    // A read-only open of an unclean image has frozen its folded log already.
    if (backend.overlay().frozen_empty()) backend.overlay().freeze();
    for (const auto& slot : backend.overlay().frozen_slots()) {
      mapped[slot.slot.value] = slot.version.entry;
    }
  }
  qcow2::CheckOptions options;
  options.repair = spec.repair;
  options.progress = spec.progress;
  options.entry_override = [&](Slot slot, std::uint64_t raw) {
    const auto found = mapped.find(slot.value);
    return found == mapped.end() ? raw : found->second;
  };
  options.override_slots = [&mapped](const std::function<void(Slot)>& visit) {
    for (const auto& [slot, entry] : mapped) visit({slot});
  };
  auto report = co_await qcow2::check(q.io, backend.metadata(), options);
  if (!report) co_return report.take_error();
  take_report(out, std::move(*report));
  co_return Error();
}

Task<Error> check_sealed(QueueContext& q, const io::File& file, CheckSpec& spec, DiskCheck& out) {
  if (!spec.keys) {
    co_return Error(Kind::needs_recovery, "checking a sealed disk needs its keys");
  }
  SealedOptions how;
  how.read_only = !spec.repair;
  how.for_check = true;  // structure and tags are checked without the backing image
  how.keys = std::move(*spec.keys);
  how.expected_uuid = spec.expected_uuid;
  if (!spec.repair) how.backup_sessions = std::move(spec.backup_sessions);
  how.allow_unauthenticated_backing = true;  // nothing is read from it
  auto backend = co_await SealedBackend::open(q, file, std::move(how));
  if (!backend) co_return backend.take_error();
  Error e = co_await verify_tags(q, **backend, spec, out);
  if (!e) e = co_await look_beyond(q, **backend, out);
  if (!e) e = co_await check_structure(q, **backend, spec, out);
  Error closed = co_await (*backend)->close(q);
  if (!e) e = std::move(closed);
  co_return e;
}

Error check_file(const io::File& file, CheckSpec& spec, DiskCheck& out) {
  auto thread = io::QueueThread::start(io::QueueOptions{});
  if (!thread) return thread.take_error();
  QueueContext q((*thread)->queue(), 0);
  Error e = (*thread)->run_sync([&]() -> Task<Error> {
    switch (spec.format) {
      case Format::raw:
        break;  // any bytes are a raw disk
      case Format::qcow2:
        co_return co_await check_qcow2(q, file, spec, out);
      case Format::sealed:
        co_return co_await check_sealed(q, file, spec, out);
    }
    co_return Error();
  });
  (*thread)->stop();
  return e;
}

}  // namespace

Result<DiskCheck> check_disk(CheckSpec spec) {
  storage::OpenOptions how;
  how.read_only = !spec.repair;
  how.lock = spec.repair ? storage::Lock::exclusive : storage::Lock::shared;
  auto file = storage::open_file(spec.path, how);
  if (!file) return file.take_error();
  DiskCheck out;
  Error e = check_file(*file, spec, out);
  storage::close_file(*file);
  if (e) return e.path().empty() ? std::move(e).in(spec.path) : std::move(e);
  return out;
}

}  // namespace pqblk::image
