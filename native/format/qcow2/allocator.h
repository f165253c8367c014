// Host clusters: handing them out and taking them back.
//
// Room format/qcow2. Two modes:
//   plain    take() raises in memory; Metadata::flush writes refcounts before the L2 entries that
//            need them. free_later() clusters come back once the L2 change is durable and requests
//            that may still use the old mapping are done (readers.h).
//   reserve  (sealed) reserve() raises refcounts in synced batches ahead of use into a pool, and
//            take()/try_take() hand out of the pool: a crash can only leak. recycle() puts a
//            cluster back without touching refcounts.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/sync.h"
#include "base/task.h"
#include "base/units.h"
#include "format/qcow2/meta_io.h"
#include "format/qcow2/refcounts.h"

namespace pqblk::format::qcow2 {

inline constexpr std::uint64_t kReserveBatchMin = 16;    // clusters
inline constexpr std::uint64_t kReserveBatchMax = 1024;  // clusters
inline constexpr std::size_t kReserveRunsMax = 32;       // of a batch, in a file with holes

class Allocator {
 public:
  Allocator(MetaIo& meta, Refcounts& refcounts) : meta_(meta), refcounts_(refcounts) {}

  void use_reserve_mode() { reserve_mode_ = true; }  // before the first take
  bool reserve_mode() const { return reserve_mode_; }

  // `contiguous`: one run of exactly `clusters`; else the run may be shorter. In reserve mode the
  // clusters come out of the pool, which is filled first when needed (I/O and syncs).
  // Errors: no_space, corrupt (a cluster with count zero that holds metadata), I/O.
  Task<Result<HostRun>> take(io::Queue& q, std::uint64_t clusters, bool contiguous = true);
  // A cluster from take() that nothing ever referred to.
  Task<Error> give_back(io::Queue& q, HostRun run);

  // ---- reserve mode ----
  // The pool can then serve runs of up to `clusters` contiguous clusters by try_take.
  Task<Error> reserve(io::Queue& q, std::uint64_t clusters);
  bool try_take(std::uint64_t clusters, HostOffset& out);  // contiguous, any thread, no I/O
  // Any thread, no I/O. False, and nothing done, when it is in the pool already: the tables name
  // one cluster twice.
  [[nodiscard]] bool recycle(HostOffset cluster);
  // So few are left in the pool that reserve_ahead() should run, beside those who take from it.
  bool low() const;
  // Another batch in the pool, before anyone has to wait for it. Where there is no room for it
  // (Kind::no_space) low() is false until reserve() finds some again.
  Task<Error> reserve_ahead(io::Queue& q);
  std::uint64_t pooled() const;
  // Lowers the counts of clusters that nothing durable refers to and writes the blocks, no sync.
  Task<Error> free(io::Queue& q, std::span<const HostOffset> clusters);
  // At close: what is unused goes back to the file system and is lowered, written and synced.
  Task<Error> release_pool(io::Queue& q);

  // ---- plain mode: frees that wait for the L2 flush; driven by Metadata ----
  // The caller has already set the entry that no longer refers to these clusters.
  void free_later(HostOffset first, std::uint64_t clusters);
  std::vector<HostRun> take_pending();          // what was freed so far
  void put_pending(std::vector<HostRun> runs);  // a flush failed: wait again
  Task<Error> free_now(io::Queue& q, std::span<const HostRun> runs, bool punch);

 private:
  bool pool_take(std::uint64_t clusters, bool contiguous, HostRun& out);
  bool pool_has(std::uint64_t clusters) const;
  void pool_add(HostOffset at, std::uint64_t clusters);
  bool pool_meets(HostOffset at, std::uint64_t clusters) const;
  std::uint64_t next_batch();
  void first_batch();
  void may_reserve_ahead(bool may);
  Task<Result<HostRun>> take_run(io::Queue& q, std::uint64_t clusters, bool contiguous);
  Task<Error> reserve_runs(io::Queue& q, std::uint64_t clusters, bool contiguous, bool& more);
  Task<Error> claim_space(io::Queue& q, const HostRun& run);
  Task<void> unclaim(io::Queue& q, const HostRun& run);

  MetaIo& meta_;
  Refcounts& refcounts_;
  bool reserve_mode_ = false;
  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::uint64_t> pool_;  // first byte -> clusters, never adjacent
  std::uint64_t pooled_ = 0;
  std::uint64_t batch_ = kReserveBatchMin;  // the next one
  std::uint64_t last_batch_ = 0;
  bool ahead_ = false;  // there was room for a batch, and may be for another
  AsyncMutex reserve_lock_;
  std::vector<HostRun> pending_;
};

}  // namespace pqblk::format::qcow2
