// A queue on a thread of its own, and running coroutines there from outside.
//
// Room io/. For open and close paths, tests and tools; the data path stays on the queue's thread.
#pragma once

#include <cassert>
#include <functional>
#include <memory>
#include <optional>
#include <semaphore>
#include <string>
#include <thread>
#include <utility>

#include "io/queue.h"

namespace pqblk::io {

// Runs `body` (a callable that returns Task<T>) on the queue's thread and waits for its result. The
// caller must be outside of that thread; the queue must be running or about to run.
template <class Body>
auto run_sync(Queue& queue, Body&& body) {
  using T = decltype(body().await_resume());
  assert(Executor::current() != &queue);
  std::binary_semaphore done(0);
  if constexpr (std::is_void_v<T>) {
    spawn([](Queue& q, Body& run, std::binary_semaphore& signal) -> Task<void> {
      co_await resume_on(q);
      co_await run();
      signal.release();
    }(queue, body, done));
    done.acquire();
  } else {
    std::optional<T> result;
    spawn([](Queue& q, Body& run, std::optional<T>& out,
             std::binary_semaphore& signal) -> Task<void> {
      co_await resume_on(q);
      out.emplace(co_await run());
      signal.release();
    }(queue, body, result, done));
    done.acquire();
    return std::move(*result);
  }
}

// Owns a Queue and the thread that runs it, named pqblk-q<index>. stop() (or the destructor) waits
// until the operations in flight are done.
class QueueThread {
 public:
  // Errors: those of make_queue(), no_memory when no thread can be started.
  static Result<std::unique_ptr<QueueThread>> start(const QueueOptions& options, unsigned index = 0,
                                                    std::string* fallback_cause = nullptr);
  static Result<std::unique_ptr<QueueThread>> start(std::unique_ptr<Queue> queue, unsigned index);
  ~QueueThread() { stop(); }
  QueueThread(const QueueThread&) = delete;
  QueueThread& operator=(const QueueThread&) = delete;

  Queue& queue() { return *queue_; }
  void stop();  // from outside the queue's thread; may be called again

  template <class Body>
  auto run_sync(Body&& body) {
    return io::run_sync(*queue_, std::forward<Body>(body));
  }

 private:
  explicit QueueThread(std::unique_ptr<Queue> queue) : queue_(std::move(queue)) {}

  std::unique_ptr<Queue> queue_;
  std::thread thread_;
};

}  // namespace pqblk::io
