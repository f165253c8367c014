#include "format/fill.h"

#include <algorithm>
#include <array>

#include "base/aligned.h"
#include "base/units.h"

namespace pqblk::format {
namespace {

constexpr std::uint64_t kWriteBytes = 2 * kMiB;
constexpr std::uint64_t kFallocateBytes = 256 * kMiB;  // a step after which to stop when told

Task<Error> write_zeros(io::Queue& q, const io::File& file, std::uint64_t offset,
                        std::uint64_t length, ProgressCount* count) {
  AlignedBuffer zeros(static_cast<std::size_t>(std::min(length, kWriteBytes)));
  for (std::uint64_t done = 0; done < length;) {
    const std::uint64_t n = std::min(length - done, kWriteBytes);
    Error error = co_await q.write(file, offset + done, zeros.data(), static_cast<std::size_t>(n));
    if (!error && count != nullptr) error = count->add(n);
    if (error) co_return error;
    done += n;
  }
  co_return Error();
}

}  // namespace

Error ProgressCount::add(std::uint64_t bytes) {
  done += bytes;
  if (progress && !progress(done, total)) return Error(Kind::canceled, "stopped on request");
  return Error();
}

Task<Error> fill_range(io::Queue& q, const io::File& file, std::uint64_t offset,
                       std::uint64_t length, Preallocation how, ProgressCount& count) {
  if (how == Preallocation::full) {
    Error error = co_await write_zeros(q, file, offset, length, &count);
    co_return error;
  }
  for (std::uint64_t done = 0; how == Preallocation::falloc && done < length;) {
    const std::uint64_t n = std::min(length - done, kFallocateBytes);
    // A block device has its space; it only has to read as zeros.
    const io::FallocateMode mode =
        file.block_device ? io::FallocateMode::zero : io::FallocateMode::allocate;
    Error error = co_await q.fallocate(file, mode, offset + done, n);
    if (!error) error = count.add(n);
    if (error) co_return error;
    done += n;
  }
  co_return Error();
}

Task<Error> zero_range(io::Queue& q, const io::File& file, std::uint64_t offset,
                       std::uint64_t length) {
  Error error = co_await q.fallocate(file, io::FallocateMode::zero, offset, length);
  if (error.kind() == Kind::unsupported) {
    error = co_await write_zeros(q, file, offset, length, nullptr);
  }
  co_return error;
}

}  // namespace pqblk::format
