// A virtqueue from the device's side: takes chains of buffers, checks them, gives them back.
//
// Room export/: knows the split and the packed ring (OASIS virtio 1.2, 2.7 and 2.8) and the
// in-flight region of vhost-user, nothing of requests. Everything in guest memory is hostile: a
// field is read once, checked, and used from the copy. One thread uses a queue: that of the
// engine's queue.
//
// Two kinds of trouble are told apart. A chain that cannot be a request (memory that is not there,
// a bad indirect table, readable after writable) has a `fault` and goes back to the driver as any
// other. A ring that contradicts itself (an index beyond it, a loop) is `broken`, for good.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/error.h"
#include "export/virtqueue_inflight.h"
#include "export/virtqueue_memory.h"

namespace pqblk::exports {

inline constexpr std::uint32_t kRingSizeMax = 1024;  // descriptors of a ring
inline constexpr std::size_t kSegmentsMax = 1024;    // pieces of memory of one chain

// Feature bits of virtio's rings (virtio 1.2, 6).
inline constexpr std::uint64_t kFeatureIndirect = std::uint64_t{1} << 28;
inline constexpr std::uint64_t kFeatureEventIdx = std::uint64_t{1} << 29;
inline constexpr std::uint64_t kFeatureVersion1 = std::uint64_t{1} << 32;
inline constexpr std::uint64_t kFeaturePacked = std::uint64_t{1} << 34;

// One chain, taken from the ring. Reused: the vector keeps its memory.
struct Chain {
  std::uint16_t id = 0;        // split: the head; packed: the buffer id
  std::uint16_t slots = 0;     // packed: descriptors it takes up in the ring
  std::uint16_t track = 0;     // packed: its entry in the in-flight region
  std::vector<iovec> iov;      // what the device may read, then what it may write
  std::uint32_t readable = 0;  // entries of iov
  std::uint64_t readable_bytes = 0;
  std::uint64_t writable_bytes = 0;
  std::uint8_t* last_writable = nullptr;  // its last writable byte, where there is one
  const char* fault = nullptr;            // what is wrong with it

  void reset() {
    iov.clear();
    id = slots = track = 0;
    readable = 0;
    readable_bytes = writable_bytes = 0;
    last_writable = nullptr;
    fault = nullptr;
  }
};

enum class Take : std::uint8_t { none, chain, broken };

// Where a ring lies, and how it starts.
struct RingSetup {
  std::uint32_t size = 0;
  std::uint8_t* descriptors = nullptr;  // 16-aligned
  std::uint8_t* driver = nullptr;       // split: available ring; packed: driver event suppression
  std::uint8_t* device = nullptr;       // split: used ring; packed: device event suppression
  std::uint64_t features = 0;
  std::uint32_t base = 0;  // of vhost-user's SET_VRING_BASE
  InflightRegion inflight;
  // Guest address of `device` for the dirty log, where writes to it are to be logged.
  std::optional<std::uint64_t> device_log_address;

  // Bytes at `descriptors`, `driver` and `device`.
  static std::uint64_t descriptor_bytes(std::uint32_t size) { return std::uint64_t{16} * size; }
  static std::uint64_t driver_bytes(std::uint64_t features, std::uint32_t size);
  static std::uint64_t device_bytes(std::uint64_t features, std::uint32_t size);
};

class Virtqueue {
 public:
  // Reads the in-flight region: chains that an earlier life of the back-end had taken come out of
  // take() first, in the order in which they were taken. Errors: invalid_argument, corrupt.
  static Result<std::unique_ptr<Virtqueue>> open(const GuestMemory& memory, RingSetup setup);
  virtual ~Virtqueue() = default;

  virtual Take take(Chain& chain) = 0;
  // Gives a chain back, `written` bytes of it filled. The driver sees it after publish().
  virtual void put(const Chain& chain, std::uint32_t written) = 0;
  virtual void publish() = 0;
  // Whether the driver wants to be told of what was published since this was last asked.
  virtual bool wants_call() = 0;
  // Asks the driver for kicks; true when there is something to take already.
  virtual bool ask_for_kicks() = 0;
  virtual void decline_kicks() = 0;
  virtual std::uint32_t base() const = 0;  // for GET_VRING_BASE

  const char* trouble() const { return trouble_; }  // why it is broken
  std::uint32_t size() const { return setup_.size; }
  bool tracked() const { return setup_.inflight.present(); }
  bool recovered() const { return recovered_; }  // found chains of an earlier life
  void set_log(std::shared_ptr<DirtyLog> log) { log_ = std::move(log); }
  void set_device_log_address(std::optional<std::uint64_t> address) {
    setup_.device_log_address = address;
  }
  DirtyLog* log() const { return log_.get(); }
  const GuestMemory& memory() const { return memory_; }

 protected:
  Virtqueue(const GuestMemory& memory, RingSetup setup) : memory_(memory), setup_(setup) {}
  bool has(std::uint64_t feature) const { return (setup_.features & feature) != 0; }
  Take broken(const char* why) {
    trouble_ = why;
    return Take::broken;
  }
  void collect(Chain& chain, std::uint64_t guest, std::uint32_t length, bool writable);
  // Guest memory in one piece; the table cannot change while the ring is there.
  std::uint8_t* at(std::uint64_t guest, std::uint64_t length) {
    if (std::uint8_t* host = window_.at(guest, length)) return host;
    window_ = memory_.window_of(guest);
    return window_.at(guest, length);
  }
  void log_device(std::uint64_t offset, std::uint64_t length) const {
    if (log_ && setup_.device_log_address) log_->mark(*setup_.device_log_address + offset, length);
  }

  const GuestMemory& memory_;
  GuestMemory::Window window_;  // the last one that was looked up
  RingSetup setup_;
  bool recovered_ = false;
  const char* trouble_ = nullptr;
  std::shared_ptr<DirtyLog> log_;
};

Result<std::unique_ptr<Virtqueue>> open_split(const GuestMemory& memory, RingSetup setup);
Result<std::unique_ptr<Virtqueue>> open_packed(const GuestMemory& memory, RingSetup setup);

}  // namespace pqblk::exports
