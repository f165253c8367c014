// Helper threads that perform operations with blocking system calls for the engines that need them.
//
// Room io/, private to it. The pool owns no operation; it drives each one to its final result and
// hands it back through an inbox of the engine's loop.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "io/loop.h"

namespace pqblk::io {

inline constexpr std::uint32_t kWorkersMax = 16;                   // threads of one queue
inline constexpr std::chrono::milliseconds kWorkerLinger{10'000};  // one too many ends after this

class Workers {
 public:
  // `owner` is woken when operations are done. At most `bound` threads (and kWorkersMax).
  Workers(Queue& owner, std::uint32_t bound, std::chrono::milliseconds linger = kWorkerLinger);
  ~Workers();  // the owner has collected every operation before
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Owner's thread. Takes the batch; threads are made as they are needed, and end again when for
  // `linger` one of them had nothing to do at every moment. The first one stays: to start another
  // may fail one day.
  void perform_all(NodeList<Op> batch);
  // Owner's thread. The operations that are done, with their final results; resubmissions were
  // made inside and are added to `resubmitted`.
  NodeList<Op> collect(std::uint64_t& resubmitted);

 private:
  using Clock = std::chrono::steady_clock;

  void add_threads(std::uint32_t missing);  // under the mutex, as all below
  void work();
  bool one_too_many();
  void leave(std::unique_lock<std::mutex>& lock);

  Queue& owner_;
  const std::uint32_t bound_;
  const std::chrono::milliseconds linger_;
  Inbox<Op> done_;
  std::atomic<std::uint64_t> resubmitted_{0};

  std::mutex mutex_;
  std::condition_variable wanted_;
  std::vector<std::thread> threads_;
  std::thread left_;  // the one that ended last: joined by who ends next, or by the destructor
  NodeList<Op> queued_;
  std::uint32_t queued_count_ = 0;
  std::uint32_t idle_ = 0;        // threads without an operation
  std::uint32_t least_idle_ = 0;  // since `window_end_` minus `linger_`
  Clock::time_point window_end_{};
  bool closing_ = false;
};

}  // namespace pqblk::io
