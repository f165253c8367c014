#include "export/virtio_blk.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "base/endian.h"
#include "base/units.h"
#include "image/backend.h"

namespace pqblk::exports {
namespace {

using image::Request;
using image::RequestType;
using image::Status;

// virtio 1.2, 5.2.4.
struct Config {
  Le64 capacity;
  Le32 size_max, seg_max;
  Le16 cylinders;
  std::uint8_t heads, sectors;
  Le32 blk_size;
  std::uint8_t physical_block_exp, alignment_offset;
  Le16 min_io_size;
  Le32 opt_io_size;
  std::uint8_t writeback, unused0;
  Le16 num_queues;
  Le32 max_discard_sectors, max_discard_seg, discard_sector_alignment;
  Le32 max_write_zeroes_sectors, max_write_zeroes_seg;
  std::uint8_t write_zeroes_may_unmap, unused1[3];
};
static_assert(sizeof(Config) == kBlkConfigBytes);
static_assert(offsetof(Config, writeback) == 32 && offsetof(Config, num_queues) == 34);

struct Header {
  Le32 type, reserved;
  Le64 sector;
};
static_assert(sizeof(Header) == kBlkHeaderBytes);

struct Range {
  Le64 sector;
  Le32 sectors, flags;
};
static_assert(sizeof(Range) == kBlkRangeBytes);

constexpr std::uint32_t kUnmap = 1;  // flag of a write-zeroes range
constexpr std::uint32_t kOptimalBytes = 64 * kKiB;

std::uint64_t device_features(bool read_only) {
  const std::uint64_t common = kBlkSizeMax | kBlkSegMax | kBlkBlockSize | kBlkTopology | kBlkFlush |
                               kBlkConfigWce | kBlkMultiQueue;
  return common | (read_only ? kBlkReadOnly : kBlkDiscard | kBlkWriteZeroes);
}

// Copies `bytes` from the front of iov[0..count) and removes them there. The caller has checked
// that so many are there. Returns how many whole entries were used up.
inline std::uint32_t take_front(iovec* iov, std::uint32_t count, void* out, std::size_t bytes) {
  auto* target = static_cast<std::uint8_t*>(out);
  std::uint32_t used = 0;
  if (iov[0].iov_len == bytes) [[likely]] {  // as drivers have it
    std::memcpy(out, iov[0].iov_base, bytes);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the guest's memory is not read again
    return 1;
  }
  while (bytes != 0 && used < count) {
    iovec& v = iov[used];
    const std::size_t piece = std::min(bytes, v.iov_len);
    std::memcpy(target, v.iov_base, piece);
    target += piece;
    bytes -= piece;
    v.iov_base = static_cast<std::uint8_t*>(v.iov_base) + piece;
    v.iov_len -= piece;
    if (v.iov_len == 0) ++used;
  }
  return used;
}

}  // namespace

VirtioBlk::VirtioBlk(image::Disk& disk, std::uint16_t queues, ReportLog* log)
    : disk_(disk),
      queues_(queues),
      read_only_(disk.facts().read_only),
      features_(device_features(read_only_)),
      log_(log) {}

void VirtioBlk::choose_writeback(bool on) {
  chosen_.store(on, std::memory_order_relaxed);
  settle_writeback();
}

void VirtioBlk::negotiated(std::optional<std::uint64_t> features) {
  negotiated_ = features;
  settle_writeback();
}

// A driver that can neither flush nor choose must find every write durable (5.2.6.2), also one that
// acknowledges nothing at all.
void VirtioBlk::settle_writeback() {
  const bool chooses = !negotiated_ || (*negotiated_ & kBlkConfigWce) != 0;
  writeback_.store(chooses ? chosen_writeback() : (*negotiated_ & kBlkFlush) != 0,
                   std::memory_order_relaxed);
}

void VirtioBlk::read_config(std::uint32_t offset, std::span<std::uint8_t> out) const {
  Config config{};
  config.capacity = disk_.size() / kVirtioSectorSize;
  config.size_max = kBlkSegmentBytesMax;
  config.seg_max = kBlkSegmentsMax;
  config.blk_size = kVirtioSectorSize;
  config.physical_block_exp = 3;
  static_assert(kVirtioSectorSize << 3U == kBlkPhysicalBlock);
  config.min_io_size = kBlkPhysicalBlock / kVirtioSectorSize;
  config.opt_io_size = kOptimalBytes / kVirtioSectorSize;
  config.writeback = writeback_.load(std::memory_order_relaxed) ? 1 : 0;
  config.num_queues = queues_;
  config.max_discard_sectors = kBlkRangeSectorsMax;
  config.max_discard_seg = kBlkRangesMax;
  config.discard_sector_alignment = kBlkPhysicalBlock / kVirtioSectorSize;
  config.max_write_zeroes_sectors = kBlkRangeSectorsMax;
  config.max_write_zeroes_seg = kBlkRangesMax;
  config.write_zeroes_may_unmap = 1;
  std::fill(out.begin(), out.end(), std::uint8_t{0});
  if (offset >= sizeof config) return;
  std::memcpy(out.data(), reinterpret_cast<const std::uint8_t*>(&config) + offset,
              std::min<std::size_t>(out.size(), sizeof config - offset));
}

Error VirtioBlk::write_config(std::uint32_t offset, std::span<const std::uint8_t> bytes) {
  if (offset != offsetof(Config, writeback) || bytes.size() != 1 || bytes[0] > 1) {
    return Error(Kind::invalid_argument,
                 "only the write-back byte of the device's configuration can be written");
  }
  choose_writeback(bytes[0] == 1);
  return {};
}

void VirtioBlk::start(std::uint32_t queue, BlkRequest& blk) {
  Chain& chain = blk.chain;
  blk.device = this;
  blk.queue = queue;
  blk.reads = 0;
  blk.range_count = blk.range_next = 0;
  Request& request = blk.request;
  request.iov = nullptr;
  request.iov_count = 0;
  request.offset = request.length = 0;
  request.zero_flags = 0;
  request.fua = false;
  request.context = &blk;
  request.complete = [](Request& done) {
    auto& self = *static_cast<BlkRequest*>(done.context);
    self.device->completed(self);
  };
  if (chain.fault != nullptr || chain.last_writable == nullptr ||
      chain.readable_bytes < kBlkHeaderBytes) {
    return finish(blk, Status::ioerr);
  }
  Header header;
  // The header comes off the front of what is readable, the status off the end of what is writable;
  // in between is the data.
  const std::uint32_t used = take_front(chain.iov.data(), chain.readable, &header, sizeof header);
  chain.iov.back().iov_len -= 1;
  request.iov = chain.iov.data() + used;
  const auto type = static_cast<RequestType>(header.type.get());
  Status status = Status::ok;
  switch (type) {
    case RequestType::in:
    case RequestType::out:
    case RequestType::get_id:
      request.iov_count = chain.readable - used;
      status = transfer(blk, type, header.sector);
      break;
    case RequestType::flush:
      break;
    case RequestType::discard:
    case RequestType::write_zeroes:
      request.iov_count = chain.readable - used;
      status = prepare_ranges(blk, type);
      if (status == Status::ok && !next_range(blk)) return finish(blk, Status::ok);
      break;
    default:
      status = Status::unsupp;
  }
  if (status != Status::ok) return finish(blk, status);
  request.type = type;
  disk_.start(queue, request);
}

VirtioBlk::Answer VirtioBlk::transfer(BlkRequest& blk, RequestType type, std::uint64_t sector) {
  Chain& chain = blk.chain;
  Request& request = blk.request;
  const std::uint64_t from_guest = chain.readable_bytes - kBlkHeaderBytes;
  const std::uint64_t to_guest = chain.writable_bytes - 1;
  if (type == RequestType::out) {
    if (to_guest != 0) return Status::ioerr;
    request.length = from_guest;
    request.fua = write_through();
  } else {
    if (from_guest != 0) return Status::ioerr;
    request.iov = chain.iov.data() + chain.readable;
    request.iov_count = static_cast<std::uint32_t>(chain.iov.size()) - chain.readable;
    // A status byte of its own leaves an empty last piece.
    if (chain.iov.back().iov_len == 0) --request.iov_count;
    request.length = to_guest;
    if (to_guest > 0xffff'ffff - 1) return Status::ioerr;
    blk.reads = static_cast<std::uint32_t>(to_guest);
  }
  if (type == RequestType::get_id) return Status::ok;
  if (request.length == 0 || request.length % kVirtioSectorSize != 0) return Status::ioerr;
  if (sector > disk_.size() / kVirtioSectorSize) return Status::ioerr;
  request.offset = sector * kVirtioSectorSize;
  return Status::ok;
}

VirtioBlk::Answer VirtioBlk::prepare_ranges(BlkRequest& blk, RequestType type) {
  const std::uint64_t bytes = blk.chain.readable_bytes - kBlkHeaderBytes;
  if (read_only_) return Status::ioerr;
  if (bytes == 0 || bytes % kBlkRangeBytes != 0 || bytes > blk.ranges.size()) return Status::ioerr;
  iovec* data = blk.chain.iov.data() + (blk.chain.readable - blk.request.iov_count);
  take_front(data, blk.request.iov_count, blk.ranges.data(), bytes);
  blk.range_count = static_cast<std::uint32_t>(bytes / kBlkRangeBytes);
  blk.request.iov = nullptr;
  blk.request.iov_count = 0;
  blk.request.fua = type == RequestType::write_zeroes && write_through();
  const std::uint64_t capacity = disk_.size() / kVirtioSectorSize;
  for (std::uint32_t i = 0; i < blk.range_count; ++i) {
    Range range;
    std::memcpy(&range, blk.ranges.data() + std::size_t{i} * kBlkRangeBytes, sizeof range);
    // Unknown flags, and an unmap flag where the request itself says so, are not supported
    // (5.2.6.2).
    const std::uint32_t known = type == RequestType::write_zeroes ? kUnmap : 0;
    if ((range.flags & ~known) != 0) return Status::unsupp;
    if (range.sectors > kBlkRangeSectorsMax || range.sector > capacity ||
        range.sectors > capacity - range.sector) {
      return Status::ioerr;
    }
  }
  return Status::ok;
}

// False: none is left.
bool VirtioBlk::next_range(BlkRequest& blk) {
  while (blk.range_next < blk.range_count) {
    Range range;
    std::memcpy(&range, blk.ranges.data() + std::size_t{blk.range_next++} * kBlkRangeBytes,
                sizeof range);
    if (range.sectors == 0) continue;
    blk.request.offset = range.sector * kVirtioSectorSize;
    blk.request.length = std::uint64_t{range.sectors} * kVirtioSectorSize;
    blk.request.zero_flags = (range.flags & kUnmap) != 0 ? std::uint32_t{image::kZeroUnmap} : 0;
    return true;
  }
  return false;
}

void VirtioBlk::completed(BlkRequest& blk) {
  if (blk.request.status != Status::ok) {
    report(blk);
  } else if (next_range(blk)) {
    return disk_.start(blk.queue, blk.request);
  }
  finish(blk, blk.request.status);
}

void VirtioBlk::finish(BlkRequest& blk, Answer answer) {
  blk.answer = answer;
  std::uint32_t written = 0;
  if (std::uint8_t* status = blk.chain.last_writable) {
    std::atomic_ref<std::uint8_t>(*status).store(static_cast<std::uint8_t>(answer),
                                                 std::memory_order_relaxed);
    // Up to `written` everything is filled: after an error nobody knows what is in the data.
    if (answer == Status::ok) written = blk.reads + 1;
    if (answer != Status::ok && blk.chain.writable_bytes == 1) written = 1;
  }
  blk.done(blk, written);
}

// The guest learns only that its request failed; why is for whoever runs the server.
void VirtioBlk::report(const BlkRequest& blk) {
  if (log_ == nullptr) return;
  log_->failed(blk.request.error, "queue " + std::to_string(blk.queue) + ": request at byte " +
                                      std::to_string(blk.request.offset) + ", " +
                                      std::to_string(blk.request.length) + " bytes");
}

}  // namespace pqblk::exports
