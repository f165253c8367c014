// How an image answers guest requests: the one interface between the disk (requests, queues,
// limits) and the three kinds of image (raw, qcow2, sealed).
//
// Room image/. A backend sees byte ranges already checked against the disk's size, aligned to
// `Geometry::request_align`, and excluded from each other by the disk's range locks: no two writes,
// discards or zeroes of overlapping ranges are in a backend at once; reads are not excluded. It may
// be called on any queue's thread, by as many coroutines as requests are in flight.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/task.h"
#include "base/units.h"
#include "io/queue.h"

namespace pqblk::image {

// The memory of one request: the caller's, valid until the request completes. Total size is `size`.
struct GuestBuffers {
  std::span<const iovec> iov;
  std::size_t skip = 0;  // bytes of iov[0] already used by an earlier part of the request
  std::uint64_t size = 0;

  GuestBuffers part(std::uint64_t offset, std::uint64_t length) const;
  // Where this part lies; null when it lies in pieces.
  std::uint8_t* contiguous(std::uint64_t offset, std::uint64_t length) const;
  std::vector<iovec> pieces() const;     // all of it, none empty
  void copy_in(const void* from) const;  // fills all of it
  void copy_out(void* to) const;         // reads all of it
  void zero() const;
};

struct Limits {  // every cache and table of a disk has a bound, bytes
  std::uint64_t l2_cache = 32 * kMiB;
  std::uint64_t entry_cache = 64 * kMiB;
  std::uint64_t pending_data = 28 * kMiB;  // sealed: ciphertext kept in memory until written home

  static constexpr std::uint64_t kMax = 64 * kGiB;  // of each; tables grow with it
  Error check() const;                              // invalid_argument: more than that
};

inline constexpr std::size_t kArenaBytes = 1 * kMiB;       // of each queue
inline constexpr std::size_t kArenaBufferMax = 64 * kKiB;  // larger buffers never come from it
inline constexpr std::size_t kPooledBufferMax =
    1 * kMiB;  // larger ones go back to the heap at once
inline constexpr std::size_t kPooledBytesKept = 32 * kMiB;  // heap buffers kept, of each queue

// What a queue gives to a backend's coroutines: its ring and aligned private memory.
class QueueContext {
 public:
  QueueContext(io::Queue& ring, std::uint32_t number) : io(ring), index(number) {}
  io::Queue& io;
  const std::uint32_t index;  // 0 .. queues-1; the service queue has the last one

  // An aligned buffer (4096) of at least `size` bytes from this queue's pool; returned when the
  // handle dies, on this queue's thread. Small sizes come from a registered arena.
  class Buffer {
   public:
    Buffer() = default;
    Buffer(QueueContext* owner, std::uint8_t* data, std::size_t size)
        : owner_(owner), data_(data), size_(size) {}
    Buffer(Buffer&& o) noexcept { swap(o); }
    Buffer& operator=(Buffer&& o) noexcept {
      swap(o);
      return *this;
    }
    ~Buffer() {
      if (owner_ != nullptr) owner_->release(data_, size_);
    }
    std::uint8_t* data() const { return data_; }
    std::size_t size() const { return size_; }

   private:
    void swap(Buffer& o) noexcept {
      std::swap(owner_, o.owner_);
      std::swap(data_, o.data_);
      std::swap(size_, o.size_);
    }
    QueueContext* owner_ = nullptr;
    std::uint8_t* data_ = nullptr;
    std::size_t size_ = 0;
  };
  Buffer buffer(std::size_t size);

  ~QueueContext();
  QueueContext(const QueueContext&) = delete;
  QueueContext& operator=(const QueueContext&) = delete;

  // The memory from which sizes up to kArenaBufferMax come while it lasts. The disk registers it
  // with the ring, on the queue's thread; empty before the first call.
  std::span<std::uint8_t> arena();

 private:
  static constexpr std::size_t kClasses = 9;  // powers of two, from 4 KiB to 1 MiB
  struct FreeBuffer {
    FreeBuffer* next;
  };
  struct FreeList {
    FreeBuffer* head = nullptr;
  };
  void release(std::uint8_t* data, std::size_t size);
  bool in_arena(const std::uint8_t* data) const {
    return data >= arena_ && data < arena_ + kArenaBytes;
  }
  std::uint8_t* arena_ = nullptr;
  std::size_t arena_used_ = 0;
  std::size_t kept_ = 0;  // bytes of free_ that are not the arena's
  FreeList free_[kClasses];
};

struct Geometry {
  std::uint64_t size = 0;  // bytes the guest sees, a multiple of 512
  // The backend takes offsets and lengths that are multiples of it. When the size is not, the last
  // request may reach up to the next multiple.
  std::uint32_t request_align = 512;
  // Guest memory (addresses and lengths of all iovecs) has this alignment, bytes, or the disk moves
  // the request through an aligned buffer of its own. O_DIRECT files: File::memory_align.
  std::uint32_t memory_align = 1;
  std::uint32_t cluster_size = 0;  // 0: raw
  // The disk splits larger reads and writes, bytes. Discards and zeroes come in parts of up to
  // kMaxZeroBytes whatever this says.
  std::uint64_t max_transfer = 0;
};

inline constexpr std::uint64_t kMaxZeroBytes = 1 * kGiB;

enum class ExtentKind : std::uint8_t {
  data,
  zero,
  hole
};  // hole: reads as zeros, nothing allocated
struct Extent {
  std::uint64_t length = 0;  // bytes from the offset asked
  ExtentKind kind = ExtentKind::data;
};

struct BackendStats {  // counters since open
  std::uint64_t metadata_reads = 0, metadata_writes = 0, l2_hits = 0, l2_misses = 0;
  std::uint64_t entry_hits = 0, entry_misses = 0;  // sealed
  std::uint64_t log_bytes = 0, log_capacity = 0, log_used = 0, checkpoints = 0;
  std::uint64_t integrity_failures = 0, sectors_sealed = 0, sectors_opened = 0;
};

// What the disk tells of a backend besides its geometry.
struct BackendFacts {
  std::string suite, aead;       // sealed: the cipher suite and the implementation that runs it
  std::uint32_t session_id = 0;  // sealed: of this opener; 0 when it has none
  std::string id;  // serial of the volume, up to 20 characters; empty: none of its own
};

enum ZeroFlags : std::uint32_t { kZeroUnmap = 1 };  // virtio VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP

class Backend {
 public:
  virtual ~Backend() = default;
  virtual Geometry geometry() const = 0;
  virtual std::string_view format() const = 0;  // "raw", "qcow2", "sealed"

  virtual Task<Error> read(QueueContext& q, GuestOffset at, GuestBuffers data) = 0;
  // `fua`: on return the data would survive power loss.
  virtual Task<Error> write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) = 0;
  // What had completed before the call survives power loss once it returns ok.
  virtual Task<Error> flush(QueueContext& q) = 0;
  virtual Task<Error> discard(QueueContext& q, GuestOffset at, std::uint64_t length) = 0;
  virtual Task<Error> write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                                   std::uint32_t flags) = 0;
  virtual Task<Result<Extent>> extent(QueueContext& q, GuestOffset at, std::uint64_t length) = 0;
  virtual Task<Error> resize(QueueContext& q, std::uint64_t new_size) = 0;  // grow; quiesced
  // Flushes, writes everything home, marks the image clean, gives back what it reserved. Quiesced.
  virtual Task<Error> close(QueueContext& q) = 0;
  virtual BackendStats stats() const = 0;
  virtual BackendFacts facts() const { return {}; }
};

}  // namespace pqblk::image
