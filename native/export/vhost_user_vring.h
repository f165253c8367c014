// One ring of a vhost-user device, run on the thread of a queue of the disk.
//
// Room export/: joins a Virtqueue, the block device and an engine queue. The session's thread
// starts and stops it; everything in between happens on the queue's thread, which finds work by
// looking, asks for kicks when there was none for a while, and tells the driver once for each batch
// of answers.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/task.h"
#include "export/vhost_user_protocol.h"
#include "export/virtio_blk.h"
#include "export/virtqueue.h"
#include "image/disk.h"
#include "image/stats.h"

namespace pqblk::exports {

inline constexpr std::uint64_t kSpinMaxNs = 100'000;  // looking at an idle ring before sleeping
inline constexpr std::uint64_t kSpinSteps = 8;        // it grows by this fraction of the maximum
inline constexpr std::uint32_t kTakeAtOnce = 128;     // requests of one turn of the thread
inline constexpr std::uint64_t kLookEveryNs =
    1'000'000;  // where the front-end has no kick descriptor

// Of one ring, over all the front-ends there were; read by anyone.
struct VringCounters {
  image::Counter requests, errors;  // answered; of those, with an error. The queue's thread
  std::atomic<bool> running{false};
};

class Vring {
 public:
  Vring(image::Disk& disk, VirtioBlk& device, std::uint32_t queue, VringCounters& counters)
      : disk_(disk), device_(device), queue_(queue), counters_(counters) {}
  ~Vring();
  Vring(const Vring&) = delete;
  Vring& operator=(const Vring&) = delete;

  // ---- the session's thread; each waits for the queue's thread ----
  // Not running before. `kick`: an eventfd that stays open until stop(), or -1. `broken` is called
  // once, on the queue's thread, when the ring contradicts itself. Errors: those of
  // Virtqueue::open().
  Error start(const GuestMemory& memory, const RingSetup& setup, std::shared_ptr<DirtyLog> log,
              int kick, std::function<void(const char*)> broken);
  // Waits for the requests in flight. `orderly`: the front-end is there and takes the answers. It
  // is not when it vanished: then answers are left to the next life if the region of requests in
  // flight keeps them. Returns the base.
  std::uint32_t stop(bool orderly);
  bool running() const { return ring_ != nullptr; }
  void set_call(UniqueFd fd);
  void set_error(UniqueFd fd);
  void set_log(std::shared_ptr<DirtyLog> log, std::optional<std::uint64_t> device_log_address);

 private:
  template <class F>
  void on_queue(F f);
  Task<bool> drain(bool orderly);
  Task<void> listen();
  void take_kicks() const;
  bool turn();
  std::uint32_t take_some();
  bool go_idle(std::uint64_t now);
  void woke(std::uint64_t now);
  void completed(BlkRequest& blk, std::uint32_t written);
  void flush();
  void tell(int fd) const;
  void log_data(const Chain& chain) const;
  void fail();

  image::Disk& disk_;
  VirtioBlk& device_;
  const std::uint32_t queue_;
  VringCounters& counters_;

  // The queue's thread, while running.
  std::unique_ptr<Virtqueue> ring_;
  std::vector<std::unique_ptr<BlkRequest>> requests_;
  BlkRequest* free_ = nullptr;
  std::uint32_t in_flight_ = 0;
  int kick_ = -1;
  bool listening_ = false;
  bool stopping_ = false;
  bool silent_ = false;  // answers stay unpublished
  bool failed_ = false;
  bool asked_ = false;  // for kicks
  std::uint64_t busy_ns_ = 0, asked_ns_ = 0, spin_ns_ = kSpinMaxNs;
  image::Poller poller_;
  image::Deferred flush_later_;
  ReadyNode* drained_ = nullptr;
  std::function<void(const char*)> broken_;
  UniqueFd call_, error_;
};

}  // namespace pqblk::exports
