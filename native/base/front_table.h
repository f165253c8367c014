// What a cache knows of a key in one word, above all where its page lies, for look-ups without a
// lock.
//
// Room base/. It stands before a cache that has its own map under locks: what is not found here is
// looked up there, and what is not in the cache any more is withdrawn here before its memory serves
// another page. Three keys share one cache line and one version, which every change raises: a
// reader takes note of the version, reads from the page, and has read nothing when the version is
// another by then. Pages therefore are read and written in whole words of 8 bytes (load_word,
// store_words), and their memory stays mapped as long as the table is.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cassert>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "base/short_lock.h"

namespace pqblk {

// Of memory that others may be writing: such a word is the old one or the new one.
inline std::uint64_t load_word(const std::uint8_t* at) {
  auto* word = reinterpret_cast<std::uint64_t*>(const_cast<std::uint8_t*>(at));
  return std::atomic_ref(*word).load(std::memory_order_acquire);
}

// `size` is a multiple of 8, `to` aligned accordingly.
inline void store_words(std::uint8_t* to, const void* from, std::size_t size) {
  const auto* bytes = static_cast<const std::uint8_t*>(from);
  for (std::size_t at = 0; at < size; at += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes + at, sizeof word);
    std::atomic_ref(*reinterpret_cast<std::uint64_t*>(to + at))
        .store(word, std::memory_order_release);
  }
}

// A number that one thread raises and others may read.
struct alignas(64) OwnCount {
  std::atomic<std::uint64_t> value{0};
  void add() { value.store(value.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); }
};

template <std::size_t N>
std::uint64_t sum_of(const std::array<OwnCount, N>& counts) {
  std::uint64_t sum = 0;
  for (const OwnCount& own : counts) sum += own.value.load(std::memory_order_relaxed);
  return sum;
}

class FrontTable {
  static constexpr std::size_t kWays = 3;
  struct alignas(64) Set {
    std::atomic<std::uint64_t> version;                  // odd: being changed
    std::array<std::atomic<std::uint64_t>, kWays> keys;  // plus one; 0: none
    std::array<std::atomic<std::uint64_t>, kWays> values;
    std::array<std::atomic<bool>, kWays> used;  // since take_used() looked
    ShortLock lock;                             // of whoever changes it
  };
  static_assert(sizeof(Set) == 64);
  static constexpr std::size_t kNear = 4096 / sizeof(Set);  // at most: a page of memory

 public:
  // What a look-up found, unless it is 0, as long as holds() says so.
  class Found {
   public:
    std::uint64_t value = 0;
    const std::uint8_t* page() const {
      return reinterpret_cast<const std::uint8_t*>(static_cast<std::uintptr_t>(value));
    }
    bool holds() const { return set_->version.load(std::memory_order_relaxed) == version_; }

   private:
    friend class FrontTable;
    const Set* set_ = nullptr;
    std::uint64_t version_ = 0;
  };

  // For about so many keys; 0: it never finds anything. Untouched it takes no memory.
  explicit FrontTable(std::size_t keys) {
    if (keys == 0) return;
    const std::size_t sets = std::bit_ceil(std::max<std::size_t>(keys, 2));
    const std::size_t near = std::min(sets / 2, kNear);
    near_bits_ = static_cast<unsigned>(std::countr_zero(near));
    near_mask_ = near - 1;
    shift_ = 64 - static_cast<unsigned>(std::countr_zero(sets));
    bytes_ = sets * sizeof(Set);
    void* memory =
        ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();  // bounded by the owner's cache
    sets_ = static_cast<Set*>(memory);       // of zeros: empty sets
  }
  ~FrontTable() {
    if (sets_ != nullptr) ::munmap(sets_, bytes_);
  }
  FrontTable(const FrontTable&) = delete;
  FrontTable& operator=(const FrontTable&) = delete;

