// Frames of coroutines: kept for the next one, given back with the thread.
#include "base/frame_pool.h"

#include <doctest/doctest.h>

#include <cstring>
#include <set>
#include <thread>
#include <vector>

using pqblk::frame_allocate;
using pqblk::frame_release;

TEST_CASE("a frame is used again by what fits into its class") {
  std::thread([] {
    void* const first = frame_allocate(100);
    std::memset(first, 1, 100);
    frame_release(first, 100);
    CHECK(frame_allocate(128) == first);  // of the same class
    void* const other = frame_allocate(129);
    CHECK(other != first);
    frame_release(first, 128);
    frame_release(other, 129);
    CHECK(frame_allocate(1) == first);
    CHECK(frame_allocate(256) == other);
    frame_release(first, 1);
    frame_release(other, 256);
  }).join();
}

TEST_CASE("more frames than are kept, of every size, and another thread gives them back") {
  constexpr std::size_t kCount = pqblk::kFramesKept + 10;
  for (const std::size_t size : {1U, 127U, 1000U, 2048U, 2049U, 100'000U}) {
    std::vector<void*> frames;
    for (std::size_t i = 0; i < kCount; ++i) {
      frames.push_back(frame_allocate(size));
      std::memset(frames.back(), 2, size);
    }
    CHECK(std::set<void*>(frames.begin(), frames.end()).size() == kCount);
    std::thread([&] {
      for (void* frame : frames) frame_release(frame, size);
    }).join();
  }
}
