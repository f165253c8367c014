// Rotation of a sealed disk's data key, while requests go on. See disk.h and docs/rotation.md.
//
// The work is done on the service queue in groups of pieces; between groups other callers of the
// control functions get their turn, and the pass sleeps when it is told to.

#include <algorithm>
#include <chrono>
#include <thread>

#include "image/disk_impl.h"

namespace pqblk::image {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kPiece = 1 * kMiB;
constexpr std::uint64_t kPiecesOfGroup = 8;
constexpr std::uint32_t kWorkers = 4;
constexpr std::size_t kDamagedKept = 64;
constexpr std::chrono::milliseconds kNap{50};  // how late a stop may be heard

// The pieces of one group, shared by its workers. All run on the service queue's thread.
struct Group {
  RequestServer& server;
  QueueContext& context;
  SealedBackend& sealed;
  const bool verify;
  std::uint64_t next, end;
  SealedBackend::Rekeyed done;
  Error error;
  std::uint32_t active = 1;  // workers, and the parent while it starts them
  std::coroutine_handle<> parent;

  bool await_ready() { return --active == 0; }
  void await_suspend(std::coroutine_handle<> h) { parent = h; }
  void await_resume() const {}
};

Task<Error> piece(Group& group, std::uint64_t at, std::uint64_t length) {
  if (!group.verify) {
    co_return co_await group.server.rekey(group.context, at, length, group.sealed, group.done);
  }
  auto found = co_await group.sealed.count_other_epochs(group.context, {at}, length);
  if (!found) co_return found.take_error();
  group.done.sectors += *found;
  co_return Error();
}

detail::Detached work(Group& group) {
  while (group.next < group.end && !group.error) {
    const std::uint64_t at = group.next;
    group.next = std::min(align_down(at, kPiece) + kPiece, group.end);
    Error e = co_await piece(group, at, group.next - at);
    if (e && !group.error) group.error = std::move(e);
  }
  if (--group.active == 0) group.parent.resume();
}

// Sleeps as the spec wants after a group that took `worked` and moved `bytes`. False: stop.
bool rest(const RekeySpec& spec, Clock::duration worked, std::uint64_t bytes,
          const std::function<bool()>& go_on) {
  Clock::duration pause{0};
  if (spec.share < 1) {
    pause = std::chrono::duration_cast<Clock::duration>(worked * (1 / spec.share - 1));
  }
  if (spec.bytes_per_second != 0) {
    const std::chrono::duration<double> due(static_cast<double>(bytes) /
                                            static_cast<double>(spec.bytes_per_second));
    pause = std::max(pause, std::chrono::duration_cast<Clock::duration>(due) - worked);
  }
  const Clock::time_point until = Clock::now() + pause;
  while (go_on()) {
    const Clock::duration left = until - Clock::now();
    if (left <= Clock::duration::zero()) return true;
    std::this_thread::sleep_for(std::min<Clock::duration>(left, kNap));
  }
  return false;
}

}  // namespace

Error Disk::Impl::check_sealed() const {
  if (closed) return closed_error();
  if (sealed == nullptr) return Error(Kind::unsupported, "the disk is not sealed").in(file.path);
  if (read_only) return Error(Kind::read_only, "the disk was opened read-only").in(file.path);
  return {};
}

Error Disk::change_key_area(const sealed::KeyAreaChange& change) {
  Impl& impl = *impl_;
  std::lock_guard guard(impl.control);
  if (Error e = impl.check_sealed()) return e;
  return io::run_sync(impl.service->ring(), [&] {
    return impl.sealed->change_key_area(impl.service->context(), change);
  });
}

Error Disk::begin_epoch(sealed::DataKey key) {
  Impl& impl = *impl_;
  std::lock_guard guard(impl.control);
  if (Error e = impl.check_sealed()) return e;
  impl.verified_epoch = 0;
  return io::run_sync(impl.service->ring(), [&] {
    return impl.sealed->begin_epoch(impl.service->context(), std::move(key));
  });
}

