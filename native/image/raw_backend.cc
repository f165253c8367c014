#include "image/raw_backend.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <utility>

#include "base/sync.h"

namespace pqblk::image {
namespace {

constexpr std::uint64_t kRawTransferMax = 4 * kMiB;
constexpr std::size_t kZeroChunk = 1 * kMiB;
constexpr std::size_t kInlineIovecs = 8;

class RawBackend final : public Backend {
 public:
  explicit RawBackend(const io::File& file)
      : file_(file), size_(align_up<std::uint64_t>(file.size, kVirtioSectorSize)) {}

  Geometry geometry() const override;
  std::string_view format() const override { return "raw"; }
  Task<Error> read(QueueContext& q, GuestOffset at, GuestBuffers data) override;
  Task<Error> write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) override;
  Task<Error> flush(QueueContext& q) override { return sync(q.io); }
  Task<Error> discard(QueueContext& q, GuestOffset at, std::uint64_t length) override;
  Task<Error> write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                           std::uint32_t flags) override;
  Task<Result<Extent>> extent(QueueContext& q, GuestOffset at, std::uint64_t length) override;
  Task<Error> resize(QueueContext& q, std::uint64_t new_size) override;
  Task<Error> close(QueueContext& q) override;
  BackendStats stats() const override { return {}; }

 private:
  Task<Error> transfer(io::Queue& io, bool reads, std::uint64_t at, GuestBuffers data);
  Task<Error> sync(io::Queue& io);
  Task<Error> zero(QueueContext& q, io::FallocateMode mode, std::uint64_t at, std::uint64_t length);
  Task<Error> write_zeros(QueueContext& q, std::uint64_t at, std::uint64_t length);
  Task<Error> zero_data(QueueContext& q, std::uint64_t at, std::uint64_t length);

  const io::File& file_;
  std::atomic<std::uint64_t> size_;
  // One fdatasync serves every flush that was asked for before it was issued.
  AsyncMutex sync_lock_;
  std::atomic<std::uint64_t> sync_asked_{0};
  std::uint64_t sync_done_ = 0;  // under sync_lock_
  Error sync_failure_;           // under sync_lock_; a failed sync is final
  std::atomic<bool> broken_{false};
};

Geometry RawBackend::geometry() const {
  Geometry g;
  g.size = size_.load(std::memory_order_relaxed);
  g.request_align = file_.offset_align;
  g.memory_align = file_.memory_align;
  g.max_transfer = kRawTransferMax;
  return g;
}

Task<Error> RawBackend::transfer(io::Queue& io, bool reads, std::uint64_t at, GuestBuffers data) {
  std::array<iovec, kInlineIovecs> few;
  std::vector<iovec> many;
  iovec* iov = few.data();
  if (data.iov.size() > few.size()) {
    many.resize(data.iov.size());
    iov = many.data();
  }
  std::size_t count = 0;
  std::uint64_t left = data.size;
  std::size_t skip = data.skip;
  for (const iovec& v : data.iov) {
    if (left == 0) break;
    const std::size_t length = std::min<std::uint64_t>(v.iov_len - skip, left);
    if (length != 0) iov[count++] = {static_cast<std::uint8_t*>(v.iov_base) + skip, length};
    left -= length;
    skip = 0;
  }
  if (reads) co_return co_await io.readv(file_, at, {iov, count});
  co_return co_await io.writev(file_, at, {iov, count});
}

Task<Error> RawBackend::read(QueueContext& q, GuestOffset at, GuestBuffers data) {
  const iovec& first = data.iov.front();
  if (first.iov_len - data.skip >= data.size) {
    co_return co_await q.io.read(file_, at.bytes, static_cast<char*>(first.iov_base) + data.skip,
                                 data.size);
  }
  co_return co_await transfer(q.io, true, at.bytes, data);
}

Task<Error> RawBackend::write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) {
  if (broken_.load(std::memory_order_acquire)) co_return co_await sync(q.io);
  const iovec& first = data.iov.front();
  Error e;
  if (first.iov_len - data.skip >= data.size) {
    e = co_await q.io.write(file_, at.bytes, static_cast<char*>(first.iov_base) + data.skip,
                            data.size);
  } else {
    e = co_await transfer(q.io, false, at.bytes, data);
  }
  if (!e && fua) co_return co_await sync(q.io);
  co_return e;
}

Task<Error> RawBackend::sync(io::Queue& io) {
  const std::uint64_t ticket = sync_asked_.fetch_add(1, std::memory_order_acq_rel) + 1;
  const auto guard = co_await sync_lock_.lock();
  if (sync_failure_) co_return sync_failure_;
  if (sync_done_ >= ticket) co_return Error();
  const std::uint64_t covered = sync_asked_.load(std::memory_order_acquire);
  Error e = co_await io.fdatasync(file_);
  if (e) {
    sync_failure_ = e;
    broken_.store(true, std::memory_order_release);
  } else {
    sync_done_ = covered;
  }
  co_return e;
}

