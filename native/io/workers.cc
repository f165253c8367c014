// Helper threads for blocking system calls; see workers.h.

#include "io/workers.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <system_error>
#include <utility>

#include "io/thread_setup.h"

namespace pqblk::io {

Workers::Workers(Queue& owner, std::uint32_t bound, std::chrono::milliseconds linger)
    : owner_(owner), bound_(std::clamp(bound, 1U, kWorkersMax)), linger_(linger) {}

Workers::~Workers() {
  std::vector<std::thread> threads;
  {
    std::lock_guard guard(mutex_);
    assert(queued_.empty());
    closing_ = true;
    threads = std::move(threads_);
    if (left_.joinable()) threads.push_back(std::move(left_));
  }
  wanted_.notify_all();
  for (std::thread& thread : threads) thread.join();
}

void Workers::perform_all(NodeList<Op> batch) {
  std::uint32_t count = 0;
  {
    std::lock_guard guard(mutex_);
    while (Op* op = batch.pop()) {
      queued_.push(*op);
      ++count;
    }
    queued_count_ += count;
    if (queued_count_ > idle_) add_threads(queued_count_ - idle_);
  }
  if (count == 1) {
    wanted_.notify_one();
  } else if (count > 1) {
    wanted_.notify_all();
  }
}

void Workers::add_threads(std::uint32_t missing) {
  for (; missing > 0 && threads_.size() < bound_; --missing) {
    try {
      threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      if (!threads_.empty()) return;  // go on with fewer
      std::fputs("pqblk: cannot start an I/O thread\n", stderr);
      std::abort();
    }
    ++idle_;
  }
}

NodeList<Op> Workers::collect(std::uint64_t& resubmitted) {
  NodeList<Op> done;
  done_.drain_to(done);
  resubmitted += resubmitted_.exchange(0, std::memory_order_relaxed);
  return done;
}

void Workers::work() {
  set_up_thread("pqblk-io");

  std::unique_lock lock(mutex_);
  for (;;) {
    while (queued_.empty() && !closing_) {
      if (threads_.size() == 1) {
        wanted_.wait(lock);
        continue;
      }
      const bool slept_through = wanted_.wait_for(lock, linger_) == std::cv_status::timeout;
      if (slept_through && queued_.empty() && !closing_ && threads_.size() > 1) return leave(lock);
    }
    if (queued_.empty()) return;  // closing: the destructor joins
    Op& op = *queued_.pop();
    --queued_count_;
    least_idle_ = std::min(least_idle_, --idle_);
    lock.unlock();
    while (advance(op, perform(op)) == Step::resubmit) {
      resubmitted_.fetch_add(1, std::memory_order_relaxed);
    }
    if (done_.push(op)) owner_.wake();
    lock.lock();
    ++idle_;
    if (one_too_many()) return leave(lock);
  }
}

// Steady work goes around among all threads, so none of them sleeps for long: what tells is whether
// there was one to spare all the time.
bool Workers::one_too_many() {
  const Clock::time_point now = Clock::now();
  if (now < window_end_) return false;
  const bool spare = least_idle_ > 0;
  window_end_ = now + linger_;
  least_idle_ = idle_;
  return spare && threads_.size() > 1 && queued_.empty() && !closing_;
}

void Workers::leave(std::unique_lock<std::mutex>& lock) {
  least_idle_ = std::min(least_idle_, --idle_);
  const auto self = std::ranges::find(threads_, std::this_thread::get_id(), &std::thread::get_id);
  std::thread before = std::exchange(left_, std::move(*self));
  threads_.erase(self);
  lock.unlock();
  if (before.joinable()) before.join();  // it is about to end, or has
}

}  // namespace pqblk::io