Task<Error> Disk::Impl::rekey_group(std::uint64_t begin, std::uint64_t end, bool verify,
                                    RekeyReport& report) {
  Group group{*server, service->context(), *sealed, verify, begin, end, {}, {}};
  for (std::uint32_t i = 0; i < kWorkers && group.next < group.end; ++i) {
    ++group.active;
    work(group);
  }
  co_await group;
  report.sectors += group.done.sectors;
  report.damaged += group.done.damaged.size();
  for (const std::uint64_t sector : group.done.damaged) {
    if (report.damaged_sectors.size() < kDamagedKept) report.damaged_sectors.push_back(sector);
  }
  co_return std::move(group.error);
}

// One group, or a step over a part where nothing was ever written. `control` is held.
Task<Error> Disk::Impl::rekey_step(std::uint64_t size, std::uint64_t group, bool verify,
                                   RekeyReport& report) {
  auto next = co_await sealed->next_written(service->context(), report.reached);
  if (!next) co_return next.take_error();
  const std::uint64_t begin = std::max(report.reached, align_down(*next, kPiece));
  const bool skip = begin > report.reached;
  report.reached = skip ? begin : std::min(begin + group, size);
  if (skip) co_return Error();
  co_return co_await rekey_group(begin, report.reached, verify, report);
}

Result<RekeyReport> Disk::rekey(const RekeySpec& spec) {
  Impl& impl = *impl_;
  if (spec.share <= 0 || spec.share > 1) {
    return Error(Kind::invalid_argument, "a share of the time is more than 0 and at most 1");
  }
  std::uint64_t group = kPiecesOfGroup * kPiece;
  if (spec.bytes_per_second != 0) {  // kept within a tenth of a second
    group = std::clamp(align_down(spec.bytes_per_second / 10, kPiece), kPiece, group);
  }
  RekeyReport report;
  report.reached = align_down(spec.from, kPiece);
  std::uint32_t epoch = 0;
  for (;;) {
    const std::uint64_t before = report.sectors;
    const Clock::time_point started = Clock::now();
    std::uint64_t size = 0;
    {
      std::lock_guard guard(impl.control);
      if (Error e = impl.check_sealed()) return e;
      if (epoch == 0) epoch = impl.sealed->epoch();
      if (epoch != impl.sealed->epoch()) {
        return Error(Kind::canceled, "another epoch was begun meanwhile").in(impl.file.path);
      }
      size = align_up<std::uint64_t>(impl.server->size(), impl.shape.request_align);
      if (report.reached >= size) {
        if (spec.verify) {
          impl.verified_epoch = spec.from == 0 && report.sectors == 0 ? epoch : 0;
        }
        report.complete = true;
        return report;
      }
      Error e = io::run_sync(impl.service->ring(),
                             [&] { return impl.rekey_step(size, group, spec.verify, report); });
      if (e) return e;
    }
    const auto go_on = [&] {
      return !spec.progress || spec.progress(std::min(report.reached, size), size);
    };
    const std::uint64_t moved = (report.sectors - before) * kSectorSize;
    if (!rest(spec, Clock::now() - started, moved, go_on)) return report;
  }
}

Error Disk::finish_epoch() {
  Impl& impl = *impl_;
  std::lock_guard guard(impl.control);
  if (Error e = impl.check_sealed()) return e;
  if (impl.verified_epoch != impl.sealed->epoch()) {
    return Error(Kind::invalid_argument,
                 "not every sector is known to be of the current epoch: a whole pass must find "
                 "nothing to do first")
        .in(impl.file.path);
  }
  for (auto& queue : impl.queues) queue->pause();
  Error e = io::run_sync(impl.service->ring(), [&] {
    return impl.sealed->finish_epoch(impl.service->context(), impl.verified_epoch);
  });
  for (auto& queue : impl.queues) queue->resume();
  return e;
}

}  // namespace pqblk::image
