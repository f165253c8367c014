// The QCOW2 backend's class; private to image/qcow2_*.cc.
//
// Room image/. Three paths:
//   cached   qcow2_image.cc: a run of clusters whose entries are in memory: one transfer, no lock
//   allocate qcow2_write.cc: new clusters and copy-on-write, under a lock on those clusters
//   zero     qcow2_zero.cc: discard and write-zeroes
// The disk's range locks keep overlapping writes, discards and zeroes apart; two writes to
// different parts of one cluster meet here, in cluster_locks_.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "format/qcow2/metadata.h"
#include "image/backend.h"
#include "image/range_lock.h"

namespace pqblk::image {

namespace qcow2 = format::qcow2;

class Qcow2Image final : public Backend {
 public:
  // `grown` replaces `file` when a repair at open changed its size.
  Qcow2Image(const io::File& file, std::unique_ptr<qcow2::Metadata> metadata,
             std::unique_ptr<io::File> grown, std::unique_ptr<Backend> backing);

  Geometry geometry() const override;
  std::string_view format() const override { return "qcow2"; }
  Task<Error> read(QueueContext& q, GuestOffset at, GuestBuffers data) override;
  Task<Error> write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) override;
  Task<Error> flush(QueueContext& q) override;
  Task<Error> discard(QueueContext& q, GuestOffset at, std::uint64_t length) override;
  Task<Error> write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                           std::uint32_t flags) override;
  Task<Result<Extent>> extent(QueueContext& q, GuestOffset at, std::uint64_t length) override;
  Task<Error> resize(QueueContext& q, std::uint64_t new_size) override;
  Task<Error> close(QueueContext& q) override;
  BackendStats stats() const override;

 private:
  // Where a guest range that is handled in one piece lies.
  enum class Source : std::uint8_t {
    data,        // host, may be transferred in place
    zero,        // reads zeros
    backing,     // reads from the backing image
    compressed,  // host, compressed_bytes; one cluster
    allocate,    // writes only: needs a new cluster, or a change of its entry
  };
  enum class Purpose : std::uint8_t { read, overwrite };
  struct Run {
    Source source = Source::zero;
    std::uint64_t length = 0;
    HostOffset host;
    std::uint32_t compressed_bytes = 0;
  };
  enum class ZeroMode : std::uint8_t { discard, unmap, keep };

  // qcow2_image.cc
  Run classify(const qcow2::L2Entry& entry, std::uint64_t in_cluster, Purpose purpose) const;
  bool cached_run(std::uint64_t offset, std::uint64_t length, Purpose purpose, Run& run);
  std::uint8_t* single_run(const QueueContext& q, std::uint64_t offset, const GuestBuffers& data,
                           Purpose purpose, HostOffset& host);
  Task<Error> load_run(QueueContext& q, std::uint64_t offset, std::uint64_t length, Purpose purpose,
                       Run& run);
  Task<Error> read_unlocked(QueueContext& q, std::uint64_t offset, GuestBuffers data);
  Task<Error> write_unlocked(QueueContext& q, std::uint64_t offset, GuestBuffers data);
  Task<Error> read_compressed(QueueContext& q, const Run& run, std::uint64_t offset,
                              GuestBuffers data);
  Task<Error> transfer(QueueContext& q, bool reads, HostOffset host, GuestBuffers data);
  Task<Error> load_entries(QueueContext& q, std::uint64_t first, std::uint64_t end,
                           std::vector<qcow2::L2Entry>& out);
  Task<Error> corrupt_found(QueueContext& q, Error error);
  Error check_writable() const;

  // qcow2_write.cc
  struct Allocation;
  Task<Error> write_allocating(QueueContext& q, std::uint64_t offset, GuestBuffers data,
                               std::uint64_t& written);
  void plan(Allocation& a) const;
  void plan_fill(Allocation& a) const;
  Task<Error> read_old(QueueContext& q, std::uint64_t offset, iovec& into);
  Task<Error> write_filled(QueueContext& q, const Allocation& a, GuestBuffers data);
  Task<Error> commit(QueueContext& q, const Allocation& a);
  void free_old(const qcow2::L2Entry& entry);

  // qcow2_zero.cc
  Task<Error> zero_clusters(QueueContext& q, std::uint64_t first, std::uint64_t end, ZeroMode mode);
  bool zero_update(const qcow2::L2Entry& entry, ZeroMode mode, qcow2::SlotUpdate& update,
                   bool& frees) const;
  Task<Error> zero_part(QueueContext& q, std::uint64_t offset, std::uint64_t length);
  Task<Error> zero_subclusters(QueueContext& q, std::uint64_t offset, std::uint64_t length,
                               bool& done);

  std::uint64_t cluster_of(std::uint64_t offset) const { return offset >> layout_.cluster_bits; }
  std::uint64_t in_cluster(std::uint64_t offset) const {
    return offset & (layout_.cluster_size() - 1);
  }
  bool reads_zero(const qcow2::L2Entry& entry) const;

  const std::unique_ptr<io::File> grown_;
  const io::File& file_;
  const std::unique_ptr<qcow2::Metadata> metadata_;
  const std::unique_ptr<Backend> backing_;
  qcow2::Tables& tables_;
  const qcow2::Layout layout_;
  const std::uint32_t version_;
  std::atomic<std::uint64_t> size_;
  RangeLocks cluster_locks_;
};

}  // namespace pqblk::image