// A call that fails may have dropped what the page cache had of the range before (ext4 since Linux
// 6.14, at a hole for which there is no room): acknowledged writes are gone, older ones stand there
// again. Zeros are due in their place, and where something stands they need no room.
Task<Error> RawBackend::zero(QueueContext& q, io::FallocateMode mode, std::uint64_t at,
                             std::uint64_t length) {
  Error e = co_await q.io.fallocate(file_, mode, at, length);
  if (!e || e.kind() == Kind::unsupported) co_return e;
  Error written = co_await zero_data(q, at, length);
  if (written) co_return e;
  co_return Error();
}

Task<Error> RawBackend::zero_data(QueueContext& q, std::uint64_t at, std::uint64_t length) {
  Error first;
  for (const std::uint64_t end = at + length; at < end;) {
    Result<Extent> found = co_await extent(q, {at}, end - at);
    if (!found) co_return found.take_error();
    if (found->kind == ExtentKind::data) {
      Error e = co_await write_zeros(q, at, found->length);
      if (e && !first) first = std::move(e);  // the rest is zeroed all the same
    }
    at += found->length;
  }
  co_return first;
}

Task<Error> RawBackend::write_zeros(QueueContext& q, std::uint64_t at, std::uint64_t length) {
  const QueueContext::Buffer zeros = q.buffer(std::min<std::uint64_t>(length, kZeroChunk));
  std::fill_n(zeros.data(), zeros.size(), std::uint8_t{0});
  for (std::uint64_t done = 0; done < length;) {
    const std::uint64_t part = std::min<std::uint64_t>(length - done, zeros.size());
    if (Error e = co_await q.io.write(file_, at + done, zeros.data(), part)) co_return e;
    done += part;
  }
  co_return Error();
}

Task<Error> RawBackend::discard(QueueContext& q, GuestOffset at, std::uint64_t length) {
  Error e = co_await zero(q, io::FallocateMode::punch, at.bytes, length);
  if (e.kind() == Kind::unsupported) co_return Error();  // discard is a hint
  co_return e;
}

Task<Error> RawBackend::write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                                     std::uint32_t flags) {
  const auto mode = (flags & kZeroUnmap) != 0 ? io::FallocateMode::punch : io::FallocateMode::zero;
  Error e = co_await zero(q, mode, at.bytes, length);
  if (e.kind() != Kind::unsupported) co_return e;
  co_return co_await write_zeros(q, at.bytes, length);
}

Task<Result<Extent>> RawBackend::extent(QueueContext&, GuestOffset at, std::uint64_t length) {
  const auto begin = static_cast<off_t>(at.bytes);
  Extent extent{length, ExtentKind::data};
  const off_t data = ::lseek(file_.fd, begin, SEEK_DATA);
  if (data < 0) {
    if (errno == ENXIO) extent.kind = ExtentKind::hole;  // nothing but a hole until the end
    co_return extent;  // no such call here: all of it counts as data
  }
  const off_t end = data > begin ? data : ::lseek(file_.fd, begin, SEEK_HOLE);
  if (data > begin) extent.kind = ExtentKind::hole;
  if (end > begin) extent.length = std::min(length, static_cast<std::uint64_t>(end - begin));
  co_return extent;
}

Task<Error> RawBackend::resize(QueueContext& q, std::uint64_t new_size) {
  if (file_.block_device) {
    co_return Error(Kind::unsupported, "a block device keeps its size").in(file_.path);
  }
  if (Error e = co_await q.io.truncate(file_, new_size)) co_return e;
  size_.store(new_size, std::memory_order_relaxed);
  co_return co_await sync(q.io);
}

Task<Error> RawBackend::close(QueueContext& q) {
  if (file_.read_only) co_return Error();
  co_return co_await sync(q.io);
}

}  // namespace

Task<Result<std::unique_ptr<Backend>>> open_raw(QueueContext&, const io::File& file) {
  co_return std::unique_ptr<Backend>(new RawBackend(file));
}

Task<Error> create_raw(io::Queue& q, const io::File& file, const RawCreateOptions& options) {
  if (options.size == 0 || options.size % kVirtioSectorSize != 0) {
    co_return Error(Kind::invalid_argument, "a disk's size is a multiple of 512 bytes, not 0");
  }
  if (Error e = co_await q.truncate(file, options.size)) co_return e;
  format::ProgressCount count{options.progress, options.size};
  Error e = co_await format::fill_range(q, file, 0, options.size, options.preallocation, count);
  if (e) co_return e;
  co_return co_await q.fdatasync(file);
}

}  // namespace pqblk::image
