// A bounded cache of table slices (4 KiB pieces of L2 tables or refcount blocks), shared by all
// queues.
//
// Room format/qcow2. Sharded by slice number; a lookup of one word takes no lock when it finds the
// slice in the front table, and else holds one shard's lock for the copy of one entry. A miss is
// loaded once, by the first coroutine that asks; others wait for that load. Pinned and dirty slices
// are never evicted: dirty ones are bounded by the owner (see dirty()), pinned ones by the requests
// in flight.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/endian.h"
#include "base/error.h"
#include "base/front_table.h"
#include "base/page_pool.h"
#include "base/sync.h"
#include "base/task.h"
#include "format/qcow2/meta_io.h"
#include "format/qcow2/readers.h"

namespace pqblk::format::qcow2 {

inline constexpr std::uint64_t kDirtySlicesMax = 1024;  // owners write back beyond it

class SliceCache {
 public:
  struct Slice;

  struct Hooks {
    // Host offset of a slice; 0: its table does not exist (the slice then must not be asked for).
    std::function<HostOffset(std::uint64_t key)> locate;
    // Looks at a freshly loaded slice; true marks it suspect: peek() then never answers from it.
    std::function<bool(std::uint64_t key, const std::uint8_t* data)> suspect;
    // For peek_word(), null without it. The slices are words, changed as a whole, most of which
    // count up by `step` from one to the next, as those of a table do that was filled in order:
    // whether a word is of that kind. What holds for the first and last of a run holds for all.
    std::function<bool(std::uint64_t word)> counts;
    std::uint64_t step = 0;
  };

  SliceCache(MetaIo& meta, Part part, std::uint32_t slice_bytes, std::uint64_t bytes_max,
             Hooks hooks);
  ~SliceCache();
  SliceCache(const SliceCache&) = delete;

  // A slice held in memory. Released where it dies, on any thread.
  class Pin {
   public:
    Pin() = default;
    Pin(SliceCache* cache, Slice* slice) : cache_(cache), slice_(slice) {}
    Pin(Pin&& o) noexcept
        : cache_(std::exchange(o.cache_, nullptr)), slice_(std::exchange(o.slice_, nullptr)) {}
    Pin& operator=(Pin&& o) noexcept {
      std::swap(cache_, o.cache_);
      std::swap(slice_, o.slice_);
      return *this;
    }
    ~Pin() {
      if (slice_ != nullptr) cache_->unpin(slice_);
    }
    // Reading without a lock is for owners who exclude their own updates; others use copy_out.
    const std::uint8_t* data() const;
    void copy_out(std::size_t offset, void* to, std::size_t size) const;
    // Changes bytes. `dirty`: to be written back by stage(); else the caller writes them home.
    void update(std::size_t offset, const void* from, std::size_t size, bool dirty);

   private:
    SliceCache* cache_ = nullptr;
    Slice* slice_ = nullptr;
  };

  // The fastest path, without a lock: a word of a slice that peek() would answer from; false when
  // it is not at hand, though peek() may have it. Of a run of words that count up only the first is
  // looked at: all runs of a disk fit a cache nearer to the CPU than its tables. `queue` is the
  // caller's: nobody else counts under that number.
  bool peek_word(std::uint64_t key, std::size_t offset, std::uint32_t queue, std::uint64_t& word) {
    const FrontTable::Found run = runs_.find(run_of(key, offset));
    if (run.value != 0 && run.holds()) {
      word = run.value + offset % kRunBytes / 8 * hooks_.step;
    } else {
      const FrontTable::Found found = front_.find(key);
      if (found.value == 0) return false;
      word = byte_swap(load_word(found.page() + offset));
      if (!found.holds()) return false;
    }
    front_hits_[queue].add();
    return true;
  }
  // The fast path: copies bytes of a cached, trusted slice; false when it has to be loaded.
  bool peek(std::uint64_t key, std::size_t offset, void* to, std::size_t size);
  Task<Result<Pin>> pin(io::Queue& q, std::uint64_t key);

  // Write-back in two steps, so that the caller can sync in between: stage() copies all dirty
  // slices as they are now and marks them clean; write() sends the copies home (a slice changed
  // since is dirty again and goes with the next stage). On an error they become dirty again.
  class Staged {
   public:
    bool empty() const { return slices_.empty(); }

   private:
    friend class SliceCache;
    struct Copy {
      std::uint64_t key;
      Slice* slice;  // pinned
      const std::uint8_t* copy;
    };
    std::vector<Copy> slices_;  // by key
    std::vector<AlignedBuffer> chunks_;
  };
  Staged stage();
  Task<Error> write(io::Queue& q, Staged& staged);
  void restore(Staged& staged);  // instead of write(): makes them dirty again

  std::uint64_t dirty() const { return dirty_.load(std::memory_order_relaxed); }
  // Forgets slices (of a table that was freed, or everything when count is 0); none may be pinned.
  void forget(std::uint64_t first_key, std::uint64_t count);

  std::uint64_t hits() const;
  std::uint64_t misses() const { return misses_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::size_t kShards = 64;
  struct Shard;

  Shard& shard(std::uint64_t key);
  void unpin(Slice* slice);
  Slice* find(Shard& shard, std::uint64_t key);
  Slice* insert(Shard& shard, std::uint64_t key);
  void evict_one(Shard& shard);
  void remove(Shard& shard, Slice* slice);
  void drop(Slice* slice);
  static constexpr std::size_t kRunBytes = 512;  // 64 words; no slice is smaller
  std::uint64_t run_of(std::uint64_t key, std::size_t offset) const {
    return key * (slice_bytes_ / kRunBytes) + offset / kRunBytes;
  }
  void publish(const Slice& slice, std::size_t from, std::size_t to);
  void withdraw(const Slice& slice);
  bool take_used(const Slice& slice);

  MetaIo& meta_;
  const Part part_;
  const std::uint32_t slice_bytes_;
  const std::uint64_t shard_slices_max_;
  const Hooks hooks_;
  PagePool memory_;
  PagePool landing_;  // for loads: front_'s readers may still look at a page of memory_
  FrontTable front_;  // pages by slice
  FrontTable runs_;   // first words by run
  std::array<OwnCount, kReaderQueuesMax> front_hits_;
  std::unique_ptr<Shard[]> shards_;
  std::atomic<std::uint64_t> dirty_{0};
  std::atomic<std::uint64_t> misses_{0};
};

}  // namespace pqblk::format::qcow2
