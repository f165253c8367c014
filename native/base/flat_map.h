// A hash map from 64-bit numbers to small movable values: open addressing, linear probing, no
// tombstones. Much smaller and faster than a node map; used for the sealed disk's overlay.
//
// Room base/. Not thread-safe. Keys lie apart from the values, eight in a cache line: a look-up
// that finds nothing touches one line. Pointers to values are invalid after any insertion or
// erasure.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/aligned.h"

namespace pqblk {

template <class T>
class FlatMap {
 public:
  static constexpr std::uint64_t kNoKey = ~std::uint64_t{0};  // never a key

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

  T* find(std::uint64_t key) {
    if (size_ == 0) return nullptr;
    for (std::size_t i = home(key); keys_[i] != kNoKey; i = (i + 1) & mask_) {
      if (keys_[i] == key) return &values_[i];
    }
    return nullptr;
  }

  // Brings the places where the key would be near the CPU, without waiting for them.
  void prefetch(std::uint64_t key) const {
    if (keys_.empty()) return;
    const std::size_t i = home(key);
    __builtin_prefetch(&keys_[i]);
    __builtin_prefetch(&values_[i]);
  }

  // The value for the key, default-made when it was absent.
  T& operator[](std::uint64_t key) {
    assert(key != kNoKey);
    if ((size_ + 1) * 4 > keys_.size() * 3) grow();
    for (std::size_t i = home(key);; i = (i + 1) & mask_) {
      if (keys_[i] == key) return values_[i];
      if (keys_[i] == kNoKey) {
        keys_[i] = key;
        ++size_;
        return values_[i];
      }
    }
  }

  bool erase(std::uint64_t key) {
    if (size_ == 0) return false;
    std::size_t i = home(key);
    while (keys_[i] != kNoKey && keys_[i] != key) i = (i + 1) & mask_;
    if (keys_[i] == kNoKey) return false;
    // Backward shift: close the gap so that every probe chain stays unbroken.
    for (std::size_t j = (i + 1) & mask_; keys_[j] != kNoKey; j = (j + 1) & mask_) {
      const std::size_t h = home(keys_[j]);
      if (((j - h) & mask_) >= ((j - i) & mask_)) {
        keys_[i] = keys_[j];
        values_[i] = std::move(values_[j]);
        i = j;
      }
    }
    keys_[i] = kNoKey;
    values_[i] = T{};
    --size_;
    return true;
  }

  template <class F>
  void for_each(F&& f) {
    for (std::size_t i = 0; i < keys_.size(); ++i) {
      if (keys_[i] != kNoKey) f(keys_[i], values_[i]);
    }
  }

  // Gives the memory back.
  void clear() {
    keys_ = LineVector<std::uint64_t>();
    values_ = LineVector<T>();
    mask_ = 0;
    size_ = 0;
  }

 private:
  static constexpr std::size_t kFirst = 16;

  std::size_t home(std::uint64_t key) const {
    return static_cast<std::size_t>((key * 0x9e3779b97f4a7c15ULL) >> 20) & mask_;
  }
  void grow() {
    const LineVector<std::uint64_t> old_keys = std::move(keys_);
    LineVector<T> old_values = std::move(values_);
    const std::size_t cells = old_keys.empty() ? kFirst : old_keys.size() * 2;
    keys_ = LineVector<std::uint64_t>(cells, kNoKey);
    values_ = LineVector<T>(cells);
    mask_ = cells - 1;
    size_ = 0;
    for (std::size_t i = 0; i < old_keys.size(); ++i) {
      if (old_keys[i] != kNoKey) (*this)[old_keys[i]] = std::move(old_values[i]);
    }
  }

  LineVector<std::uint64_t> keys_;  // kNoKey: an empty cell
  LineVector<T> values_;
  std::size_t mask_ = 0;
  std::size_t size_ = 0;
};

}  // namespace pqblk
