// Memory for coroutine frames: per-thread free lists by size class, so that a request on a warm
// queue allocates nothing.
//
// Room base/. A frame may be released on another thread than the one that made it; it then joins
// that thread's list. Each list has a bound (kFramesKept), beyond it frames go back to the heap.
#pragma once

#include <cstddef>

namespace pqblk {

inline constexpr std::size_t kFramesKept = 512;  // per size class and thread

void* frame_allocate(std::size_t size);
void frame_release(void* frame, std::size_t size);

}  // namespace pqblk
