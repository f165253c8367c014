#include "base/frame_pool.h"

#include <cstdlib>
#include <utility>

namespace pqblk::detail {

constinit thread_local FramePool frame_pool{};

namespace {

// Gives a thread's frames back when it ends. Destructors that run later still release frames.
struct Drain {
  Drain() { frame_pool.open = !frame_pool.closed; }
  ~Drain() {
    frame_pool.open = false;
    frame_pool.closed = true;
    for (FreeFrame*& list : frame_pool.head) {
      while (list != nullptr) std::free(std::exchange(list, list->next));
    }
  }
};

void open_pool() {
  static thread_local const Drain drain;
  static_cast<void>(drain);
}

}  // namespace

void* allocate_frame_slowly(std::size_t size) {
  const std::size_t index = frame_class(size);
  // Every frame of a class has the size of the class, whoever gets it next.
  if (index < kFrameClasses) size = (index + 1) * kFrameClassBytes;
  void* frame = std::malloc(size);
  if (frame == nullptr) std::abort();  // a frame has no error path; limits bound their number
  return frame;
}

void release_frame_slowly(void* frame, std::size_t size) {
  if (frame_class(size) < kFrameClasses && !frame_pool.open && !frame_pool.closed) {
    open_pool();
    return frame_release(frame, size);
  }
  std::free(frame);
}

}  // namespace pqblk::detail
