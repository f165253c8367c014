// A hash map from 64-bit numbers to small movable values: open addressing, linear probing, no
// tombstones. Much smaller and faster than a node map; used for the sealed disk's overlay.
//
// Room base/. Not thread-safe. Pointers to values are invalid after any insertion or erasure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace pqblk {

template <class T>
class FlatMap {
 public:
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

  T* find(std::uint64_t key) {
    if (size_ == 0) return nullptr;
    for (std::size_t i = home(key);; i = (i + 1) & mask_) {
      if (!cells_[i].used) return nullptr;
      if (cells_[i].key == key) return &cells_[i].value;
    }
  }

  // The value for the key, default-made when it was absent.
  T& operator[](std::uint64_t key) {
    if (cells_.empty() || (size_ + 1) * 4 > cells_.size() * 3) grow();
    for (std::size_t i = home(key);; i = (i + 1) & mask_) {
      Cell& cell = cells_[i];
      if (!cell.used) {
        cell.used = true;
        cell.key = key;
        ++size_;
        return cell.value;
      }
      if (cell.key == key) return cell.value;
    }
  }

  bool erase(std::uint64_t key) {
    if (size_ == 0) return false;
    std::size_t i = home(key);
    while (cells_[i].used && cells_[i].key != key) i = (i + 1) & mask_;
    if (!cells_[i].used) return false;
    // Backward shift: close the gap so that every probe chain stays unbroken.
    for (std::size_t j = (i + 1) & mask_; cells_[j].used; j = (j + 1) & mask_) {
      const std::size_t h = home(cells_[j].key);
      if (((j - h) & mask_) >= ((j - i) & mask_)) {
        cells_[i].key = cells_[j].key;
        cells_[i].value = std::move(cells_[j].value);
        i = j;
      }
    }
    cells_[i].used = false;
    cells_[i].value = T{};
    --size_;
    return true;
  }

  template <class F>
  void for_each(F&& f) {
    for (Cell& cell : cells_) {
      if (cell.used) f(cell.key, cell.value);
    }
  }

  void clear() {
    cells_.clear();
    cells_.shrink_to_fit();
    mask_ = 0;
    size_ = 0;
  }

 private:
  struct Cell {
    std::uint64_t key = 0;
    bool used = false;
    T value{};
  };
  static constexpr std::size_t kFirst = 16;

  std::size_t home(std::uint64_t key) const {
    return static_cast<std::size_t>((key * 0x9e3779b97f4a7c15ULL) >> 20) & mask_;
  }
  void grow() {
    std::vector<Cell> old = std::move(cells_);
    cells_ = std::vector<Cell>(old.empty() ? kFirst : old.size() * 2);
    mask_ = cells_.size() - 1;
    size_ = 0;
    for (Cell& cell : old) {
      if (cell.used) (*this)[cell.key] = std::move(cell.value);
    }
  }

  std::vector<Cell> cells_;
  std::size_t mask_ = 0;
  std::size_t size_ = 0;
};

}  // namespace pqblk
