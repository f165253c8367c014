// Waiting between coroutines, also of different queues: AsyncMutex, Watermark, Gate.
//
// Room base/. A waiter is resumed on the executor it waited on. The inner locks are held for a few
// instructions only; no user code runs under them.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>

#include "base/short_lock.h"
#include "base/task.h"

namespace pqblk {

// Resumed on the executor on which it was constructed.
struct Waiter : ReadyNode {
  Executor* home = Executor::current();
  Waiter* link = nullptr;
  std::uint64_t target = 0;
  void wake() { home->post(*this); }
};

// FIFO mutual exclusion for coroutines. lock() returns a guard.
class AsyncMutex {
 public:
  class Guard {
   public:
    explicit Guard(AsyncMutex* mutex) : mutex_(mutex) {}
    Guard(Guard&& other) noexcept : mutex_(std::exchange(other.mutex_, nullptr)) {}
    Guard& operator=(Guard&& other) noexcept {
      std::swap(mutex_, other.mutex_);
      return *this;
    }
    ~Guard() { release(); }
    void release() {
      if (AsyncMutex* m = std::exchange(mutex_, nullptr)) m->unlock();
    }

   private:
    AsyncMutex* mutex_;
  };

  struct Lock : Waiter {
    AsyncMutex& mutex;
    explicit Lock(AsyncMutex& m) : mutex(m) {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) {
      handle = h;
      std::lock_guard guard(mutex.inner_);
      if (!mutex.held_) {
        mutex.held_ = true;
        return false;
      }
      link = nullptr;
      (mutex.tail_ ? mutex.tail_->link : mutex.head_) = this;
      mutex.tail_ = this;
      return true;
    }
    Guard await_resume() { return Guard(&mutex); }
  };
  Lock lock() { return Lock(*this); }

 private:
  void unlock() {
    Waiter* next = nullptr;
    {
      std::lock_guard guard(inner_);
      next = head_;
      if (next == nullptr) {
        held_ = false;
        return;
      }
      head_ = next->link;
      if (head_ == nullptr) tail_ = nullptr;
    }
    next->wake();  // ownership passes on
  }

  ShortLock inner_;
  bool held_ = false;
  Waiter* head_ = nullptr;
  Waiter* tail_ = nullptr;
};

// A number that only grows; coroutines wait until it reaches a target.
class Watermark {
 public:
  explicit Watermark(std::uint64_t value = 0) : value_(value) {}
  std::uint64_t value() const { return value_.load(std::memory_order_acquire); }

  void advance(std::uint64_t to) {
    Waiter* ready = nullptr;
    {
      std::lock_guard guard(inner_);
      if (to <= value_.load(std::memory_order_relaxed)) return;
      value_.store(to, std::memory_order_release);
      Waiter** at = &waiters_;
      while (Waiter* w = *at) {
        if (w->target <= to) {
          *at = w->link;
          w->link = ready;
          ready = w;
        } else {
          at = &w->link;
        }
      }
    }
    while (ready != nullptr) {
      Waiter* next = ready->link;  // the frame may be gone once woken
      ready->wake();
      ready = next;
    }
  }

  struct Reach : Waiter {
    Watermark& mark;
    Reach(Watermark& m, std::uint64_t t) : mark(m) { target = t; }
    bool await_ready() const noexcept { return mark.value() >= target; }
    bool await_suspend(std::coroutine_handle<> h) {
      handle = h;
      std::lock_guard guard(mark.inner_);
      if (mark.value_.load(std::memory_order_relaxed) >= target) return false;
      link = mark.waiters_;
      mark.waiters_ = this;
      return true;
    }
    void await_resume() const noexcept {}
  };
  Reach reach(std::uint64_t target) { return Reach(*this, target); }

 private:
  std::atomic<std::uint64_t> value_;
  ShortLock inner_;
  Waiter* waiters_ = nullptr;
};

// A counted gate: enter()/leave() by many; close() stops new entries and drained() waits for those
// inside. Used to quiesce requests (close, resize, snapshots).
class Gate {
 public:
  bool enter() {
    if ((state_.fetch_add(1, std::memory_order_acq_rel) & kClosed) == 0) return true;
    leave();
    return false;
  }
  void leave() {
    if (state_.fetch_sub(1, std::memory_order_acq_rel) != kClosed + 1) return;
    Waiter* ready = nullptr;
    {
      // Whoever comes here late, after a reopen(), may meet the waiter of the next close(), with
      // somebody inside: whose leaving then wakes it. Acquired is what all those who left did.
      std::lock_guard guard(inner_);
      if (state_.load(std::memory_order_acquire) == kClosed)
        ready = std::exchange(waiter_, nullptr);
    }
    if (ready != nullptr) ready->wake();
  }
  void close() { state_.fetch_or(kClosed, std::memory_order_acq_rel); }
  void reopen() { state_.fetch_and(~kClosed, std::memory_order_acq_rel); }

  struct Drained : Waiter {
    Gate& gate;
    explicit Drained(Gate& g) : gate(g) {}
    bool await_ready() const noexcept { return false; }
    // Under the lock that the last one to leave takes after it has left: it sees the waiter, or is
    // seen to be gone.
    bool await_suspend(std::coroutine_handle<> h) {
      handle = h;
      std::lock_guard guard(gate.inner_);
      if ((gate.state_.load(std::memory_order_acquire) & ~kClosed) == 0) return false;
      gate.waiter_ = this;
      return true;
    }
    void await_resume() const noexcept {}
  };
  Drained drained() { return Drained(*this); }  // one waiter at a time; call close() first

 private:
  static constexpr std::uint64_t kClosed = std::uint64_t{1} << 63;
  std::atomic<std::uint64_t> state_{0};  // how many are inside, and kClosed
  ShortLock inner_;
  Waiter* waiter_ = nullptr;
};

}  // namespace pqblk
