// Several tasks of one executor, awaited together.
//
// Room base/. For work that is cut in pieces which do not need each other: the first error is the
// group's, and the others still come to their end.
#pragma once

#include <cassert>
#include <coroutine>
#include <cstddef>
#include <utility>

#include "base/error.h"
#include "base/task.h"

namespace pqblk {

// Lives in the frame of the coroutine that awaits it, until join() has returned.
class TaskGroup {
 public:
  TaskGroup() = default;
  TaskGroup(const TaskGroup&) = delete;
  ~TaskGroup() { assert(running_ == 0); }

  // Runs at once, up to where it first waits.
  void start(Task<Error> task) {
    ++running_;
    run(*this, std::move(task));
  }

  // co_await group.join(): all have ended. The group can be used again.
  struct Join {
    TaskGroup& group;
    bool await_ready() const noexcept { return group.running_ == 0; }
    void await_suspend(std::coroutine_handle<> h) noexcept { group.waiter_ = h; }
    Error await_resume() { return std::exchange(group.error_, Error()); }
  };
  Join join() { return Join{*this}; }

 private:
  static detail::Detached run(TaskGroup& group, Task<Error> task) {
    Error e = co_await std::move(task);
    if (e && !group.error_) group.error_ = std::move(e);
    if (--group.running_ == 0 && group.waiter_) std::exchange(group.waiter_, {}).resume();
  }

  std::size_t running_ = 0;
  std::coroutine_handle<> waiter_;
  Error error_;
};

}  // namespace pqblk
