#include "node/job_pool.h"

#include <pthread.h>

#include <cstdlib>
#include <system_error>
#include <thread>
#include <utility>

namespace pqblk::node {

JobPool& JobPool::instance() {
  static JobPool& pool = *new JobPool;  // never destroyed: its threads may outlive main()
  return pool;
}

bool JobPool::run(std::function<void()> work) {
  std::lock_guard guard(inner_);
  if (ending()) return false;
  if (!std::exchange(registered_, true)) std::atexit([] { instance().end(); });
  if (idle_ <= waiting_.size() && threads_ < kThreadsMax) {
    try {
      std::thread([this] { serve(); }).detach();
      ++threads_;
    } catch (const std::system_error&) {
      if (threads_ == 0) return false;
    }
  }
  waiting_.push_back(std::move(work));
  work_.notify_one();
  return true;
}

void JobPool::serve() {
  ::pthread_setname_np(::pthread_self(), "pqblk-job");
  std::unique_lock guard(inner_);
  for (;;) {
    ++idle_;
    const bool any = work_.wait_for(guard, kIdle, [this] { return !waiting_.empty(); });
    --idle_;
    if (!any) break;
    std::function<void()> work = std::move(waiting_.front());
    waiting_.pop_front();
    ++active_;
    guard.unlock();
    work();
    work = nullptr;  // what it holds goes before the pool counts it as done
    guard.lock();
    --active_;
    done_.notify_all();
  }
  --threads_;
}

void JobPool::end() {
  std::unique_lock guard(inner_);
  ending_.store(true, std::memory_order_relaxed);
  std::deque<std::function<void()>> dropped;
  dropped.swap(waiting_);
  done_.wait(guard, [this] { return active_ == 0; });
}

}  // namespace pqblk::node
