// Coroutines of the engine: Task<T> (lazy, awaited once), spawn (detached), and Executor, the seam
// between a coroutine and the thread that runs it.
//
// Room base/. An Executor is implemented by each I/O queue (one thread, one ring) and by the
// simulator (one thread for everything). Frames come from a per-thread pool (frame_pool.h), so that
// a request costs no call into the allocator once warm. Errors travel as values, never as
// exceptions.
#pragma once

#include <atomic>
#include <coroutine>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <utility>

#include "base/frame_pool.h"

namespace pqblk {

// An intrusive node of a run queue. It lives in the frame of the suspended coroutine.
struct ReadyNode {
  std::coroutine_handle<> handle;
  ReadyNode* next = nullptr;
};

class Executor {
 public:
  virtual ~Executor() = default;
  // The executor whose thread (or simulated thread) is running now; null outside of any.
  static Executor*& current() {
    static thread_local Executor* executor = nullptr;
    return executor;
  }
  // Resumes node.handle on this executor, never inside the call. Callable from any thread.
  virtual void post(ReadyNode& node) = 0;
  virtual std::uint64_t now_ns() = 0;  // monotonic
};

// co_await resume_on(executor): continue on that executor's thread.
struct ResumeOn : ReadyNode {
  Executor& target;
  explicit ResumeOn(Executor& t) : target(t) {}
  bool await_ready() const noexcept { return Executor::current() == &target; }
  void await_suspend(std::coroutine_handle<> h) {
    handle = h;
    target.post(*this);
  }
  void await_resume() const noexcept {}
};
inline ResumeOn resume_on(Executor& executor) { return ResumeOn(executor); }

// co_await yield(): go to the end of the current executor's run queue.
struct Yield : ReadyNode {
  bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<> h) {
    handle = h;
    Executor::current()->post(*this);
  }
  void await_resume() const noexcept {}
};
inline Yield yield() { return {}; }

namespace detail {

struct PromiseBase {
  std::coroutine_handle<> continuation = std::noop_coroutine();

  static void* operator new(std::size_t size) { return frame_allocate(size); }
  static void operator delete(void* frame, std::size_t size) { frame_release(frame, size); }

  std::suspend_always initial_suspend() noexcept { return {}; }
  struct Final {
    bool await_ready() noexcept { return false; }
    template <class P>
    std::coroutine_handle<> await_suspend(std::coroutine_handle<P> h) noexcept {
      return h.promise().continuation;
    }
    void await_resume() noexcept {}
  };
  Final final_suspend() noexcept { return {}; }
  [[noreturn]] void unhandled_exception() noexcept { std::abort(); }
};

template <class T>
struct Promise : PromiseBase {
  std::optional<T> value;
  std::coroutine_handle<Promise> get_return_object() {
    return std::coroutine_handle<Promise>::from_promise(*this);
  }
  template <class U>
  void return_value(U&& v) {
    value.emplace(std::forward<U>(v));
  }
};

template <>
struct Promise<void> : PromiseBase {
  std::coroutine_handle<Promise> get_return_object() {
    return std::coroutine_handle<Promise>::from_promise(*this);
  }
  void return_void() noexcept {}
};

}  // namespace detail

template <class T = void>
class [[nodiscard]] Task {
 public:
  using promise_type = detail::Promise<T>;
  using Handle = std::coroutine_handle<promise_type>;

  Task(Handle handle) : handle_(handle) {}  // NOLINT: built by the compiler
  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, {})) {}
  Task& operator=(Task&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Task() {
    if (handle_) handle_.destroy();
  }

  bool await_ready() const noexcept { return false; }
  std::coroutine_handle<> await_suspend(std::coroutine_handle<> caller) noexcept {
    handle_.promise().continuation = caller;
    return handle_;
  }
  T await_resume() {
    if constexpr (!std::is_void_v<T>) return std::move(*handle_.promise().value);
  }

 private:
  Handle handle_;
};

namespace detail {
struct Detached {
  struct promise_type {
    static void* operator new(std::size_t size) { return frame_allocate(size); }
    static void operator delete(void* frame, std::size_t size) { frame_release(frame, size); }
    Detached get_return_object() noexcept { return {}; }
    std::suspend_never initial_suspend() noexcept { return {}; }
    std::suspend_never final_suspend() noexcept { return {}; }
    void return_void() noexcept {}
    [[noreturn]] void unhandled_exception() noexcept { std::abort(); }
  };
};
}  // namespace detail

// Starts a task at once on the current thread; its frame frees itself at the end.
inline void spawn(Task<void> task) {
  [](Task<void> t) -> detail::Detached { co_await std::move(t); }(std::move(task));
}

}  // namespace pqblk
