// Rotation of a sealed disk's data key, while requests go on. See disk.h and docs/rotation.md.
//
// The work is done in groups of pieces: between groups other callers of the control functions get
// their turn, and the pass sleeps when it is told to. A pass that may take all of the time works on
// every queue's thread; one that leaves time to the guests, on the service queue alone.

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>

#include "base/sync.h"
#include "image/disk_impl.h"

namespace pqblk::image {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kPiece = 1 * kMiB;
constexpr std::uint64_t kPiecesOfGroup = 8;           // when the guests are to get their share
constexpr std::chrono::milliseconds kGroupTime{250};  // and when not
constexpr std::uint32_t kWorkers = 4;                 // of each queue
constexpr std::size_t kDamagedKept = 64;
constexpr std::chrono::milliseconds kNap{50};  // how late a stop may be heard

void append(std::vector<std::uint64_t>& to, const std::vector<std::uint64_t>& more) {
  to.insert(to.end(), more.begin(), more.end());
}

// Counts the sectors, and keeps the first ones of a pass.
void report_sectors(const std::vector<std::uint64_t>& found, std::uint64_t& count,
                    std::vector<std::uint64_t>& kept) {
  count += found.size();
  for (const std::uint64_t sector : found) {
    if (kept.size() < kDamagedKept) kept.push_back(sector);
  }
}

// The pieces of one group and what became of them, shared by its workers: a few on each queue.
class Group {
 public:
  Group(RequestServer& server, SealedBackend& sealed, bool verify, std::uint64_t begin,
        std::uint64_t end)
      : server_(server), sealed_(sealed), verify_(verify), end_(end), next_(begin) {}

  static detail::Detached work(std::shared_ptr<Group> group, QueueContext& q) {
    co_await resume_on(q.io);
    std::uint64_t at = 0, length = 0;
    while (group->take(at, length)) {
      SealedBackend::Rekeyed done;
      Error e = co_await group->piece(q, at, length, done);
      group->add(std::move(done), std::move(e));
      co_await yield();  // what is answered from memory holds up nobody
    }
    group->leave();
  }
  // Before the workers start, as many as there will be.
  void expect(std::uint32_t workers) { active_ = workers; }
  auto ended() { return ended_.reach(1); }

  // Afterwards.
  std::uint64_t reached() const { return next_; }
  SealedBackend::Rekeyed done;
  Error error;

 private:
  bool take(std::uint64_t& at, std::uint64_t& length) {
    std::lock_guard guard(lock_);
    if (next_ >= end_ || error || Clock::now() >= until_) return false;
    at = next_;
    next_ = std::min(align_down(at, kPiece) + kPiece, end_);
    length = next_ - at;
    return true;
  }
  Task<Error> piece(QueueContext& q, std::uint64_t at, std::uint64_t length,
                    SealedBackend::Rekeyed& out) {
    auto written = co_await sealed_.next_written(q, at, end_);
    if (!written) co_return written.take_error();
    if (*written >= at + length) {
      skip(*written);
      co_return Error();
    }
    if (!verify_) co_return co_await server_.rekey(q, at, length, sealed_, out);
    auto found = co_await sealed_.count_other_epochs(q, {at}, length);
    if (!found) co_return found.take_error();
    out.sectors = *found;
    co_return Error();
  }
  void skip(std::uint64_t to) {
    std::lock_guard guard(lock_);
    next_ = std::max(next_, std::min(align_down(to, kPiece), end_));
  }
  void add(SealedBackend::Rekeyed piece_done, Error e) {
    std::lock_guard guard(lock_);
    done.sectors += piece_done.sectors;
    append(done.damaged, piece_done.damaged);
    append(done.unreadable, piece_done.unreadable);
    if (e && !error) error = std::move(e);
  }
  void leave() {
    std::unique_lock guard(lock_);
    if (--active_ != 0) return;
    guard.unlock();
    ended_.advance(1);
  }

  RequestServer& server_;
  SealedBackend& sealed_;
  const bool verify_;
  const Clock::time_point until_ = Clock::now() + kGroupTime;
  const std::uint64_t end_;
  std::mutex lock_;  // all that follows, and what is public
  std::uint64_t next_;
  std::uint32_t active_ = 0;
  Watermark ended_{0};
};

bool full_speed(const RekeySpec& spec) { return spec.share >= 1 && spec.bytes_per_second == 0; }

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

Error Disk::begin_epoch(sealed::DataKey key, const std::vector<std::uint8_t>& key_area_state) {
  Impl& impl = *impl_;
  std::lock_guard guard(impl.control);
  if (Error e = impl.check_sealed()) return e;
  impl.verified_epoch = 0;
  return io::run_sync(impl.service->ring(), [&] {
    return impl.sealed->begin_epoch(impl.service->context(), std::move(key), key_area_state);
  });
}

Task<Error> Disk::Impl::rekey_group(std::uint64_t begin, std::uint64_t end, const RekeySpec& spec,
                                    RekeyReport& report) {
  const auto group = std::make_shared<Group>(*server, *sealed, spec.verify, begin, end);
  std::vector<QueueContext*> threads{&service->context()};
  if (full_speed(spec)) {
    for (auto& queue : queues) threads.push_back(&queue->context());
  }
  group->expect(static_cast<std::uint32_t>(threads.size()) * kWorkers);
  for (QueueContext* thread : threads) {
    for (std::uint32_t i = 0; i < kWorkers; ++i) Group::work(group, *thread);
  }
  co_await group->ended();
  report.reached = group->reached();
  report.sectors += group->done.sectors;
  report_sectors(group->done.damaged, report.damaged, report.damaged_sectors);
  report_sectors(group->done.unreadable, report.unreadable, report.unreadable_sectors);
  co_return std::move(group->error);
}

// One group, or a step over a part where nothing was ever written. `control` is held.
Task<Error> Disk::Impl::rekey_step(std::uint64_t size, std::uint64_t group, const RekeySpec& spec,
                                   RekeyReport& report) {
  auto next = co_await sealed->next_written(service->context(), report.reached, size);
  if (!next) co_return next.take_error();
  const std::uint64_t begin = std::max(report.reached, align_down(*next, kPiece));
  if (begin > report.reached) {
    report.reached = begin;
    co_return Error();
  }
  co_return co_await rekey_group(begin, std::min(begin + group, size), spec, report);
}

Result<RekeyReport> Disk::rekey(const RekeySpec& spec) {
  Impl& impl = *impl_;
  if (spec.share <= 0 || spec.share > 1) {
    return Error(Kind::invalid_argument, "a share of the time is more than 0 and at most 1");
  }
  std::uint64_t group = full_speed(spec) ? std::uint64_t{1} << 40 : kPiecesOfGroup * kPiece;
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
                             [&] { return impl.rekey_step(size, group, spec, report); });
      if (e) return e;
    }
    const auto go_on = [&] {
      return !spec.progress || spec.progress(std::min(report.reached, size), size);
    };
    const std::uint64_t moved = (report.sectors - before) * kSectorSize;
    if (!rest(spec, Clock::now() - started, moved, go_on)) return report;
  }
}

Error Disk::require_within_size() {
  Impl& impl = *impl_;
  std::lock_guard guard(impl.control);
  if (impl.closed) return impl.closed_error();
  // A writer's was refused at open, and may be changing what is looked at.
  if (impl.sealed == nullptr || !impl.read_only) return {};
  return io::run_sync(impl.service->ring(),
                      [&] { return impl.sealed->require_within_size(impl.service->context()); });
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
