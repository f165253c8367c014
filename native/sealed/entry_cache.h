// A bounded cache of home entries, in pages of 4096 bytes (128 sectors).
//
// Room sealed/. It holds exactly what the home places say (newer versions are in the overlay). Only
// the checkpoint changes a page, and only while it pins it. Sharded; a look-up of one entry takes
// no lock when it finds the page in the front table, and else holds one shard's lock for the copy
// of a few entries. A miss is loaded once, by the first who asks.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/flat_map.h"
#include "base/front_table.h"
#include "base/page_pool.h"
#include "base/short_lock.h"
#include "base/sync.h"
#include "base/task.h"
#include "format/qcow2/readers.h"
#include "io/queue.h"
#include "sealed/layout.h"

namespace pqblk::sealed {

class EntryCache {
 public:
  // The raw L2 entry at home for an entry slot (no overlay).
  using HomeMapping = std::function<Task<Result<std::uint64_t>>(io::Queue&, Slot)>;

  EntryCache(const SealedGeometry& geometry, const io::File& file, std::uint64_t bytes_max,
             HomeMapping home);
  ~EntryCache();
  EntryCache(const EntryCache&) = delete;

  struct Page;
  class Pin {
   public:
    Pin() = default;
    Pin(EntryCache* cache, Page* page) : cache_(cache), page_(page) {}
    Pin(Pin&& o) noexcept
        : cache_(std::exchange(o.cache_, nullptr)), page_(std::exchange(o.page_, nullptr)) {}
    Pin& operator=(Pin&& o) noexcept {
      std::swap(cache_, o.cache_);
      std::swap(page_, o.page_);
      return *this;
    }
    ~Pin() {
      if (page_ != nullptr) cache_->unpin(page_);
    }
    void read(std::uint32_t index, std::uint32_t count, Entry* out) const;
    void update(std::uint32_t index, const Entry& entry);
    void replace(const std::uint8_t* bytes);  // all of it
    const std::uint8_t* bytes() const;        // stable: only the checkpoint, the caller, updates

   private:
    EntryCache* cache_ = nullptr;
    Page* page_ = nullptr;
  };

  std::uint64_t page_of(Sector s) const { return page_at(geometry_.entry_place(s)); }
  std::uint64_t page_at(const EntryPlace& entry) const {
    return entry.slot.value * pages_per_cluster_ + entry.offset / kPage;
  }
  static std::uint32_t index_in_page(std::uint64_t entry_offset) {
    return static_cast<std::uint32_t>(entry_offset % kPage / sizeof(Entry));
  }
  std::uint64_t first_page(Slot entry_slot) const { return entry_slot.value * pages_per_cluster_; }
  std::uint64_t pages_per_cluster() const { return pages_per_cluster_; }

  // The fast path: copies `count` entries from one page; false when the page is not in memory.
  bool peek(std::uint64_t page, std::uint32_t index, std::uint32_t count, Entry* out);
  // The same for one entry, in two steps: seek() brings it near the CPU without waiting for it, and
  // peek() reads what it is by then. `queue` is the caller's: nobody else counts under that number.
  bool seek(std::uint64_t page, std::uint32_t index, FrontTable::Found& found);
  bool peek(std::uint64_t page, std::uint32_t index, const FrontTable::Found& found,
            std::uint32_t queue, Entry& out);
  // A page that is not in memory comes in one read with those that follow it, up to the first that
  // is there, to `run` pages, kRunMax, or the end of its entry cluster. They are not pinned.
  static constexpr std::size_t kRunMax = 16;
  Task<Result<Pin>> pin(io::Queue& io, std::uint64_t page, std::uint64_t run = 1);
  // Whether one of the last few loads ended just before this page: a stream comes along.
  bool continues_run(std::uint64_t page) const;
  // Pins a page only when it is in memory or being loaded; an empty optional otherwise.
  Task<Result<std::pair<bool, Pin>>> pin_if_present(io::Queue& io, std::uint64_t page);

  std::uint64_t hits() const;
  std::uint64_t misses() const { return misses_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::size_t kShards = 64;
  struct alignas(64) Shard {
    mutable ShortLock mutex;
    FlatMap<Page*> pages;
    Page* newest = nullptr;  // ring of unpinned, loaded pages: newest ... oldest
    std::uint64_t hits = 0;
  };
  Shard& shard(std::uint64_t page) { return shards_[(page * 0x9e3779b97f4a7c15ULL) >> 58]; }
  Page* claim(Shard& shard, std::uint64_t page);  // for the caller to load; under the shard's mutex
  bool abandon(Page* page);
  Task<Error> fetch(io::Queue& io, std::uint64_t home, std::uint64_t first,
                    std::span<std::uint8_t* const> landed);
  void settle(Page* page, const std::uint8_t* landed, Error error);
  Task<void> load(io::Queue& io, std::span<Page* const> pages);
  Page* loaded_page(Shard& shard, std::uint64_t page);  // null: not in memory
  void unpin(Page* page);
  void link(Shard& shard, Page* page);
  void unlink(Shard& shard, Page* page);
  void drop(Page* page);
  void evict(Shard& shard);
  Task<Result<Pin>> wait_loaded(io::Queue& io, Page* page);

  const SealedGeometry& geometry_;
  const io::File& file_;
  const std::uint64_t pages_per_cluster_;
  const std::size_t shard_pages_max_;
  HomeMapping home_;
  PagePool memory_;
  PagePool landing_;  // for loads: front_'s readers may still look at a page of memory_
  FrontTable front_;
  std::array<OwnCount, format::qcow2::kReaderQueuesMax> front_hits_;
  std::array<Shard, kShards> shards_;
  std::atomic<std::uint64_t> misses_{0};  // pages
  std::array<std::atomic<std::uint64_t>, 16> run_ends_{};
  std::atomic<std::uint32_t> run_ends_next_{0};
};

// The content of an entry page whose cluster is not there: all never, or all zero.
void fill_base(std::uint8_t* bytes, std::size_t size, bool zero);

}  // namespace pqblk::sealed
