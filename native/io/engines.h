// The engines, as make_queue() sees them.
//
// Room io/, private to it. Each maker answers an Error that names the cause when this machine or
// process may not use the engine.
#pragma once

#include <memory>
#include <string>

#include "base/error.h"
#include "io/queue.h"

namespace pqblk::io {

inline constexpr std::uint32_t kDepthMax = 4096;

Result<std::unique_ptr<Queue>> make_uring(const QueueOptions& options);
Result<std::unique_ptr<Queue>> make_aio(const QueueOptions& options);
Result<std::unique_ptr<Queue>> make_threads(const QueueOptions& options);

// Why io_uring_setup answered `err` in this process: seccomp, sysctl, kernel or memory limit.
std::string uring_refusal(int err);

}  // namespace pqblk::io
