// The operation state machine and the awaitables of Queue; see operation.h.

#include "io/operation.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstring>

namespace pqblk::io {

namespace {

// Stages of FallocateMode::zero where the file system has no FALLOC_FL_ZERO_RANGE: the range is
// punched, then allocated again.
enum ZeroStage : std::uint8_t { kZeroRange = 0, kZeroPunch = 1, kZeroAllocate = 2 };

bool transfers(const Op& op) { return op.type == OpType::read || op.type == OpType::write; }

void skip_empty(Op& op) {
  while (op.iov_count > 0 && op.iov->iov_len == 0) {
    ++op.iov;
    --op.iov_count;
  }
}

void consume(Op& op, std::size_t bytes) {
  op.done += bytes;
  while (bytes > 0) {
    assert(op.iov_count > 0);
    const std::size_t taken = std::min(bytes, op.iov->iov_len);
    op.iov->iov_base = static_cast<char*>(op.iov->iov_base) + taken;
    op.iov->iov_len -= taken;
    bytes -= taken;
    skip_empty(op);
  }
}

Step finish(Op& op, int result) {
  op.result = result;
  return Step::finished;
}

// Everything behind the end of the file reads as zeros.
Step finish_at_eof(Op& op) {
  for (; op.iov_count > 0; ++op.iov, --op.iov_count) {
    std::memset(op.iov->iov_base, 0, op.iov->iov_len);
  }
  op.done = op.length;
  return finish(op, 0);
}

Step advance_transfer(Op& op, std::uint64_t bytes) {
  assert(bytes <= op.length - op.done);
  if (op.done + bytes == op.length) [[likely]] {
    op.done = op.length;
    return finish(op, 0);
  }
  if (bytes == 0) {
    // A write of nothing would be repeated for ever; no file system should answer so.
    return op.type == OpType::read ? finish_at_eof(op) : finish(op, -EIO);
  }
  op.retries = 0;
  consume(op, bytes);
  // O_DIRECT ends off a block boundary only at the end of the file, and the rest of such a read
  // would be refused as misaligned.
  const bool off_block = op.file->direct && (op.offset + op.done) % op.file->offset_align != 0;
  if (op.type == OpType::read && off_block) return finish_at_eof(op);
  return Step::resubmit;
}

Step advance_fallocate(Op& op, int raw) {
  const bool refused = raw == -EOPNOTSUPP || raw == -ENOSYS;
  if (op.mode == FallocateMode::zero) {
    if (op.stage == kZeroRange && refused) {
      op.stage = kZeroPunch;
      return Step::resubmit;
    }
    if (op.stage == kZeroPunch && raw == 0) {
      op.stage = kZeroAllocate;
      return Step::resubmit;
    }
    if (op.stage == kZeroAllocate && refused) return finish(op, 0);  // zeros, though not reserved
  }
  if (op.mode == FallocateMode::allocate && refused && op.file->block_device) {
    return finish(op, op.offset + op.length <= op.file->size ? 0 : -ENOSPC);
  }
  return finish(op, raw);
}

}  // namespace

void begin(Op& op) {
  op.result = 0;
  op.done = 0;
  op.retries = 0;
  op.stage = 0;
  if (!transfers(op)) return;
  if (op.iov == nullptr) {
    op.iov = &op.single;
    op.iov_count = 1;
  }
  skip_empty(op);
  op.length = 0;
  for (std::uint32_t i = 0; i < op.iov_count; ++i) op.length += op.iov[i].iov_len;
}

Step advance(Op& op, int raw_result) {
  if (raw_result == -EINTR || raw_result == -EAGAIN) {
    if (++op.retries <= kRetriesMax) return Step::resubmit;
    return finish(op, -EIO);  // the errno itself would say "try again", which was done enough
  }
  if (transfers(op)) {
    if (raw_result < 0) return finish(op, raw_result);
    return advance_transfer(op, static_cast<std::uint64_t>(raw_result));
  }
  if (op.type == OpType::fallocate) return advance_fallocate(op, raw_result);
  return finish(op, raw_result < 0 ? raw_result : 0);
}

std::uint32_t transfer_count(const Op& op) { return std::min(op.iov_count, kIovecsPerTransfer); }

int fallocate_flags(const Op& op) {
  switch (op.mode) {
    case FallocateMode::allocate:
      return 0;
    case FallocateMode::punch:
      return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    case FallocateMode::zero:
      if (op.stage == kZeroPunch) return FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
      return op.stage == kZeroAllocate ? 0 : FALLOC_FL_ZERO_RANGE;
  }
  return 0;
}

int perform(const Op& op, int fd) {
  const auto at = static_cast<off_t>(op.offset + op.done);
  const auto count = static_cast<int>(transfer_count(op));
  ssize_t r = 0;
  switch (op.type) {
    case OpType::read:
      r = count == 1 ? ::pread(fd, op.iov->iov_base, op.iov->iov_len, at)
                     : ::preadv(fd, op.iov, count, at);
      break;
    case OpType::write:
      r = count == 1 ? ::pwrite(fd, op.iov->iov_base, op.iov->iov_len, at)
                     : ::pwritev(fd, op.iov, count, at);
      break;
    case OpType::fdatasync:
      r = ::fdatasync(fd);
      break;
    case OpType::fallocate:
      r = ::fallocate(fd, fallocate_flags(op), static_cast<off_t>(op.offset),
                      static_cast<off_t>(op.length));
      break;
    case OpType::truncate:
      r = ::ftruncate(fd, static_cast<off_t>(op.length));
      break;
    case OpType::poll: {
      pollfd event{op.poll_fd, op.poll_events, 0};
      r = ::poll(&event, 1, -1);
      break;
    }
    case OpType::nop:
      break;
  }
  return r < 0 ? -errno : static_cast<int>(r);  // one call moves less than 2 GiB
}

std::string_view op_name(OpType type) {
  switch (type) {
    case OpType::read:
      return "read";
    case OpType::write:
      return "write";
    case OpType::fdatasync:
      return "fdatasync";
    case OpType::fallocate:
      return "fallocate";
    case OpType::truncate:
      return "truncate";
    case OpType::nop:
      return "nop";
    case OpType::poll:
      return "poll";
  }
  return "unknown operation";
}

// ---- awaitables ----

Error Queue::Await::failure() const {
  const bool placed = type == OpType::read || type == OpType::write || type == OpType::fallocate;
  return Error::from_errno(-result, op_name(type), file != nullptr ? file->path : std::string(),
                           placed ? offset : Error::kNoOffset);
}

namespace {

void aim(Op& op, OpType type, const File& file, std::uint64_t offset, std::uint64_t length) {
  op.type = type;
  op.file = &file;
  op.offset = offset;
  op.length = length;
}

}  // namespace

Queue::Await Queue::read(const File& file, std::uint64_t offset, void* data, std::size_t size) {
  Await op(*this);
  aim(op, OpType::read, file, offset, size);
  op.single = {data, size};
  return op;
}

Queue::Await Queue::write(const File& file, std::uint64_t offset, const void* data,
                          std::size_t size) {
  Await op(*this);
  aim(op, OpType::write, file, offset, size);
  op.single = {const_cast<void*>(data), size};  // iovec has no const form; a write only reads it
  return op;
}

Queue::Await Queue::readv(const File& file, std::uint64_t offset, std::span<iovec> iov) {
  Await op(*this);
  aim(op, OpType::read, file, offset, 0);
  op.iov = iov.data();
  op.iov_count = static_cast<std::uint32_t>(iov.size());
  return op;
}

Queue::Await Queue::writev(const File& file, std::uint64_t offset, std::span<iovec> iov) {
  Await op(*this);
  aim(op, OpType::write, file, offset, 0);
  op.iov = iov.data();
  op.iov_count = static_cast<std::uint32_t>(iov.size());
  return op;
}

Queue::Await Queue::fdatasync(const File& file) {
  Await op(*this);
  aim(op, OpType::fdatasync, file, 0, 0);
  return op;
}

Queue::Await Queue::fallocate(const File& file, FallocateMode mode, std::uint64_t offset,
                              std::uint64_t length) {
  Await op(*this);
  aim(op, OpType::fallocate, file, offset, length);
  op.mode = mode;
  return op;
}

Queue::Await Queue::truncate(const File& file, std::uint64_t size) {
  Await op(*this);
  aim(op, OpType::truncate, file, 0, size);
  return op;
}

Queue::Await Queue::poll(int fd, short events) {
  Await op(*this);
  op.type = OpType::poll;
  op.poll_fd = fd;
  op.poll_events = events;
  return op;
}

}  // namespace pqblk::io
