// Ciphertext in memory: aligned, counted buffers shared by a write in flight, the overlay and the
// write home.
//
// Room sealed/. Thread-safe. Free buffers are kept by size class, bounded; the bytes live are
// counted so that the owner can stop retaining what can be read back from the log. Those of one
// page, most of them, come from a pool of pages and stay with it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "base/page_pool.h"
#include "base/short_lock.h"
#include "base/units.h"

namespace pqblk::sealed {

class CipherPool {
 public:
  static constexpr std::size_t kClasses = 9;  // 4 KiB << 0 .. 8: up to 1 MiB
  static constexpr std::size_t kSizeMax = std::size_t{4096} << (kClasses - 1);

  explicit CipherPool(std::uint64_t kept_max) : kept_max_(kept_max) {}
  ~CipherPool();
  CipherPool(const CipherPool&) = delete;

  struct Buffer {
    std::atomic<std::uint32_t> references{1};
    std::uint32_t size_class = 0;
    std::uint8_t* data = nullptr;
    CipherPool* pool = nullptr;
  };

  // At least `size` bytes (<= kSizeMax), one reference, uninitialised.
  Buffer* take(std::size_t size);
  std::uint64_t live_bytes() const { return live_.load(std::memory_order_relaxed); }

 private:
  friend class CipherRef;
  friend class CipherReturns;
  void put(Buffer* buffer);
  static void release(Buffer* buffer);

  const std::uint64_t kept_max_;
  std::atomic<std::uint64_t> live_{0};
  ShortLock mutex_;
  PagePool pages_;
  std::uint64_t kept_ = 0;
  std::array<std::vector<Buffer*>, kClasses> free_;
};

// A counted reference to one place inside a buffer; empty = no ciphertext in memory.
class CipherRef {
 public:
  CipherRef() = default;
  // Takes over one reference.
  CipherRef(CipherPool::Buffer* buffer, std::uint8_t* at) : buffer_(buffer), at_(at) {}
  CipherRef(const CipherRef& o) : buffer_(o.buffer_), at_(o.at_) { retain(); }
  CipherRef(CipherRef&& o) noexcept
      : buffer_(std::exchange(o.buffer_, nullptr)), at_(std::exchange(o.at_, nullptr)) {}
  CipherRef& operator=(CipherRef o) noexcept {
    std::swap(buffer_, o.buffer_);
    std::swap(at_, o.at_);
    return *this;
  }
  ~CipherRef() { reset(); }

  explicit operator bool() const { return buffer_ != nullptr; }
  std::uint8_t* data() const { return at_; }
  // The same buffer, another place.
  CipherRef at(std::size_t offset) const {
    retain();
    return CipherRef(buffer_, at_ + offset);
  }
  void reset() {
    CipherPool::Buffer* b = std::exchange(buffer_, nullptr);
    if (b != nullptr && b->references.fetch_sub(1, std::memory_order_acq_rel) == 1) b->pool->put(b);
    at_ = nullptr;
  }

 private:
  friend class CipherShares;
  friend class CipherReturns;
  void retain() const {
    if (buffer_ != nullptr) buffer_->references.fetch_add(1, std::memory_order_relaxed);
  }
  CipherPool::Buffer* buffer_ = nullptr;
  std::uint8_t* at_ = nullptr;
};

// The sectors of a write have one buffer, and each atomic change of its count would wait for all
// stores before it: their references are taken together, and given back together.
class CipherShares {
 public:
  // For sectors one after the other, of which the first has `of`: next() has one for each.
  CipherShares(const CipherRef& of, std::size_t count)
      : buffer_(of.buffer_), at_(of.at_), left_(static_cast<std::uint32_t>(count)) {
    if (buffer_ != nullptr) buffer_->references.fetch_add(left_, std::memory_order_relaxed);
  }
  CipherShares(const CipherShares&) = delete;
  CipherShares& operator=(const CipherShares&) = delete;
  ~CipherShares() {
    while (left_ > 0) next();
  }
  CipherRef next() {
    --left_;
    if (buffer_ == nullptr) return {};
    return CipherRef(buffer_, std::exchange(at_, at_ + kSectorSize));
  }

 private:
  CipherPool::Buffer* buffer_;
  std::uint8_t* at_;
  std::uint32_t left_;
};

class CipherReturns {
 public:
  CipherReturns() = default;
  CipherReturns(const CipherReturns&) = delete;
  CipherReturns& operator=(const CipherReturns&) = delete;
  ~CipherReturns() { give_back(); }
  void add(CipherRef& ref) {
    if (ref.buffer_ == nullptr) return;
    if (ref.buffer_ != buffer_) give_back();
    buffer_ = std::exchange(ref.buffer_, nullptr);
    ref.at_ = nullptr;
    ++count_;
  }

 private:
  void give_back() {
    CipherPool::Buffer* const b = std::exchange(buffer_, nullptr);
    const std::uint32_t count = std::exchange(count_, 0);
    if (b == nullptr) return;
    if (b->references.fetch_sub(count, std::memory_order_acq_rel) == count) b->pool->put(b);
  }
  CipherPool::Buffer* buffer_ = nullptr;
  std::uint32_t count_ = 0;
};

inline CipherRef take_cipher(CipherPool& pool, std::size_t size) {
  CipherPool::Buffer* b = pool.take(size);
  return CipherRef(b, b->data);
}

}  // namespace pqblk::sealed
