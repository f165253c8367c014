// A virtio block device in front of a disk: what its configuration says and what a request means
// (OASIS virtio 1.2, 5.2), for any transport that can hand over chains of guest memory.
//
// Room export/: knows chains and the disk's requests; nothing of rings, sockets or files. Guest
// memory goes to the disk as it is, without a copy. A chain that cannot be a request is answered
// with an error where it has a byte for the answer, and given back in any case.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>

#include "export/report_log.h"
#include "export/virtqueue.h"
#include "image/disk.h"

namespace pqblk::exports {

// virtio 1.2, 5.2.3.
inline constexpr std::uint64_t kBlkSizeMax = 1 << 1;
inline constexpr std::uint64_t kBlkSegMax = 1 << 2;
inline constexpr std::uint64_t kBlkReadOnly = 1 << 5;
inline constexpr std::uint64_t kBlkBlockSize = 1 << 6;
inline constexpr std::uint64_t kBlkFlush = 1 << 9;
inline constexpr std::uint64_t kBlkTopology = 1 << 10;
inline constexpr std::uint64_t kBlkConfigWce = 1 << 11;
inline constexpr std::uint64_t kBlkMultiQueue = 1 << 12;
inline constexpr std::uint64_t kBlkDiscard = 1 << 13;
inline constexpr std::uint64_t kBlkWriteZeroes = 1 << 14;

// Limits that the configuration announces.
inline constexpr std::uint32_t kBlkSegmentBytesMax = 1 << 20;    // of one buffer
inline constexpr std::uint32_t kBlkSegmentsMax = 126;            // 128 less header and status
inline constexpr std::uint32_t kBlkRangesMax = 16;               // of one discard or write-zeroes
inline constexpr std::uint32_t kBlkRangeSectorsMax = 1U << 21U;  // 1 GiB
inline constexpr std::uint32_t kBlkPhysicalBlock = 4096;

inline constexpr std::size_t kBlkConfigBytes = 60;
inline constexpr std::size_t kBlkHeaderBytes = 16;
inline constexpr std::size_t kBlkRangeBytes = 16;

// One request from its chain to its answer. Reused; it stays put while it is under way.
struct BlkRequest {
  Chain chain;
  void (*done)(BlkRequest&, std::uint32_t written) = nullptr;  // on the queue's thread, once
  void* context = nullptr;                                     // the transport's
  BlkRequest* next = nullptr;                                  // the transport's

  // Of the device.
  image::Request request;
  class VirtioBlk* device = nullptr;
  std::uint32_t queue = 0;
  std::uint32_t reads = 0;                   // data bytes that an answer without error has filled
  image::Status answer = image::Status::ok;  // once `done` is called
  std::uint32_t range_count = 0, range_next = 0;
  std::array<std::uint8_t, kBlkRangesMax * kBlkRangeBytes> ranges{};
};

class VirtioBlk {
 public:
  // `log`, which may be null, outlives this.
  VirtioBlk(image::Disk& disk, std::uint16_t queues, ReportLog* log);

  std::uint64_t features() const { return features_; }  // those of the device, not of the ring
  // What the driver acknowledged; nothing: there is none, as after a reset. Before the first
  // request, while none runs, or the same again.
  void negotiated(std::optional<std::uint64_t> features);
  // Bytes beyond the configuration read as zeros.
  void read_config(std::uint32_t offset, std::span<std::uint8_t> out) const;
  // Only `writeback` can be written. Error: invalid_argument.
  Error write_config(std::uint32_t offset, std::span<const std::uint8_t> bytes);
  // What a driver chose earlier, where the transport knows it: whoever has chosen relies on it, and
  // may never say it again.
  void choose_writeback(bool on);
  bool chosen_writeback() const { return chosen_.load(std::memory_order_relaxed); }

  // On the thread of the disk's queue `queue`. `done` may run inside the call.
  void start(std::uint32_t queue, BlkRequest& blk);

 private:
  using Answer = image::Status;
  Answer transfer(BlkRequest& blk, image::RequestType type, std::uint64_t sector);
  Answer prepare_ranges(BlkRequest& blk, image::RequestType type);
  bool next_range(BlkRequest& blk);
  void completed(BlkRequest& blk);
  void finish(BlkRequest& blk, Answer answer);
  void report(const BlkRequest& blk);
  void settle_writeback();
  bool write_through() const { return !writeback_.load(std::memory_order_relaxed); }

  image::Disk& disk_;
  const std::uint16_t queues_;
  const bool read_only_;
  const std::uint64_t features_;
  ReportLog* const log_;
  std::optional<std::uint64_t> negotiated_;
  std::atomic<bool> chosen_{true};     // by a driver that can choose
  std::atomic<bool> writeback_{true};  // what holds for the driver there is
};

}  // namespace pqblk::exports
