#include "format/qcow2/meta_io.h"

#include <algorithm>
#include <cassert>

namespace pqblk::format::qcow2 {
namespace {

constexpr std::uint64_t kZeroWriteMax = 256 * kKiB;

}  // namespace

MetaIo::MetaIo(const io::File& file, const Layout& layout)
    : file_(file),
      map_(layout),
      piece_(std::max<std::uint32_t>(512, file.offset_align)),
      host_end_(layout.align_to_cluster(file.size)) {
  assert((piece_ & (piece_ - 1)) == 0);
}

Task<Error> MetaIo::read(io::Queue& q, HostOffset at, void* data, std::size_t size) {
  assert(at.bytes % piece_ == 0 && size % piece_ == 0);
  reads_.fetch_add(1, std::memory_order_relaxed);
  Error error = co_await q.read(file_, at.bytes, data, size);
  if (error) co_return std::move(error).at("read qcow2 metadata", at.bytes);
  co_return Error();
}

Task<Error> MetaIo::write(io::Queue& q, Part part, HostOffset at, const void* data,
                          std::size_t size) {
  assert(at.bytes % piece_ == 0 && size % piece_ == 0 && size != 0);
  if (file_.read_only) co_return Error(Kind::read_only, "the image is open read-only");
  Error overlap = map_.check_write(part, at, size);
  if (overlap) co_return std::move(overlap).in(file_.path).at("write qcow2 metadata", at.bytes);
  writes_.fetch_add(1, std::memory_order_relaxed);
  Error error = co_await q.write(file_, at.bytes, data, size);
  if (error) co_return std::move(error).at("write qcow2 metadata", at.bytes);
  co_return Error();
}

Task<Error> MetaIo::write_zeroes(io::Queue& q, Part part, HostOffset at, std::uint64_t length) {
  const std::uint64_t step = std::min(length, kZeroWriteMax);
  AlignedBuffer zeros(static_cast<std::size_t>(step));
  for (std::uint64_t done = 0; done < length;) {
    const std::uint64_t n = std::min(step, length - done);
    Error error = co_await write(q, part, at + done, zeros.data(), static_cast<std::size_t>(n));
    if (error) co_return error;
    done += n;
  }
  co_return Error();
}

Task<Error> MetaIo::sync(io::Queue& q) {
  if (sync_by) co_return co_await sync_by(q);
  Error error = co_await q.fdatasync(file_);
  co_return error;
}

void MetaIo::raise_host_end(std::uint64_t bytes) {
  std::uint64_t now = host_end_.load(std::memory_order_relaxed);
  while (now < bytes && !host_end_.compare_exchange_weak(now, bytes, std::memory_order_relaxed)) {
  }
}

}  // namespace pqblk::format::qcow2
