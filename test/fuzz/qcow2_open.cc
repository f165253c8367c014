// Fuzzes whole images: open, read, write, zero, check, repair, on bytes in memory. What must hold:
// no crash, no hang, and an image that check finds clean stays clean under our writes.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/aligned.h"
#include "format/qcow2/check.h"
#include "image/qcow2_backend.h"
#include "memory_queue.h"

using namespace pqblk;
using namespace pqblk::image;
namespace q2 = pqblk::format::qcow2;

namespace {

constexpr std::size_t kInputMax = 4 << 20;
constexpr std::uint64_t kPart = 16 * 1024;

// Corruptions found, or -1 when the image cannot be opened for a check.
std::int64_t corruptions(fuzz::MemoryQueue& q, bool repair) {
  q2::OpenOptions options;
  options.for_check = true;
  options.read_only = !repair;
  auto metadata = q.run(q2::Metadata::open(q, q.file(), options));
  if (!metadata) return -1;
  q2::CheckOptions how;
  how.repair = repair;
  auto report = q.run(q2::check(q, **metadata, how));
  return report ? static_cast<std::int64_t>(report->corruptions) : -1;
}

void read_parts(fuzz::MemoryQueue& q, QueueContext& context, Backend& disk) {
  AlignedBuffer buffer(kPart);
  const std::uint64_t size = disk.geometry().size;
  const std::uint64_t ends[] = {0, size / 2, size > kPart ? size - kPart : 0};
  for (std::uint64_t at : ends) {
    at = align_down<std::uint64_t>(at, 512);
    iovec iov{buffer.data(), static_cast<std::size_t>(std::min(kPart, size - at))};
    const GuestBuffers data{{&iov, 1}, 0, iov.iov_len};
    if (iov.iov_len != 0) static_cast<void>(q.run(disk.read(context, {at}, data)).ok());
  }
}

void write_parts(fuzz::MemoryQueue& q, QueueContext& context, Backend& disk) {
  AlignedBuffer buffer(kPart);
  std::fill_n(buffer.data(), kPart, std::uint8_t{0x5a});
  const std::uint64_t size = align_down<std::uint64_t>(disk.geometry().size, 512);
  for (std::uint64_t at : {std::uint64_t{512}, size / 3, size / 2 + 4096}) {
    at = align_down<std::uint64_t>(at, 512);
    if (at >= size) continue;
    iovec iov{buffer.data(), static_cast<std::size_t>(std::min<std::uint64_t>(1536, size - at))};
    const GuestBuffers data{{&iov, 1}, 0, iov.iov_len};
    static_cast<void>(q.run(disk.write(context, {at}, data, false)).ok());
    const std::uint64_t rest = std::min<std::uint64_t>(size - at, 1 << 20);
    static_cast<void>(q.run(disk.discard(context, {at}, rest / 2)).ok());
    static_cast<void>(q.run(disk.write_zeroes(context, {at}, rest, kZeroUnmap)).ok());
    static_cast<void>(q.run(disk.flush(context)).ok());
  }
  static_cast<void>(q.run(disk.extent(context, {0}, size)));
}

std::unique_ptr<Backend> open(fuzz::MemoryQueue& q, QueueContext& context, bool read_only) {
  Qcow2Options options;  // no gate: a backing file is refused
  options.read_only = read_only;
  auto disk = q.run(open_qcow2(context, q.file(), std::move(options)));
  return disk ? std::move(*disk) : nullptr;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > kInputMax) return 0;
  fuzz::MemoryQueue q({data, data + size});
  QueueContext context(q, 0);
  if (auto disk = open(q, context, true)) {
    read_parts(q, context, *disk);
    static_cast<void>(q.run(disk->close(context)).ok());
  }
  const bool clean = corruptions(q, false) == 0;
  if (auto disk = open(q, context, false)) {
    write_parts(q, context, *disk);
    read_parts(q, context, *disk);
    static_cast<void>(q.run(disk->close(context)).ok());
    disk.reset();
    q.reopen();
    if (clean && corruptions(q, false) != 0) __builtin_trap();
  }
  static_cast<void>(corruptions(q, true));
  return 0;
}
