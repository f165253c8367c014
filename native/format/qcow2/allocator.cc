#include "format/qcow2/allocator.h"

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <iterator>
#include <utility>

#include "base/aligned.h"

namespace pqblk::format::qcow2 {

Task<Result<HostRun>> Allocator::take(io::Queue& q, std::uint64_t clusters, bool contiguous) {
  assert(clusters != 0);
  if (!reserve_mode_) {
    Result<HostRun> run = co_await refcounts_.take(q, clusters, contiguous);
    co_return run;
  }
  for (;;) {
    HostRun run;
    if (pool_take(clusters, contiguous, run)) co_return run;
    Error error = co_await reserve(q, contiguous ? clusters : 1);
    if (error) co_return error;
  }
}

Task<Error> Allocator::give_back(io::Queue& q, HostRun run) {
  if (reserve_mode_) {
    pool_add(run.at, run.clusters);
    co_return Error();
  }
  Error error = co_await refcounts_.add(q, run.at, run.clusters, -1);
  co_return error;
}

Task<Error> Allocator::reserve(io::Queue& q, std::uint64_t clusters) {
  assert(reserve_mode_ && clusters != 0);
  AsyncMutex::Guard guard = co_await reserve_lock_.lock();
  // What holes the file has first; a long request is then served in one piece. When there is no
  // room for a batch there may be some for what is asked.
  bool contiguous = false, scarce = false;
  while (!pool_has(clusters)) {
    const std::uint64_t batch = next_batch();
    const std::uint64_t want = contiguous || scarce ? clusters : std::max(clusters, batch);
    bool more = true;
    Error error = co_await reserve_runs(q, want, contiguous, more);
    if (error && want <= clusters) co_return error;
    contiguous = contiguous || (!error && clusters > 1);
    scarce = scarce || error || !more;
  }
  may_reserve_ahead(!scarce);
  co_return Error();
}

Task<Error> Allocator::reserve_ahead(io::Queue& q) {
  assert(reserve_mode_);
  AsyncMutex::Guard guard = co_await reserve_lock_.lock();
  if (!low()) co_return Error();
  bool more = true;
  Error error = co_await reserve_runs(q, next_batch(), false, more);
  if (error || !more) may_reserve_ahead(false);
  co_return error;
}

// A run that the file has room for; its count is raised in memory only.
Task<Result<HostRun>> Allocator::take_run(io::Queue& q, std::uint64_t clusters, bool contiguous) {
  Result<HostRun> run = co_await refcounts_.take(q, clusters, contiguous);
  if (!run) co_return run;
  if (Error error = co_await claim_space(q, *run)) {
    first_batch();
    co_await unclaim(q, *run);
    co_return error;
  }
  co_return run;
}

// Up to `clusters` in the pool, durable: one run where that is asked for, else as many as it takes,
// with one sync for all of them. What was found before a failure is no failure, but no `more`.
Task<Error> Allocator::reserve_runs(io::Queue& q, std::uint64_t clusters, bool contiguous,
                                    bool& more) {
  const std::size_t most = contiguous ? 1 : kReserveRunsMax;
  std::vector<HostRun> runs;
  for (std::uint64_t found = 0; found < clusters && runs.size() < most;) {
    Result<HostRun> run = co_await take_run(q, clusters - found, contiguous);
    if (!run && runs.empty()) co_return run.take_error();
    if (!run) {
      more = false;
      break;
    }
    found += run->clusters;
    runs.push_back(*run);
  }
  Error error = co_await refcounts_.make_durable(q);
  if (error) co_return error;  // the clusters are leaked at worst
  for (const HostRun& run : runs) {
    if (pool_meets(run.at, run.clusters)) {
      co_return Error(Kind::corrupt, "the refcount of a cluster in use was 0")
          .at("reserve clusters", run.at.bytes);
    }
    pool_add(run.at, run.clusters);
  }
  co_return Error();
}

// As if never taken: no count was written, and what the file system gave it takes back. A failure
// only leaks.
Task<void> Allocator::unclaim(io::Queue& q, const HostRun& run) {
  const std::uint64_t length = run.clusters * refcounts_.layout().cluster_size();
  Error kept = co_await q.fallocate(meta_.file(), io::FallocateMode::punch, run.at.bytes, length);
  static_cast<void>(kept.ok());
  Error leaked = co_await refcounts_.add(q, run.at, run.clusters, -1);
  static_cast<void>(leaked.ok());
}

// A full disk shows here, before anything refers to the clusters, and not in the middle of a write.
Task<Error> Allocator::claim_space(io::Queue& q, const HostRun& run) {
  const io::File& file = meta_.file();
  if (file.block_device) co_return Error();
  const std::uint64_t length = run.clusters * refcounts_.layout().cluster_size();
  Error error = co_await q.fallocate(file, io::FallocateMode::allocate, run.at.bytes, length);
  if (!error || error.os_errno() != EOPNOTSUPP) co_return error;
  // The file must be as long as what is given out: an entry may name a cluster whose data was lost
  // in a crash.
  AlignedBuffer last(std::min<std::uint64_t>(length, kBufferAlign));
  const std::uint64_t at = run.at.bytes + length - last.size();
  error = co_await q.write(file, at, last.data(), last.size());
  co_return error;
}

bool Allocator::try_take(std::uint64_t clusters, HostOffset& out) {
  HostRun run;
  if (!pool_take(clusters, true, run)) return false;
  out = run.at;
  return true;
}

bool Allocator::pool_has(std::uint64_t clusters) const {
  std::lock_guard guard(mutex_);
  return std::any_of(pool_.begin(), pool_.end(),
                     [clusters](const auto& run) { return run.second >= clusters; });
}

bool Allocator::pool_take(std::uint64_t clusters, bool contiguous, HostRun& out) {
  const std::uint64_t cluster_size = refcounts_.layout().cluster_size();
  std::lock_guard guard(mutex_);
  for (auto run = pool_.begin(); run != pool_.end(); ++run) {
    if (contiguous && run->second < clusters) continue;
    const std::uint64_t n = std::min(clusters, run->second);
    out = {{run->first}, n, false};
    const std::uint64_t rest = run->second - n;
    const auto next = pool_.erase(run);
    if (rest != 0) pool_.emplace_hint(next, out.at.bytes + n * cluster_size, rest);
    pooled_ -= n;
    return true;
  }
  return false;
}

void Allocator::pool_add(HostOffset at, std::uint64_t clusters) {
  const std::uint64_t cluster_size = refcounts_.layout().cluster_size();
  std::lock_guard guard(mutex_);
  pooled_ += clusters;
  std::uint64_t first = at.bytes;
  auto next = pool_.lower_bound(first);
  if (next != pool_.begin()) {
    const auto before = std::prev(next);
    const std::uint64_t end = before->first + before->second * cluster_size;
    assert(end <= first);  // no cluster comes back twice
    if (end == first) {
      first = before->first;
      clusters += before->second;
      pool_.erase(before);
    }
  }
  if (next != pool_.end()) {
    assert(first + clusters * cluster_size <= next->first);
    if (first + clusters * cluster_size == next->first) {
      clusters += next->second;
      next = pool_.erase(next);
    }
  }
  pool_.emplace_hint(next, first, clusters);
}

bool Allocator::pool_meets(HostOffset at, std::uint64_t clusters) const {
  const std::uint64_t cluster_size = refcounts_.layout().cluster_size();
  std::lock_guard guard(mutex_);
  auto run = pool_.lower_bound(at.bytes + clusters * cluster_size);  // the last that begins before
  if (run == pool_.begin()) return false;
  --run;
  return at.bytes < run->first + run->second * cluster_size;
}

bool Allocator::recycle(HostOffset cluster) {
  assert(reserve_mode_);
  if (pool_meets(cluster, 1)) return false;
  pool_add(cluster, 1);
  return true;
}

bool Allocator::low() const {
  std::lock_guard guard(mutex_);
  return ahead_ && pooled_ < last_batch_ / 2;
}

void Allocator::may_reserve_ahead(bool may) {
  std::lock_guard guard(mutex_);
  ahead_ = may;
}

std::uint64_t Allocator::next_batch() {
  std::lock_guard guard(mutex_);
  last_batch_ = std::exchange(batch_, std::min(batch_ * 4, kReserveBatchMax));
  return last_batch_;
}

void Allocator::first_batch() {
  std::lock_guard guard(mutex_);
  batch_ = kReserveBatchMin;
}

std::uint64_t Allocator::pooled() const {
  std::lock_guard guard(mutex_);
  return pooled_;
}

Task<Error> Allocator::free(io::Queue& q, std::span<const HostOffset> clusters) {
  for (const HostOffset cluster : clusters) {
    Error error = co_await refcounts_.add(q, cluster, 1, -1);
    if (error) co_return error;
  }
  // Not beside a reserve(): the table entries held back here must be there for its sync.
  AsyncMutex::Guard guard = co_await reserve_lock_.lock();
  Refcounts::TableStage stage;
  Error error = co_await refcounts_.write_blocks(q, stage);
  refcounts_.restore(stage);  // without a sync, no table entry goes home
  co_return error;
}

Task<Error> Allocator::release_pool(io::Queue& q) {
  AsyncMutex::Guard guard = co_await reserve_lock_.lock();
  for (;;) {
    HostRun run;
    if (!pool_take(~std::uint64_t{0}, false, run)) break;
    // Nothing refers to them, and nothing will before the next opener: the file system gets them
    // back. One that cannot punch holes keeps the space; nothing is lost by that.
    const std::uint64_t length = run.clusters * refcounts_.layout().cluster_size();
    Error kept = co_await q.fallocate(meta_.file(), io::FallocateMode::punch, run.at.bytes, length);
    static_cast<void>(kept.ok());
    Error error = co_await refcounts_.add(q, run.at, run.clusters, -1);
    if (error) co_return error;
  }
  first_batch();
  Error error = co_await refcounts_.make_durable(q);
  co_return error;
}

void Allocator::free_later(HostOffset first, std::uint64_t clusters) {
  assert(!reserve_mode_);
  const std::uint64_t cluster_size = refcounts_.layout().cluster_size();
  std::lock_guard guard(mutex_);
  if (!pending_.empty()) {
    HostRun& last = pending_.back();
    if (last.at.bytes + last.clusters * cluster_size == first.bytes) {
      last.clusters += clusters;
      return;
    }
  }
  pending_.push_back({first, clusters, false});
}

std::vector<HostRun> Allocator::take_pending() {
  std::lock_guard guard(mutex_);
  return std::exchange(pending_, {});
}

void Allocator::put_pending(std::vector<HostRun> runs) {
  std::lock_guard guard(mutex_);
  pending_.insert(pending_.end(), runs.begin(), runs.end());
}

Task<Error> Allocator::free_now(io::Queue& q, std::span<const HostRun> runs, bool punch) {
  const Layout& layout = refcounts_.layout();
  for (const HostRun& run : runs) {
    for (std::uint64_t done = 0; done < run.clusters;) {
      const HostOffset at = run.at + (done << layout.cluster_bits);
      std::uint64_t n = run.clusters - done;
      if (punch) {
        std::uint64_t count = 0;
        Error error = co_await refcounts_.get_run(q, at, run.clusters - done, n, count);
        if (error) co_return error;
        // Only clusters that nobody else refers to may lose their content. A file system that
        // cannot punch holes keeps the space; nothing is lost by that.
        if (count == 1) {
          Error ignored = co_await q.fallocate(meta_.file(), io::FallocateMode::punch, at.bytes,
                                               n << layout.cluster_bits);
          static_cast<void>(ignored.ok());
        }
      }
      Error error = co_await refcounts_.add(q, at, n, -1);
      if (error) co_return error;
      done += n;
    }
  }
  co_return Error();
}

}  // namespace pqblk::format::qcow2
