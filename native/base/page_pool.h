// Pages of 4096 bytes, aligned, for caches that hold thousands of them: allocated one by one each
// would take nearly two, since an aligned block leaves a hole behind it.
//
// Room base/. Not thread-safe: its owner's lock guards it. What was taken once is kept for the next
// and goes back to the system with the pool.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <vector>

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
    if (free_.empty()) grow();
    std::uint8_t* const page = free_.back();
    free_.pop_back();
    return page;
  }
  void put(std::uint8_t* page) { free_.push_back(page); }

 private:
  static constexpr std::size_t kChunkPages = 64;  // untouched ones take no memory

  void grow() {
    auto* chunk = static_cast<std::uint8_t*>(
        std::aligned_alloc(kPoolPageBytes, kChunkPages * kPoolPageBytes));
    if (chunk == nullptr) std::abort();
    chunks_.push_back(chunk);
    free_.reserve(chunks_.size() * kChunkPages);
    for (std::size_t i = kChunkPages; i-- > 0;) free_.push_back(chunk + i * kPoolPageBytes);
  }

  std::vector<std::uint8_t*> chunks_;
  std::vector<std::uint8_t*> free_;
};

}  // namespace pqblk
