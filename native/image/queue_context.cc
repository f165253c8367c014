// The aligned memory of one queue: a small arena that the ring knows, and free lists of powers of
// two.
//
// Room image/. Used from the queue's own thread only, hence no lock. What is kept has a bound
// (kPooledBytesKept); the arena never shrinks and dies with the context.
#include <algorithm>
#include <bit>
#include <cassert>
#include <cstdlib>
#include <new>

#include "image/backend.h"

namespace pqblk::image {
namespace {

constexpr std::size_t kAlign = 4096;

std::size_t class_of(std::size_t size) {  // 0: 4 KiB, 1: 8 KiB, ...
  const std::size_t rounded = std::bit_ceil(std::max(size, kAlign));
  return static_cast<std::size_t>(std::countr_zero(rounded) - std::countr_zero(kAlign));
}

std::uint8_t* aligned_memory(std::size_t size) {
  void* data = std::aligned_alloc(kAlign, align_up(size, kAlign));
  if (data == nullptr) std::abort();  // buffers are bounded by the requests in flight
  return static_cast<std::uint8_t*>(data);
}

}  // namespace

std::span<std::uint8_t> QueueContext::arena() {
  if (arena_ == nullptr) arena_ = aligned_memory(kArenaBytes);
  return {arena_, kArenaBytes};
}

QueueContext::~QueueContext() {
  for (FreeList& list : free_) {
    while (FreeBuffer* buffer = list.head) {
      list.head = buffer->next;
      auto* data = reinterpret_cast<std::uint8_t*>(buffer);
      if (!in_arena(data)) std::free(data);
    }
  }
  std::free(arena_);
}

QueueContext::Buffer QueueContext::buffer(std::size_t size) {
  if (size > kPooledBufferMax) return {this, aligned_memory(size), size};
  const std::size_t size_class = class_of(size);
  FreeList& list = free_[size_class];
  if (FreeBuffer* buffer = list.head) {
    list.head = buffer->next;
    auto* data = reinterpret_cast<std::uint8_t*>(buffer);
    if (!in_arena(data)) kept_ -= kAlign << size_class;
    return {this, data, size};
  }
  const std::size_t whole = kAlign << size_class;
  if (whole <= kArenaBufferMax && arena_used_ + whole <= kArenaBytes) {
    std::uint8_t* data = arena().data() + arena_used_;
    arena_used_ += whole;
    return {this, data, size};
  }
  return {this, aligned_memory(whole), size};
}

void QueueContext::release(std::uint8_t* data, std::size_t size) {
  if (size > kPooledBufferMax) {
    std::free(data);
    return;
  }
  const std::size_t size_class = class_of(size);
  if (!in_arena(data)) {
    const std::size_t whole = kAlign << size_class;
    if (kept_ + whole > kPooledBytesKept) {
      std::free(data);
      return;
    }
    kept_ += whole;
  }
  FreeList& list = free_[size_class];
  list.head = new (data) FreeBuffer{list.head};
}

}  // namespace pqblk::image
