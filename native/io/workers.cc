// Helper threads for blocking system calls; see workers.h.

#include "io/workers.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <system_error>

#include "io/thread_setup.h"

namespace pqblk::io {

Workers::Workers(Queue& owner, std::uint32_t bound)
    : owner_(owner), bound_(std::clamp(bound, 1U, kWorkersMax)) {}

Workers::~Workers() {
  {
    std::lock_guard guard(mutex_);
    assert(queued_.empty());
    closing_ = true;
  }
  wanted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Workers::perform_all(NodeList<Op> batch) {
  std::uint32_t count = 0;
  std::uint32_t missing = 0;
  {
    std::lock_guard guard(mutex_);
    while (Op* op = batch.pop()) {
      queued_.push(*op);
      ++count;
    }
    queued_count_ += count;
    if (queued_count_ > idle_) missing = queued_count_ - idle_;
  }
  for (; missing > 0 && threads_.size() < bound_; --missing) {
    try {
      threads_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      if (!threads_.empty()) break;  // go on with fewer
      std::fputs("pqblk: cannot start an I/O thread\n", stderr);
      std::abort();
    }
  }
  if (count == 1) {
    wanted_.notify_one();
  } else if (count > 1) {
    wanted_.notify_all();
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
    ++idle_;
    wanted_.wait(lock, [this] { return closing_ || !queued_.empty(); });
    --idle_;
    if (queued_.empty()) return;
    Op& op = *queued_.pop();
    --queued_count_;
    lock.unlock();
    while (advance(op, perform(op)) == Step::resubmit) {
      resubmitted_.fetch_add(1, std::memory_order_relaxed);
    }
    if (done_.push(op)) owner_.wake();
    lock.lock();
  }
}

}  // namespace pqblk::io
