// A disk as its users see it: request queues in front of an image.
//
// Room image/. The Disk owns the file, the queues' threads, the backend and the limits. It checks
// and splits requests, excludes overlapping writes (range locks), reads-modifies-writes what is not
// aligned to the backend, applies the cache mode, counts. It decides nothing about formats.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "crypto/aead.h"
#include "image/backend.h"
#include "image/throttle.h"
#include "io/queue.h"
#include "sealed/backend_api.h"
#include "sealed/keys.h"
#include "storage/file.h"

namespace pqblk::image {

inline constexpr std::uint32_t kMaxQueues = 64;

enum class Format : std::uint8_t { raw, qcow2, sealed };  // said by the opener, never probed
enum class Cache : std::uint8_t { none, writeback, writethrough, unsafe };  // as QEMU means them

// virtio-blk request types and statuses (OASIS virtio 1.2, 5.2.6).
enum class RequestType : std::uint32_t {
  in = 0,
  out = 1,
  flush = 4,
  get_id = 8,
  discard = 11,
  write_zeroes = 13,
};
enum class Status : std::uint8_t { ok = 0, ioerr = 1, unsupp = 2 };

struct Request {
  RequestType type = RequestType::in;
  bool fua = false;              // out, write_zeroes: durable when complete
  std::uint32_t zero_flags = 0;  // write_zeroes: kZeroUnmap
  std::uint64_t offset = 0;      // bytes; any alignment
  std::uint64_t length = 0;      // bytes; in/out: the sum of iov; get_id: at least 20
  const iovec* iov = nullptr;    // the submitter's, unchanged, valid until completion
  std::uint32_t iov_count = 0;
  // Filled before `complete` runs, on the queue's thread, exactly once:
  Status status = Status::ok;
  Error error;  // why, when status is not ok
  void (*complete)(Request&) = nullptr;
  void* context = nullptr;       // the submitter's
  Request* next = nullptr;       // used by the queue while the request waits
  std::uint64_t arrived_ns = 0;  // the queue's
};

// Something to do once at the end of a queue's turn, however many completions ask for it: one
// interrupt, one eventfd write or one wake-up for a whole batch.
struct Deferred {
  void (*run)(Deferred&) = nullptr;
  void* context = nullptr;  // the owner's
  Deferred* next = nullptr;
  bool pending = false;
};

// Asked once in each turn of a queue's thread: where an export finds requests by looking.
struct Poller {
  // True: it found work, or wants the thread to look again at once instead of sleeping.
  bool (*run)(Poller&) = nullptr;
  void* context = nullptr;  // the owner's
  Poller* next = nullptr;
};

struct OpenOptions {
  std::string path;
  Format format = Format::raw;
  bool read_only = false;
  bool to_resize = false;  // sealed: see SealedOptions
  Cache cache = Cache::none;
  bool direct_required = false;  // cache none: refuse instead of going buffered (tmpfs)
  std::uint32_t queues = 1;      // 1 .. kMaxQueues
  io::QueueOptions io;
  // Makes the rings in place of io::make_queue(): measurements put one there that has no kernel
  // below.
  std::function<Result<std::unique_ptr<io::Queue>>(const io::QueueOptions&)> make_ring;
  Limits limits;
  storage::Gate gate;                          // backing files
  std::optional<Format> backing_format;        // when the header does not name it
  bool allow_unauthenticated_backing = false;  // sealed
  std::optional<bool> assume_non_volatile;
  std::optional<sealed::VolumeKeys> keys;  // sealed; moved out
  sealed::Uuid expected_uuid{};            // sealed: the volume the keys belong to
};

struct DiskFacts {
  std::string path, format, engine, fallback_cause, durability_class,
      id;  // id: virtio serial, 20 bytes
  std::uint64_t size = 0;
  std::uint32_t cluster_size = 0, queues = 0;
  bool read_only = false, direct = false;
  std::string suite, aead;  // sealed
  std::uint32_t session_id = 0;
};

// How long requests took, from when their queue saw them to their completion. Bucket i counts those
// of at most 2^(kLatencyFirstBits + i) ns that are in no smaller one; the last one has no bound.
inline constexpr std::size_t kLatencyBuckets = 26;
inline constexpr std::uint32_t kLatencyFirstBits = 10;
struct LatencyStats {
  std::array<std::uint64_t, kLatencyBuckets> buckets{};
  std::uint64_t sum_ns = 0;
};

struct QueueStats {
  std::uint64_t reads = 0, writes = 0, flushes = 0, discards = 0, zeroes = 0;  // that went well
  std::uint64_t errors = 0;
  std::uint64_t read_bytes = 0, written_bytes = 0;
  std::uint64_t in_flight = 0;  // now, those that the limits hold back included
  std::uint64_t throttled = 0;  // had to wait for the limits
  LatencyStats read_latency, write_latency, flush_latency, discard_latency, zero_latency;
};

// A pass over a sealed disk that writes again what is not of the current epoch of the data key.
struct RekeySpec {
  bool verify = false;                 // only count what is of another epoch
  std::uint64_t from = 0;              // bytes: where a pass that was stopped goes on
  std::uint64_t bytes_per_second = 0;  // 0: no limit
  // Share of the time that the pass works, 0 < share <= 1; the rest is the guests' alone.
  double share = 1;
  // Bytes of the disk looked at so far, and in all; false stops the pass at a whole piece.
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress;
};

struct RekeyReport {
  std::uint64_t reached = 0;  // bytes: everything before is done
  std::uint64_t sectors = 0;  // written again; in a verifying pass: found
  std::uint64_t damaged = 0;  // of another epoch, and their tag does not hold: left as they are
  std::vector<std::uint64_t> damaged_sectors;  // the first of them
  std::uint64_t unreadable = 0;                // likewise, and the medium does not give them out
  std::vector<std::uint64_t> unreadable_sectors;
  bool complete = false;  // reached the end
};

class Disk {
 public:
  // Blocking: run it off the main thread. Recovers a sealed disk that was not closed cleanly.
  static Result<std::unique_ptr<Disk>> open(OpenOptions options);
  ~Disk();  // closes, if close() was not called; errors are then lost

