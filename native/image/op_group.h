// Several I/O operations awaited together.
//
// Room image/. The group owns the operations; buffers are the caller's until it completes.
#pragma once

#include <deque>
#include <vector>

#include "base/task.h"
#include "io/queue.h"

namespace pqblk::image {

class OpGroup {
 public:
  explicit OpGroup(io::Queue& queue) : queue_(queue) {}
  OpGroup(const OpGroup&) = delete;

  void add(io::OpType type, const io::File& file, std::uint64_t offset, std::vector<iovec> iov) {
    Item& item = items_.emplace_back();
    item.list = std::move(iov);
    item.type = type;
    item.file = &file;
    item.offset = offset;
    item.iov = item.list.data();
    item.iov_count = static_cast<std::uint32_t>(item.list.size());
    item.completed = &OpGroup::one_done;
    item.group = this;
  }
  void add(io::OpType type, const io::File& file, std::uint64_t offset, void* data,
           std::size_t size) {
    add(type, file, offset, std::vector<iovec>{{data, size}});
  }
  bool empty() const { return items_.empty(); }
  std::size_t size() const { return items_.size(); }

  // co_await group.run(): submits all, waits for all, returns the first error.
  struct Run {
    OpGroup& group;
    bool await_ready() const noexcept { return group.items_.empty(); }
    void await_suspend(std::coroutine_handle<> h) {
      group.waiter_ = h;
      group.left_ = group.items_.size();
      for (Item& item : group.items_) group.queue_.submit(item);
    }
    Error await_resume() const {
      for (const Item& item : group.items_) {
        if (item.result < 0) {
          const char* name = item.type == io::OpType::read ? "read" : "write";
          return Error::from_errno(-item.result, name, item.file->path, item.offset);
        }
      }
      return {};
    }
  };
  Run run() { return Run{*this}; }
  void clear() { items_.clear(); }

 private:
  struct Item : io::Op {
    std::vector<iovec> list;
    OpGroup* group = nullptr;
  };
  static void one_done(io::Op& op) {
    OpGroup* group = static_cast<Item&>(op).group;
    if (--group->left_ == 0) group->waiter_.resume();
  }

  io::Queue& queue_;
  std::deque<Item> items_;
  std::size_t left_ = 0;
  std::coroutine_handle<> waiter_;
};

}  // namespace pqblk::image
