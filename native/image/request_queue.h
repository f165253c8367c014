// One queue of a disk: its ring, its thread, its memory, and the requests on their way to it.
//
// Room image/: moves requests between threads and bounds how many run; what a request means is the
// server's business (request_server.h). A request waits in the inbox (any thread, lock-free), then
// in the FIFO of this queue's thread while kRunningMax others run or the queue is paused. Those
// that the disk's limits hold back wait in a list of their own, past which flushes go.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "image/backend.h"
#include "image/disk.h"
#include "image/stats.h"
#include "io/queue.h"
#include "io/queue_thread.h"

namespace pqblk::image {

// Started in one go; then completions of others get their turn, also when every request is answered
// from memory at once.
inline constexpr std::uint32_t kStartsAtOnce = 256;
inline constexpr std::uint32_t kRunningMax = 1024;     // requests of one queue inside the backend
inline constexpr std::uint64_t kWatchNs = 20'000'000;  // other limits are noticed after this

class RequestQueue;

class RequestHandler {
 public:
  virtual ~RequestHandler() = default;
  // Runs on the queue's thread and ends with queue.finish(request), once, then or later.
  virtual void serve(RequestQueue& queue, Request& request) = 0;
};

class RequestQueue {
 public:
  // The thread runs from here on. `register_arena`: the ring keeps the arena's pages at hand, which
  // costs their memory at once; not worth it where little data moves.
  static Result<std::unique_ptr<RequestQueue>> open(std::uint32_t index,
                                                    std::unique_ptr<io::Queue> ring,
                                                    bool register_arena = true);
  ~RequestQueue();  // stops and joins; nothing may be in flight

  io::Queue& ring() { return thread_->queue(); }
  QueueContext& context() { return *context_; }
  const QueueCounters& counters() const { return counters_; }
  // Before the first request. Without a throttle nothing is ever held back.
  void set_handler(RequestHandler& handler, Throttle* throttle) {
    handler_ = &handler;
    throttle_ = throttle;
  }

  // Any thread. False when the queue is shut: the list is untouched.
  bool submit(Request* first);
  // Own thread only.
  void start(Request& request);
  void finish(Request& request);
  void defer(Deferred& work);
  void add_poller(Poller& poller);
  void remove_poller(Poller& poller);

  // ---- blocking, never on a queue's thread ----
  void pause();  // returns once nothing runs; requests then wait in the FIFO
  void resume();
  void shut();  // returns once everything that was accepted has completed; later ones are refused
  void stop();  // ends the thread

 private:
  RequestQueue() = default;
  Task<bool> idle();
  bool quiet() const;
  void tell_if_quiet();
  bool turn();
  bool take_inbox();
  void arrived(Request& request);
  std::uint64_t now();
  void drain();
  bool drain_waiting();
  bool drain_held();
  bool may_start();
  void serve_first(Request*& list, Request**& list_end);
  detail::Detached watch_clock();
  void refuse_later_ones();

  std::unique_ptr<io::QueueThread> thread_;
  std::unique_ptr<QueueContext> context_;
  RequestHandler* handler_ = nullptr;
  Throttle* throttle_ = nullptr;
  QueueCounters counters_;

  // Own thread only.
  Request* waiting_ = nullptr;
  Request** waiting_end_ = &waiting_;
  Request* held_ = nullptr;  // by the limits
  Request** held_end_ = &held_;
  std::uint64_t held_until_ns_ = 0;     // the first of them; as reserved
  std::uint64_t reserved_version_ = 0;  // of the limits then; 0: not yet reserved
  bool watching_ = false;               // watch_clock() runs
  std::uint64_t now_ns_ = 0;            // 0: not asked in this turn
  std::uint32_t running_ = 0;
  bool draining_ = false;
  Deferred drain_later_;
  bool paused_ = false;
  bool shut_ = false;
  ReadyNode* idle_waiter_ = nullptr;
  Deferred* deferred_ = nullptr;
  Poller* pollers_ = nullptr;

  alignas(64) std::atomic<Request*> inbox_{nullptr};  // newest first; shut_mark() once shut
};

// Status and error of a request that was never served.
void refuse(Request& request, Kind kind, std::string message);

}  // namespace pqblk::image
