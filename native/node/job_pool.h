// The threads on which blocking work runs: opening, closing, creating, checking.
//
// Room node/. Not libuv's pool: an environment that ends waits for what libuv runs before it tells
// anyone, and process.exit() joins libuv's threads, so that long work could never be asked to stop.
// One pool for the process; a thread is made when none is idle, and goes after kIdle without work.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

namespace pqblk::node {

class JobPool {
 public:
  static constexpr std::uint32_t kThreadsMax = 64;  // more work waits
  static constexpr std::chrono::seconds kIdle{2};

  static JobPool& instance();
  // False when the process is ending or no thread could be made: `work` was not taken.
  bool run(std::function<void()> work);
  // The process is ending: long work looks here and stops.
  bool ending() const { return ending_.load(std::memory_order_relaxed); }
  // Drops what waits, returns once nothing runs. Also called when the process exits.
  void end();

 private:
  void serve();

  std::atomic<bool> ending_{false};
  std::mutex inner_;
  std::condition_variable work_, done_;
  std::deque<std::function<void()>> waiting_;
  bool registered_ = false;  // end() runs when the process exits
  std::uint32_t threads_ = 0, idle_ = 0, active_ = 0;
};

}  // namespace pqblk::node