  // Any thread. `first` is a list linked by `next`; one wake-up for the whole list. Requests to a
  // closed disk complete with Kind::closed, on the calling thread.
  void submit(std::uint32_t queue, Request* first);
  // Only on that queue's own thread (from a completion, or from a poll hook): no hand-over.
  void start(std::uint32_t queue, Request& request);
  // Only on that queue's own thread. `work` must stay until it ran.
  void defer(std::uint32_t queue, Deferred& work);
  // Only on that queue's own thread, and not from a poller. What was added is removed before
  // close().
  void add_poller(std::uint32_t queue, Poller& poller);
  void remove_poller(std::uint32_t queue, Poller& poller);
  // Runs `fn` on the queue's thread; used by those who drive a queue directly (bench, exports).
  void on_queue(std::uint32_t queue, std::function<void()> fn);
  io::Queue& ring(std::uint32_t queue);

  // Waits for what is in flight, flushes, closes the image cleanly. Blocking, idempotent.
  Error close();
  Error resize(std::uint64_t new_size);                               // grow only; blocking
  Result<Extent> extent(std::uint64_t offset, std::uint64_t length);  // blocking
  // What the range holds from its beginning on, neighbours of one kind joined, at most `max`
  // pieces. Blocking.
  Result<std::vector<Extent>> extents(std::uint64_t offset, std::uint64_t length, std::size_t max);

  // ---- sealed disks: the key area, and rotation of the data key (docs/rotation.md) ----
  // All blocking; requests go on meanwhile, but for a moment in finish_epoch(). Other formats are
  // refused with Kind::unsupported.
  // sealed::replace_key_area() while the disk is in use.
  Error change_key_area(const sealed::KeyAreaChange& change);
  // From its return on everything is written under `key`, which is from the key area of this state
  // (sealed::state_of), both of whose copies hold it. Kind::locked when that was replaced since.
  Error begin_epoch(sealed::DataKey key, const std::vector<std::uint8_t>& key_area_state);
  // A pass from `spec.from` on. One that is stopped returns what it reached.
  Result<RekeyReport> rekey(const RekeySpec& spec);
  // Forgets every other epoch and its sessions; then the key area need not hold them any more.
  // Kind::invalid_argument unless a whole verifying pass has found nothing since begin_epoch().
  Error finish_epoch();
  // Of a disk that is open read-only: Kind::corrupt when an open for writing would be refused,
  // because data lies beyond the size.
  Error require_within_size();

  // Any thread, at any time. invalid_argument, and nothing changes, when they contradict
  // themselves.
  Error set_rate_limits(const RateLimits& limits);
  RateLimits rate_limits() const;
  // Nothing is held back while one of these exists: for whoever waits for requests in flight.
  class Hurry {
   public:
    explicit Hurry(Disk& disk);
    ~Hurry();
    Hurry(const Hurry&) = delete;
    Hurry& operator=(const Hurry&) = delete;

   private:
    Disk& disk_;
  };

  DiskFacts facts() const;
  std::uint64_t size() const;
  QueueStats queue_stats(std::uint32_t queue) const;
  BackendStats backend_stats() const;
  Backend& backend();

 private:
  struct Impl;
  explicit Disk(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace pqblk::image