  // ---- any thread ----
  Found find(std::uint64_t key) const {
    Found found;
    if (sets_ == nullptr) return found;
    Set& set = set_of(key);
    found.set_ = &set;
    found.version_ = set.version.load(std::memory_order_acquire);
    if ((found.version_ & 1) != 0) return found;
    for (std::size_t way = 0; way < kWays; ++way) {
      if (set.keys[way].load(std::memory_order_acquire) != key + 1) continue;
      found.value = set.values[way].load(std::memory_order_acquire);
      if (!set.used[way].load(std::memory_order_relaxed)) {
        set.used[way].store(true, std::memory_order_relaxed);
      }
      break;
    }
    return found;
  }

  // ---- the rest: the caller excludes other changes of this key ----

  // Of a key that is in the cache; not 0. It may find no room among others that are in use.
  void publish(std::uint64_t key, const std::uint8_t* page) {
    publish(key, static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(page)));
  }
  void publish(std::uint64_t key, std::uint64_t value) {
    if (sets_ == nullptr || find(key).value == value) return;
    Change change(set_of(key));
    std::array<std::atomic<std::uint64_t>, kWays>& keys = change.set.keys;
    std::size_t place = kWays;
    for (std::size_t way = 0; way < kWays; ++way) {
      const std::uint64_t other = keys[way].load(std::memory_order_relaxed);
      if (other == 0) place = way;
      if (other == key + 1) {
        place = way;
        break;
      }
    }
    for (std::size_t way = 0; way < kWays && place == kWays; ++way) {
      if (!change.set.used[way].exchange(false, std::memory_order_relaxed)) place = way;
    }
    if (place == kWays) return;
    change.set.values[place].store(value, std::memory_order_release);
    keys[place].store(key + 1, std::memory_order_release);
  }

  // No reader finds it after this, nor believes what it reads from its page from now on.
  void withdraw(std::uint64_t key) {
    if (sets_ == nullptr) return;
    Change change(set_of(key));
    for (std::atomic<std::uint64_t>& other : change.set.keys) {
      if (other.load(std::memory_order_relaxed) == key + 1) {
        other.store(0, std::memory_order_release);
      }
    }
  }

  // Whether it was found since the last time.
  bool take_used(std::uint64_t key) {
    if (sets_ == nullptr) return false;
    Set& set = set_of(key);
    for (std::size_t way = 0; way < kWays; ++way) {
      if (set.keys[way].load(std::memory_order_relaxed) != key + 1) continue;
      return set.used[way].exchange(false, std::memory_order_relaxed);
    }
    return false;
  }

  // Readers of this page find nothing while it lives, and what they were reading does not hold: for
  // a change of several words. Precondition: a table that finds anything.
  class Change {
   public:
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;
    ~Change() { set.version.store(version_ + 2, std::memory_order_release); }

   private:
    friend class FrontTable;
    explicit Change(Set& s)
        : set(s), guard_(s.lock), version_(s.version.load(std::memory_order_relaxed)) {
      // What is stored next, each time in release order, is seen after this.
      set.version.store(version_ + 1, std::memory_order_relaxed);
    }
    Set& set;
    std::lock_guard<ShortLock> guard_;
    const std::uint64_t version_;
  };
  Change change(std::uint64_t key) { return Change(set_of(key)); }

 private:
  // Two neighbours, which are often asked for together, share a set, and as many as fill a page of
  // memory lie in one, so that a working set takes few places of the CPU's address cache. Where in
  // that page depends on the hash as well: keys with a stride would meet in one place of every
  // page.
  Set& set_of(std::uint64_t key) const {
    const std::uint64_t pair = key >> 1;
    const std::uint64_t first = ((pair >> near_bits_) * 0x9e3779b97f4a7c15ULL) >> shift_;
    return sets_[first ^ (pair & near_mask_)];
  }

  Set* sets_ = nullptr;
  std::size_t bytes_ = 0;
  unsigned near_bits_ = 0;
  std::uint64_t near_mask_ = 0;
  unsigned shift_ = 63;
};

}  // namespace pqblk
