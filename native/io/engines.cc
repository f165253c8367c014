// Choosing an engine, and naming the cause when io_uring is refused.

#include "io/engines.h"

#include <sys/resource.h>

#include <cerrno>
#include <cstring>
#include <fstream>

namespace pqblk::io {

namespace {

// The first word after `key` in a file of "key value" lines; the whole first word without a key.
std::string word_in(const char* path, std::string_view key = {}) {
  std::ifstream in(path);
  std::string word;
  while (in >> word) {
    if (key.empty()) return word;
    if (word == key && in >> word) return word;
  }
  return {};
}

bool seccomp_filtered() { return word_in("/proc/self/status", "Seccomp:") == "2"; }

std::string memlock_text() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
    return "no limit";
  return std::to_string(limit.rlim_cur / 1024) + " KiB";
}

}  // namespace

std::string uring_refusal(int err) {
  const std::string disabled = word_in("/proc/sys/kernel/io_uring_disabled");
  switch (err) {
    case EPERM:
    case EACCES:
      if (disabled == "1" || disabled == "2") {
        return "the sysctl kernel.io_uring_disabled is " + disabled +
               (disabled == "1"
                    ? " (only privileged processes and kernel.io_uring_group may use it)"
                    : " (nobody may use it)");
      }
      if (seccomp_filtered()) return "a seccomp filter refuses io_uring_setup (EPERM)";
      return "io_uring_setup is not permitted (EPERM); a security module may forbid it";
    case ENOSYS:
      if (seccomp_filtered()) return "a seccomp filter hides io_uring_setup (ENOSYS)";
      return "this kernel has no io_uring (ENOSYS)";
    case ENOMEM:
      return "not enough lockable memory for the ring (ENOMEM); RLIMIT_MEMLOCK is " +
             memlock_text();
    case EMFILE:
    case ENFILE:
      return "no file descriptor left for the ring";
    default:
      return std::string("io_uring_setup failed: ") + std::strerror(err);
  }
}

Result<std::unique_ptr<Queue>> make_queue(const QueueOptions& options,
                                          std::string* fallback_cause) {
  if (options.depth == 0 || options.depth > kDepthMax) {
    return Error(Kind::invalid_argument, "queue depth is " + std::to_string(options.depth) +
                                             "; expected 1 to " + std::to_string(kDepthMax));
  }
  switch (options.engine) {
    case EngineType::uring:
      return make_uring(options);
    case EngineType::aio:
      return make_aio(options);
    case EngineType::threads:
      return make_threads(options);
    case EngineType::automatic:
      break;
  }
  Result<std::unique_ptr<Queue>> ring = make_uring(options);
  if (ring) return ring;
  if (fallback_cause != nullptr) *fallback_cause = ring.error().message();
  return make_threads(options);
}

}  // namespace pqblk::io
