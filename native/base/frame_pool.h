// Memory for coroutine frames: per-thread free lists by size class, so that a request on a warm
// queue allocates nothing.
//
// Room base/. A frame may be released on another thread than the one that made it; it then joins
// that thread's list. Each list has a bound (kFramesKept), beyond it frames go back to the heap.
// The warm paths are here: several frames come and go with every request.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace pqblk {

inline constexpr std::size_t kFramesKept = 512;  // per size class and thread

namespace detail {

inline constexpr std::size_t kFrameClassBytes = 128;
inline constexpr std::size_t kFrameClasses = 16;  // up to 2 KiB; larger frames are not kept

struct FreeFrame {
  FreeFrame* next;
};

struct FramePool {
  FreeFrame* head[kFrameClasses];
  std::uint32_t count[kFrameClasses];
  bool open;    // takes frames; the end of the thread will give them back
  bool closed;  // the thread is ending
};

// Of plain data, so that reaching it is one instruction and no guard.
extern constinit thread_local FramePool frame_pool;

void* allocate_frame_slowly(std::size_t size);
void release_frame_slowly(void* frame, std::size_t size);

constexpr std::size_t frame_class(std::size_t size) {
  return (size + kFrameClassBytes - 1) / kFrameClassBytes - 1;
}

}  // namespace detail

// Of at least a byte.
inline void* frame_allocate(std::size_t size) {
  const std::size_t index = detail::frame_class(size);
  if (index < detail::kFrameClasses) [[likely]] {
    detail::FramePool& pool = detail::frame_pool;
    if (detail::FreeFrame* frame = pool.head[index]) [[likely]] {
      pool.head[index] = frame->next;
      --pool.count[index];
      return frame;
    }
  }
  return detail::allocate_frame_slowly(size);
}

inline void frame_release(void* frame, std::size_t size) {
  const std::size_t index = detail::frame_class(size);
  detail::FramePool& pool = detail::frame_pool;
  if (index >= detail::kFrameClasses || !pool.open || pool.count[index] >= kFramesKept)
      [[unlikely]] {
    return detail::release_frame_slowly(frame, size);
  }
  pool.head[index] = new (frame) detail::FreeFrame{pool.head[index]};
  ++pool.count[index];
}

}  // namespace pqblk
