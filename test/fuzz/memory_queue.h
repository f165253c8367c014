// A file in memory behind io::Queue, for fuzzing: operations complete on the next turn of a loop
// that runs on the caller's own thread.
//
// Room test/fuzz. Growth is bounded: a write beyond kMemoryMax fails with ENOSPC.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "io/queue.h"

namespace pqblk::fuzz {

class MemoryQueue final : public io::Queue {
 public:
  static constexpr std::uint64_t kMemoryMax = 64u << 20;

  explicit MemoryQueue(std::vector<std::uint8_t> bytes) : bytes_(std::move(bytes)) {
    Executor::current() = this;
    file_.path = "memory";
    file_.size = bytes_.size();
  }
  ~MemoryQueue() override { Executor::current() = nullptr; }

  const io::File& file() const { return file_; }
  const std::vector<std::uint8_t>& bytes() const { return bytes_; }
  void reopen() { file_.size = bytes_.size(); }  // as the next opener finds it

  // Runs a coroutine to its end on this thread.
  template <class T>
  T run(Task<T> task) {
    std::optional<T> result;
    spawn([](Task<T> inner, std::optional<T>& out) -> Task<void> {
      out.emplace(co_await std::move(inner));
    }(std::move(task), result));
    while (!result) turn();
    return std::move(*result);
  }

  void submit(io::Op& op) override {
    op.result = perform(op);
    done_.push_back(&op);
  }
  void post(ReadyNode& node) override { ready_.push_back(&node); }
  void post_after(ReadyNode& node, std::uint64_t) override { post(node); }
  void cut_short(ReadyNode&) override {}  // no sleep lasts
  std::uint64_t now_ns() override { return 0; }
  void run() override {}
  void stop() override {}
  void wake() override {}
  std::string_view engine() const override { return "memory"; }

 private:
  void turn() {
    std::vector<io::Op*> done;
    done.swap(done_);
    for (io::Op* op : done) {
      if (op->completed != nullptr) {
        op->completed(*op);
      } else {
        op->handle.resume();
      }
    }
    std::vector<ReadyNode*> ready;
    ready.swap(ready_);
    for (ReadyNode* node : ready) node->handle.resume();
    if (done.empty() && ready.empty()) __builtin_trap();  // a coroutine that nothing will wake
  }

  bool grow(std::uint64_t end) {
    if (end > kMemoryMax) return false;
    if (end > bytes_.size()) bytes_.resize(end);
    return true;
  }

  int perform(io::Op& op) {
    switch (op.type) {
      case io::OpType::read:
      case io::OpType::write: {
        std::uint64_t at = op.offset;
        for (std::uint32_t i = 0; i < op.iov_count; ++i) {
          const std::size_t n = op.iov[i].iov_len;
          if (op.type == io::OpType::write) {
            if (!grow(at + n)) return -ENOSPC;
            std::memcpy(bytes_.data() + at, op.iov[i].iov_base, n);
          } else {
            std::memset(op.iov[i].iov_base, 0, n);
            if (at < bytes_.size()) {
              std::memcpy(op.iov[i].iov_base, bytes_.data() + at,
                          std::min<std::uint64_t>(n, bytes_.size() - at));
            }
          }
          at += n;
        }
        return 0;
      }
      case io::OpType::fallocate:
        if (op.mode == io::FallocateMode::punch) {
          if (op.offset >= bytes_.size()) return 0;
        } else if (!grow(op.offset + op.length)) {
          return -ENOSPC;
        }
        if (op.mode != io::FallocateMode::allocate) {
          std::memset(bytes_.data() + op.offset, 0,
                      std::min<std::uint64_t>(op.length, bytes_.size() - op.offset));
        }
        return 0;
      case io::OpType::truncate:
        if (op.length > kMemoryMax) return -ENOSPC;
        bytes_.resize(op.length);
        return 0;
      default:
        return 0;
    }
  }

  std::vector<std::uint8_t> bytes_;
  io::File file_;
  std::vector<io::Op*> done_;
  std::vector<ReadyNode*> ready_;
};

}  // namespace pqblk::fuzz
