// Memory aligned for O_DIRECT: a 4096-aligned block, owned; and arrays that begin with a line of
// the CPU's cache.
//
// Room base/.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <span>
#include <utility>
#include <vector>

namespace pqblk {

inline constexpr std::size_t kBufferAlign = 4096;

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Zeroed. Aborts when memory is out: callers' sizes are bounded.
  explicit AlignedBuffer(std::size_t size) : size_(size) {
    const std::size_t rounded = (size + kBufferAlign - 1) / kBufferAlign * kBufferAlign;
    data_ = static_cast<std::uint8_t*>(std::aligned_alloc(kBufferAlign, rounded));
    if (data_ == nullptr) std::abort();
    std::memset(data_, 0, rounded);
  }
  AlignedBuffer(AlignedBuffer&& o) noexcept
      : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }
  ~AlignedBuffer() { std::free(data_); }

  std::uint8_t* data() { return data_; }
  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::span<std::uint8_t> span() { return {data_, size_}; }
  std::span<const std::uint8_t> span() const { return {data_, size_}; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

inline constexpr std::size_t kCacheLine = 64;

template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}  // NOLINT: allocators convert
  T* allocate(std::size_t n) {
    return static_cast<T*>(::operator new (n * sizeof(T), std::align_val_t{kCacheLine}));
  }
  void deallocate(T* at, std::size_t) { ::operator delete (at, std::align_val_t{kCacheLine}); }
  bool operator==(const LineAllocator&) const { return true; }
};

// Elements of up to 64 bytes (a power of two) lie in one line each, where a vector's usually lie in
// two: large blocks of malloc begin 16 bytes behind a page's start.
template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

}  // namespace pqblk
