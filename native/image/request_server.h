// What a guest request means: checks, splitting, range locks, read-modify-write, cache mode.
//
// Room image/: turns requests of any alignment and size into calls of a Backend that keep its
// contract (backend.h). It owns no thread and no file.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>

#include "image/backend.h"
#include "image/disk.h"
#include "image/range_lock.h"
#include "image/request_queue.h"
#include "image/sealed_backend.h"

namespace pqblk::image {

inline constexpr std::uint32_t kPiecesAtOnce = 8;          // of one split request
inline constexpr std::uint64_t kBouncePiece = 512 * kKiB;  // a misaligned request is cut at this
inline constexpr std::uint64_t kTransferMax = 4 * kMiB;    // when a backend names no limit
inline constexpr std::size_t kIdBytes = 20;                // virtio-blk GET_ID

class RequestServer final : public RequestHandler {
 public:
  struct Settings {
    bool read_only = false;
    Cache cache = Cache::writeback;
    std::string id;  // up to kIdBytes characters
  };
  RequestServer(Backend& backend, Settings settings);

  void serve(RequestQueue& queue, Request& request) override;
  // Sealed: SealedBackend::rekey() with other writers kept out of the range.
  Task<Error> rekey(QueueContext& q, std::uint64_t offset, std::uint64_t length,
                    SealedBackend& sealed, SealedBackend::Rekeyed& out);
  std::uint64_t size() const { return size_.load(std::memory_order_relaxed); }
  void set_size(std::uint64_t bytes) { size_.store(bytes, std::memory_order_relaxed); }

 private:
  // A part of a request that a single pass of the backend (or of the bounce buffer) can do.
  struct Piece {
    std::uint64_t offset = 0, length = 0;
    GuestBuffers data;  // empty iov: zeros (write only)
    bool fua = false;
    bool bounce = false;  // through an aligned buffer: offset, length or memory are not aligned
  };
  struct Split;

  detail::Detached run(RequestQueue& queue, Request& request);
  Error check(const Request& request) const;
  bool needs_bounce(const Request& request) const;
  Task<Error> transfer_split(RequestQueue& queue, const Request& request, bool bounce);
  detail::Detached split_worker(Split& split);
  Task<Error> read_piece(QueueContext& q, Piece piece);
  Task<Error> write_piece(QueueContext& q, Piece piece);
  Task<Error> rewrite(QueueContext& q, const Piece& piece, std::uint64_t begin, std::uint64_t end);
  Task<Error> discard(QueueContext& q, const Request& request);
  Task<Error> write_zeroes(QueueContext& q, const Request& request);
  Task<Error> zero_whole_blocks(QueueContext& q, std::uint64_t begin, std::uint64_t end,
                                std::uint32_t flags);
  Task<Error> flush(QueueContext& q);
  void get_id(const Request& request) const;
  bool fua_of(const Request& request) const {
    return settings_.cache == Cache::writethrough ||
           (request.fua && settings_.cache != Cache::unsafe);
  }
  Error write_failure() const;

  Backend& backend_;
  const Settings settings_;
  const std::uint64_t align_;  // Geometry::request_align
  const std::uint64_t memory_align_;
  const std::uint64_t transfer_max_;  // a multiple of align_
  std::atomic<std::uint64_t> size_;
  RangeLocks locks_;
  // A failed flush means that acknowledged data may be gone; nothing is written after it.
  std::atomic<bool> failed_{false};
  mutable std::mutex failure_lock_;
  Error failure_;
};

}  // namespace pqblk::image
