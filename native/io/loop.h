// The run loop that all real engines share: ready coroutines, posts from other threads, timers,
// hooks, the depth bound, spinning and sleeping.
//
// Room io/, private to it. An engine adds only how operations reach the kernel and come back
// (start, exchange). One turn of the loop: run what is ready -> poll_hook -> before_wait -> hand
// the prepared operations over and reap, waiting only when nothing else is to do.
#pragma once

#include <atomic>
#include <concepts>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "io/operation.h"
#include "io/queue.h"

namespace pqblk::io {

// Intrusive first-in first-out list of nodes that belong to one thread.
template <std::derived_from<ReadyNode> T>
class NodeList {
 public:
  bool empty() const { return head_ == nullptr; }
  void push(T& node) {
    node.next = nullptr;
    (tail_ != nullptr ? tail_->next : head_) = &node;
    tail_ = &node;
  }
  T* pop() {
    ReadyNode* node = head_;
    if (node == nullptr) return nullptr;
    head_ = node->next;
    if (head_ == nullptr) tail_ = nullptr;
    return static_cast<T*>(node);
  }
  NodeList take() { return std::exchange(*this, NodeList()); }

 private:
  ReadyNode* head_ = nullptr;
  ReadyNode* tail_ = nullptr;
};

// Many threads push, one takes everything; lock-free.
template <std::derived_from<ReadyNode> T>
class Inbox {
 public:
  // True when the inbox was empty: then the pusher has to wake the owner.
  bool push(T& node) {
    ReadyNode* head = head_.load(std::memory_order_relaxed);
    do {
      node.next = head;
    } while (!head_.compare_exchange_weak(head, &node, std::memory_order_acq_rel,
                                          std::memory_order_relaxed));
    return head == nullptr;
  }
  bool empty() const { return head_.load(std::memory_order_relaxed) == nullptr; }
  // Appends everything to `list` in the order of the pushes.
  void drain_to(NodeList<T>& list) {
    if (empty()) return;
    ReadyNode* newest = head_.exchange(nullptr, std::memory_order_acquire);
    ReadyNode* oldest = nullptr;
    while (newest != nullptr) {
      ReadyNode* older = newest->next;
      newest->next = oldest;
      oldest = newest;
      newest = older;
    }
    while (oldest != nullptr) {
      ReadyNode* newer = oldest->next;
      list.push(static_cast<T&>(*oldest));
      oldest = newer;
    }
  }

 private:
  alignas(64) std::atomic<ReadyNode*> head_{nullptr};
};

inline constexpr std::uint64_t kForever = ~std::uint64_t{0};

class Loop : public Queue {
 public:
  ~Loop() override;
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  void post(ReadyNode& node) final;
  void post_after(ReadyNode& node, std::uint64_t ns) final;
  void cut_short(ReadyNode& node) final;
  std::uint64_t now_ns() override;
  void submit(Op& op) final;
  void run() final;
  void stop() final;
  void wake() final;
  QueueFacts facts() final;
  void register_buffers(std::span<const iovec> buffers) final;
  void register_file(const File& file) final;
  void unregister_file(const File& file) final;

 protected:
  explicit Loop(const QueueOptions& options);
  Error open_event();  // creates the eventfd; before anything else

  // ---- what an engine is; called on the queue's thread ----
  virtual void attach() {}  // run() begins
  virtual void detach() {}  // run() ends
  // Takes the operation into the next batch. It must not complete inside the call.
  virtual void start(Op& op) = 0;
  // Hands the batch over, reaps completions and settles them. Sleeps at most wait_ns (0: not at
  // all, kForever: until something happens) when there are none; an eventfd write ends the sleep.
  virtual void exchange(std::uint64_t wait_ns) = 0;
  virtual void on_register_buffers(std::span<const iovec>) {}
  virtual void on_register_file(const File&) {}
  virtual void on_unregister_file(const File&) {}

  // A raw completion of a started operation.
  void settle(Op& op, int raw_result) {
    if (advance(op, raw_result) == Step::resubmit) {
      ++facts_.resubmitted;
      launch(op);
    } else {
      finished(op);
    }
  }
  // Instead of the engine: a plain system call on this thread before the next exchange.
  void call_directly(Op& op) { direct_.push(op); }
  // The operation has its final result.
  void finished(Op& op);

  int event_fd() const { return event_fd_; }
  std::uint32_t depth() const { return depth_; }
  QueueFacts facts_;

 private:
  // Whether the loop's thread must be interrupted for news: one word, so that a notification and
  // the decision to sleep cannot miss each other.
  enum State : int { kRunning, kNotified, kSleeping };

  void launch(Op& op) {
    if (best_called_directly(op)) {
      call_directly(op);
    } else {
      start(op);
    }
  }
  bool run_direct();
  void open_own(const File& file);
  void close_own(std::uint64_t id);
  int own_fd(const File& file) const;
  bool turn();
  bool run_ready();
  void fire_timers();
  void exchange_or_sleep();
  bool keep_spinning(std::uint64_t now);
  void adapt_spin(std::uint64_t slept_ns);
  std::uint64_t time_to_timer();
  bool try_finish();
  template <class F>
  void on_own_thread(F&& work);

  struct Timer {
    std::uint64_t due_ns;
    std::uint64_t order;  // equal times fire in the order they were set
    ReadyNode* node;
    bool operator<(const Timer& other) const {  // std heaps keep the largest first
      return due_ns != other.due_ns ? due_ns > other.due_ns : order > other.order;
    }
  };

  const std::uint32_t depth_;
  const std::uint64_t spin_max_ns_;
  int event_fd_ = -1;
  std::uint32_t in_flight_ = 0;  // started, not finished; at most depth_
  std::uint32_t polling_ = 0;    // polls started, not finished: they wait, and use up no depth
  NodeList<ReadyNode> ready_;
  NodeList<Op> waiting_;  // beyond the depth
  NodeList<Op> direct_;
  struct OwnFile {
    std::uint64_t id;  // File::id
    int fd;
  };
  std::vector<OwnFile> own_files_;
  std::vector<Timer> timers_;
  std::uint64_t timer_order_ = 0;
  std::uint64_t spin_ns_ = 0;        // adaptive, 0..spin_max_ns_
  std::uint64_t spin_since_ns_ = 0;  // 0: not spinning
  bool worked_ = false;              // in this turn or in the exchange before it

  std::mutex control_;  // guards running_ against the ends of run()
  bool running_ = false;
  alignas(64) std::atomic<int> state_{kRunning};
  std::atomic<bool> stopping_{false};
  Inbox<ReadyNode> inbox_;
};

}  // namespace pqblk::io
