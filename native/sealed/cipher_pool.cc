#include "sealed/cipher_pool.h"

#include <bit>
#include <cassert>
#include <cstdlib>

namespace pqblk::sealed {

CipherPool::~CipherPool() {
  for (auto& list : free_) {
    for (Buffer* b : list) release(b);
  }
}

CipherPool::Buffer* CipherPool::take(std::size_t size) {
  assert(size > 0 && size <= kSizeMax);
  const auto size_class = static_cast<std::uint32_t>(std::bit_width((size - 1) / 4096));
  const std::size_t bytes = std::size_t{4096} << size_class;
  live_.fetch_add(bytes, std::memory_order_relaxed);
  std::uint8_t* page = nullptr;
  {
    std::lock_guard guard(mutex_);
    auto& list = free_[size_class];
    if (!list.empty()) {
      Buffer* b = list.back();
      list.pop_back();
      kept_ -= bytes;
      b->references.store(1, std::memory_order_relaxed);
      return b;
    }
    if (size_class == 0) page = pages_.take();
  }
  auto* b = new Buffer;
  b->size_class = size_class;
  b->data = page != nullptr ? page : static_cast<std::uint8_t*>(std::aligned_alloc(4096, bytes));
  if (b->data == nullptr) std::abort();  // bounded by requests in flight and the overlay's limit
  b->pool = this;
  return b;
}

void CipherPool::put(Buffer* buffer) {
  const std::size_t bytes = std::size_t{4096} << buffer->size_class;
  live_.fetch_sub(bytes, std::memory_order_relaxed);
  {
    std::lock_guard guard(mutex_);
    if (buffer->size_class == 0 || kept_ + bytes <= kept_max_) {
      kept_ += bytes;
      free_[buffer->size_class].push_back(buffer);
      return;
    }
  }
  release(buffer);
}

// A page stays with the pool of pages, which goes with this pool.
void CipherPool::release(Buffer* buffer) {
  if (buffer->size_class != 0) std::free(buffer->data);
  delete buffer;
}

}  // namespace pqblk::sealed
