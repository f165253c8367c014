// The one operation state machine: what a raw completion means for an operation.
//
// Room io/. Every engine (and the simulator) calls begin() once when an operation is submitted and
// advance() with each raw result (bytes or a negative errno); nothing else decides whether a short
// or interrupted transfer goes on, what the end of the file means, or how an unsupported zeroing is
// replaced. It knows no engine and makes no system call except in perform().
#pragma once

#include <cstdint>
#include <string_view>

#include "io/queue.h"

namespace pqblk::io {

// The most buffers one system call takes (IOV_MAX); longer lists go in several transfers.
inline constexpr std::uint32_t kIovecsPerTransfer = 1024;
// Consecutive completions without progress (EINTR, EAGAIN) before an operation fails.
inline constexpr std::uint32_t kRetriesMax = 4096;

enum class Step : std::uint8_t { finished, resubmit };

// Prepares a fresh operation: `single` becomes the list when there is none, empty buffers are
// skipped, `length` of a read or write becomes the sum of its buffers.
void begin(Op& op);

// Digests one raw result. finished: op.result is final. resubmit: the remaining part (offset +
// done, iov, iov_count) goes to the kernel again.
Step advance(Op& op, int raw_result);

// The buffers of the next transfer: at most kIovecsPerTransfer of those left.
std::uint32_t transfer_count(const Op& op);

// The FALLOC_FL_* mode of the next fallocate(2) call.
int fallocate_flags(const Op& op);

// Transfers of files in memory up to this many bytes are made by the queue's own thread.
inline constexpr std::uint64_t kDirectCallBytesMax = 256 * 1024;

// Whether a plain system call on the queue's thread is the fastest way: the file is in memory, so
// nothing waits, and the kernel's own workers would only cost a second processor (io_uring hands
// such files to them, AIO blocks).
inline bool best_called_directly(const Op& op) {
  return op.file != nullptr && op.file->in_memory && op.length <= kDirectCallBytesMax &&
         (op.type == OpType::read || op.type == OpType::write || op.type == OpType::fdatasync);
}

// One blocking attempt on `fd`, a descriptor of the operation's file (-1: it has none); the raw
// result as io_uring would report it.
int perform(const Op& op, int fd);
inline int perform(const Op& op) { return perform(op, op.file != nullptr ? op.file->fd : -1); }

// Tells the submitter: calls `completed` or resumes the coroutine. The Op may be gone afterwards.
inline void complete(Op& op) {
  if (op.completed != nullptr) {
    op.completed(op);
  } else {
    op.handle.resume();
  }
}

std::string_view op_name(OpType type);

}  // namespace pqblk::io
