#include "base/frame_pool.h"

#include <array>
#include <cstdlib>
#include <new>

namespace pqblk {
namespace {

constexpr std::size_t kClassBytes = 128;
constexpr std::size_t kClasses = 16;  // frames up to 2 KiB are pooled, larger ones are not

struct FreeFrame {
  FreeFrame* next;
};

struct Pool {
  std::array<FreeFrame*, kClasses> head{};
  std::array<std::size_t, kClasses> count{};
  ~Pool() {
    for (FreeFrame*& list : head) {
      while (list != nullptr) {
        FreeFrame* next = list->next;
        std::free(list);
        list = next;
      }
    }
    alive() = false;
  }
  // Frames can be released by thread-exit destructors after the pool itself is gone.
  static bool& alive() {
    static thread_local bool value = true;
    return value;
  }
};

Pool& pool() {
  static thread_local Pool instance;
  return instance;
}

}  // namespace

void* frame_allocate(std::size_t size) {
  const std::size_t index = (size + kClassBytes - 1) / kClassBytes - 1;
  if (index < kClasses && Pool::alive()) {
    Pool& p = pool();
    if (FreeFrame* frame = p.head[index]) {
      p.head[index] = frame->next;
      --p.count[index];
      return frame;
    }
    size = (index + 1) * kClassBytes;
  }
  void* frame = std::malloc(size);
  if (frame == nullptr) std::abort();  // a frame has no error path; limits bound their number
  return frame;
}

void frame_release(void* frame, std::size_t size) {
  const std::size_t index = (size + kClassBytes - 1) / kClassBytes - 1;
  if (index < kClasses && Pool::alive()) {
    Pool& p = pool();
    if (p.count[index] < kFramesKept) {
      p.head[index] = new (frame) FreeFrame{p.head[index]};
      ++p.count[index];
      return;
    }
  }
  std::free(frame);
}

}  // namespace pqblk
