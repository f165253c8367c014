// The metadata of one open QCOW2 image: header, tables, refcounts, allocator, and the order in
// which they reach the medium.
//
// Room format/qcow2: never moves guest data and knows nothing of keys. A plain image uses flush();
// a sealed one switches the allocator to reserve mode and orders its writes itself.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/sync.h"
#include "base/task.h"
#include "format/qcow2/allocator.h"
#include "format/qcow2/header.h"
#include "format/qcow2/meta_io.h"
#include "format/qcow2/readers.h"
#include "format/qcow2/refcounts.h"
#include "format/qcow2/snapshots.h"
#include "format/qcow2/tables.h"

namespace pqblk::format::qcow2 {

inline constexpr std::uint64_t kL2CacheBytesDefault = 32 * kMiB;
inline constexpr std::uint64_t kRefcountCacheBytes = 4 * kMiB;

struct OpenOptions {
  bool read_only = false;
  std::uint64_t l2_cache_bytes = kL2CacheBytesDefault;
  bool allow_sealed = false;  // only the sealed room says so
  // For check and repair: dirty and corrupt images open for writing too, nothing is cleared.
  bool for_check = false;
};

class Metadata {
 public:
  // `file` outlives the result. A writable open clears autoclear bits it does not maintain; a dirty
  // image (lazy refcounts) opens for writing only after repair (needs_recovery tells so), a corrupt
  // one only with for_check (Kind::corrupt).
  static Task<Result<std::unique_ptr<Metadata>>> open(io::Queue& q, const io::File& file,
                                                      OpenOptions options);

  Header& header() { return header_; }
  const Layout& layout() const { return header_.layout; }
  MetaIo& io() { return meta_; }
  Tables& tables() { return tables_; }
  Refcounts& refcounts() { return refcounts_; }
  Allocator& allocator() { return allocator_; }
  Readers& readers() { return readers_; }
  const std::vector<Snapshot>& snapshots() const { return snapshots_; }
  std::uint64_t snapshot_table_bytes() const { return snapshot_table_bytes_; }
  bool read_only() const { return options_.read_only; }

  // A sealed disk's log, key area, session table: their clusters are then refused to every
  // metadata write, and check counts them as referenced. Lengths in bytes, cluster-aligned.
  void add_region(HostOffset at, std::uint64_t length, std::string name);
  void remove_region(HostOffset at);

  // The bytes that header() was parsed from, as they were read or last written. Who authenticates
  // the header must look at these and never read the file again: it may have changed since.
  std::span<const std::uint8_t> first_bytes() const {
    return header_cluster_.span().first(kAtomicHeaderBytes);
  }
  // Called on the first kAtomicHeaderBytes of every header about to be written, to authenticate
  // them (a sealed disk's MAC lies in its extension).
  std::function<void(std::span<std::uint8_t> first_bytes)> seal_header;
  // A plain open does this by itself; a sealed one after its header is authenticated.
  Task<Error> clear_autoclear(io::Queue& q);
  // Writes the first piece of the header cluster (header and first extension) in one atomic write;
  // no sync. The rest of the cluster must not have changed.
  Task<Error> write_header_fields(io::Queue& q);
  // Writes the whole header cluster and syncs: tail first, so that the first piece comes last.
  Task<Error> write_header(io::Queue& q);
  Task<Error> mark_corrupt(io::Queue& q);  // sets the corrupt bit (version 3), synced

  // Plain images. When it returns ok, everything that completed before the call is durable:
  // data and refcounts, sync, refcount table (if changed), sync, L2 and L1, sync. Callers that come
  // while one runs share the next.
  Task<Error> flush(io::Queue& q);
  // False after a failed sync: nothing that follows can be trusted to be durable.
  bool writable() const { return !broken_flag_.load(std::memory_order_acquire); }
  // Writers call relieve(), outside of locks, when too much metadata is dirty.
  bool crowded() const { return tables_.dirty_slices() > kDirtySlicesMax || refcounts_.crowded(); }
  Task<Error> relieve(io::Queue& q);
  // At the end: flush, and lower everything freed. Quiesced.
  Task<Error> close(io::Queue& q);
  bool punch_freed = true;  // give freed clusters back to the file system

  // Grows the virtual disk; `slots` (0: one for each guest cluster) sizes L1. L1 moves if it has
  // to: new table, sync, header, sync, old freed. Quiesced, flushed. Only growth.
  Task<Error> grow(io::Queue& q, std::uint64_t new_size, std::uint64_t slots = 0);

 private:
  Metadata(const io::File& file, Header header, OpenOptions options);
  Task<Error> load(io::Queue& q);
  Task<Error> flush_once(io::Queue& q);
  Task<Error> reclaim(io::Queue& q);
  Task<Error> read_header_cluster(io::Queue& q);
  Task<Error> write_first_piece(io::Queue& q);
  Error check_openable() const;
  Error sync_failed(Error error);

  const OpenOptions options_;
  Header header_;
  MetaIo meta_;
  Refcounts refcounts_;
  Allocator allocator_;
  Tables tables_;
  Readers readers_;
  std::vector<Snapshot> snapshots_;
  std::uint64_t snapshot_table_bytes_ = 0;

  AsyncMutex flush_lock_;
  AsyncMutex header_lock_;
  std::atomic<std::uint64_t> flush_asked_{0};  // tickets
  std::uint64_t flush_done_ = 0;               // every ticket up to here is durable; flush_lock_
  Error broken_;                               // a failed sync: writing stops; flush_lock_
  std::atomic<bool> broken_flag_{false};
  AlignedBuffer header_cluster_;  // as on the medium; header_lock_
  std::vector<HostRun> flushed_;  // unmapped durably, readers not yet drained
  std::vector<HostRun> draining_;
};

}  // namespace pqblk::format::qcow2
