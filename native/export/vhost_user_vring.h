// One ring of a vhost-user device, run on the thread of a queue of the disk.
//
// Room export/: joins a Virtqueue, the block device and an engine queue. The session's thread
// starts and stops it; everything in between happens on the queue's thread, which finds work by
// looking, asks for kicks when there was none for a while, and tells the driver once for each batch
// of answers.
#pragma once

#include <algorithm>
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

inline constexpr std::uint32_t kTakeAtOnce = 128;  // requests of one turn of the thread
inline constexpr std::uint32_t kTakeAhead = 8;     // taken before the first of them is started
// Answers that the driver is shown in one go: it may see to them while the next ones are made.
inline constexpr std::uint32_t kPublishAtOnce = 8;
inline constexpr std::uint64_t kLookEveryNs =
    1'000'000;  // where the front-end has no kick descriptor

// Of one ring, over all the front-ends there were; read by anyone. Rings count on threads of their
// own: two in one cache line would cost each as much as the rest of its work on a request.
struct alignas(64) VringCounters {
  image::Counter requests, errors;  // answered; of those, with an error. The queue's thread
  std::atomic<bool> running{false};
};

// How long to look at an idle ring before sleeping. It pays when work comes meanwhile. When work
// comes soon, but only ever after the looking has ended, then whoever brings it may well have been
// waiting for this processor: looking stops, and is tried again after a while, and then a longer
// one.
class Watch {
 public:
  static constexpr std::uint64_t kMaxNs = 100'000;
  static constexpr std::uint64_t kWorthNs = 10'000;  // a sleep and its waking cost about that
  static constexpr std::uint32_t kPatienceMin = 4, kPatienceMax = 1024;

  std::uint64_t limit_ns() const { return limit_ns_; }
  // Work came while it looked.
  void found(std::uint64_t after_ns) {
    if (after_ns > kWorthNs) patience_ = std::max(kPatienceMin, patience_ / 2);
  }
  // It looked in vain and slept; work came that long after it had fallen asleep.
  void slept(std::uint64_t ns) {
    if (ns > kMaxNs) {  // longer looking would not have saved this one
      limit_ns_ = limit_ns_ / 2 < kWorthNs ? 0 : limit_ns_ / 2;
    } else if (limit_ns_ == kMaxNs) {
      limit_ns_ = 0;
      patience_ = std::min(kPatienceMax, patience_ * 2);
      short_sleeps_ = 0;
    } else if (++short_sleeps_ >= patience_) {
      limit_ns_ = kMaxNs;
    }
  }

 private:
  std::uint64_t limit_ns_ = kMaxNs;
  std::uint32_t patience_ = kPatienceMin;  // short sleeps until it is tried again
  std::uint32_t short_sleeps_ = 0;
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
  std::uint32_t take_ahead();
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
  std::uint32_t unpublished_ = 0;  // answers
  int kick_ = -1;
  bool listening_ = false;
  bool stopping_ = false;
  bool silent_ = false;  // answers stay unpublished
  bool failed_ = false;
  bool asked_ = false;  // for kicks
  std::uint64_t busy_ns_ = 0, asked_ns_ = 0;
  Watch watch_;
  image::Poller poller_;
  image::Deferred flush_later_;
  ReadyNode* drained_ = nullptr;
  std::function<void(const char*)> broken_;
  UniqueFd call_, error_;
};

}  // namespace pqblk::exports
