// Pages of 4096 bytes, aligned, for caches that hold thousands of them: allocated one by one each
// would take nearly two, since an aligned block leaves a hole behind it.
//
// Room base/. Thread-safe: the shards of a cache share one. What was taken once is kept for the
// next and goes back to the system with the pool. A pool that has grown goes on in huge pages,
// where the system has them: a look-up in a large cache is a wait for memory, and without them for
// the translation of the address as well.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "base/short_lock.h"

namespace pqblk {

inline constexpr std::size_t kPoolPageBytes = 4096;

class PagePool {
 public:
  PagePool() = default;
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;
  ~PagePool() {
    for (std::uint8_t* chunk : chunks_) std::free(chunk);
  }

  // Uninitialised. Aborts when memory is out: the owners' caches are bounded.
  std::uint8_t* take() {
    std::lock_guard guard(lock_);
    if (free_.empty()) grow();
    std::uint8_t* const page = free_.back();
    free_.pop_back();
    return page;
  }
  void put(std::uint8_t* page) {
    std::lock_guard guard(lock_);
    free_.push_back(page);
  }

 private:
  static constexpr std::size_t kSmallChunk = std::size_t{256} << 10;  // untouched: no memory
  static constexpr std::size_t kHugeChunk = std::size_t{2} << 20;
  static constexpr std::size_t kSmallChunks = kHugeChunk / kSmallChunk;

  void grow() {
    const bool huge = chunks_.size() >= kSmallChunks;
    const std::size_t bytes = huge ? kHugeChunk : kSmallChunk;
    auto* chunk =
        static_cast<std::uint8_t*>(std::aligned_alloc(huge ? kHugeChunk : kPoolPageBytes, bytes));
    if (chunk == nullptr) std::abort();
    if (huge) ::madvise(chunk, bytes, MADV_HUGEPAGE);  // a hint: no harm when refused
    chunks_.push_back(chunk);
    pages_ += bytes / kPoolPageBytes;
    free_.reserve(pages_);
    for (std::size_t at = bytes; at > 0; at -= kPoolPageBytes) {
      free_.push_back(chunk + at - kPoolPageBytes);
    }
  }

  ShortLock lock_;
  std::vector<std::uint8_t*> chunks_;
  std::vector<std::uint8_t*> free_;
  std::size_t pages_ = 0;
};

}  // namespace pqblk
