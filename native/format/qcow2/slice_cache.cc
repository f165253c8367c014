#include "format/qcow2/slice_cache.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "base/page_pool.h"
#include "base/short_lock.h"

namespace pqblk::format::qcow2 {
namespace {

constexpr std::size_t kBuckets = 256;                   // per shard
constexpr std::size_t kGatherBytes = 64 * kKiB;         // adjacent slices go home in one write
constexpr std::uint64_t kSliceMemory = kPoolPageBytes;  // what a slice takes, whatever its size
static_assert(kSliceBytesMax <= kSliceMemory);

}  // namespace

struct SliceCache::Slice {
  enum class State : std::uint8_t { loading, ready, failed };

  std::uint64_t key = 0;
  std::uint8_t* bytes = nullptr;  // of memory_
  State state = State::loading;
  bool dirty = false;
  bool suspect = false;
  bool referenced = false;
  std::uint32_t pins = 0;
  std::size_t clock_index = 0;
  Slice* bucket_next = nullptr;
  Waiter* waiters = nullptr;
  Error error;
};

struct alignas(64) SliceCache::Shard {
  ShortLock mutex;
  std::array<Slice*, kBuckets> buckets{};
  std::vector<Slice*> clock;  // every slice in the table
  std::size_t hand = 0;
  std::size_t dirty = 0;
  std::uint64_t hits = 0;
};

namespace {

// Slices that are a power of two apart, as a guest's large files make them, shall not meet in one
// shard and evict each other: the top bits of this choose the shard, the next ones the bucket.
constexpr std::uint64_t spread(std::uint64_t key) { return key * 0x9e3779b97f4a7c15ULL; }
constexpr unsigned kShardShift = 58, kBucketShift = 50;

std::size_t bucket_of(std::uint64_t key) {
  return static_cast<std::size_t>((spread(key) >> kBucketShift) % kBuckets);
}

}  // namespace

SliceCache::SliceCache(MetaIo& meta, Part part, std::uint32_t slice_bytes, std::uint64_t bytes_max,
                       Hooks hooks)
    : meta_(meta),
      part_(part),
      slice_bytes_(slice_bytes),
      shard_slices_max_(std::max<std::uint64_t>(bytes_max / kSliceMemory / kShards, 2)),
      hooks_(std::move(hooks)),
      front_(hooks_.counts ? bytes_max / kSliceMemory : 0),
      runs_(hooks_.counts ? bytes_max / kRunBytes : 0),
      shards_(std::make_unique<Shard[]>(kShards)) {
  assert(slice_bytes_ <= kSliceBytesMax);
}

SliceCache::~SliceCache() {
  for (std::size_t i = 0; i < kShards; ++i) {
    for (Slice* slice : shards_[i].clock) {
      assert(slice->pins == 0);
      delete slice;
    }
  }
}

SliceCache::Shard& SliceCache::shard(std::uint64_t key) {
  static_assert(kShards == std::size_t{1} << (64 - kShardShift));
  return shards_[spread(key) >> kShardShift];
}

SliceCache::Slice* SliceCache::find(Shard& s, std::uint64_t key) {
  Slice* slice = s.buckets[bucket_of(key)];
  while (slice != nullptr && slice->key != key) slice = slice->bucket_next;
  return slice;
}

// What peek_word() may know of the bytes [from, to) of a slice that is ready and not suspect. Under
// its shard's lock, as the next two.
void SliceCache::publish(const Slice& slice, std::size_t from, std::size_t to) {
  if (!hooks_.counts) return;
  front_.publish(slice.key, slice.bytes);
  for (std::size_t run = align_down(from, kRunBytes); run < to; run += kRunBytes) {
    const std::uint8_t* const words = slice.bytes + run;
    const std::uint64_t first = byte_swap(load_word(words));
    bool counts = hooks_.counts(first) && hooks_.counts(first + (kRunBytes / 8 - 1) * hooks_.step);
    for (std::size_t i = 1; counts && i < kRunBytes / 8; ++i) {
      counts = byte_swap(load_word(words + i * 8)) == first + i * hooks_.step;
    }
    if (counts) runs_.publish(run_of(slice.key, run), first);
  }
}

void SliceCache::withdraw(const Slice& slice) {
  if (!hooks_.counts) return;
  front_.withdraw(slice.key);
  for (std::size_t run = 0; run < slice_bytes_; run += kRunBytes) {
    runs_.withdraw(run_of(slice.key, run));
  }
}

bool SliceCache::take_used(const Slice& slice) {
  if (!hooks_.counts) return false;
  bool used = front_.take_used(slice.key);
  for (std::size_t run = 0; run < slice_bytes_; run += kRunBytes) {
    used = runs_.take_used(run_of(slice.key, run)) || used;
  }
  return used;
}

void SliceCache::remove(Shard& s, Slice* slice) {
  withdraw(*slice);
  Slice** at = &s.buckets[bucket_of(slice->key)];
  while (*at != slice) at = &(*at)->bucket_next;
  *at = slice->bucket_next;
  s.clock[slice->clock_index] = s.clock.back();
  s.clock[slice->clock_index]->clock_index = slice->clock_index;
  s.clock.pop_back();
}

void SliceCache::drop(Slice* slice) {
  memory_.put(slice->bytes);
  delete slice;
}

void SliceCache::evict_one(Shard& s) {
  // Two rounds: the first may only clear the reference bits.
  for (std::size_t turn = 0; turn < 2 * s.clock.size(); ++turn) {
    s.hand = (s.hand + 1) % s.clock.size();
    Slice* slice = s.clock[s.hand];
    if (slice->pins != 0 || slice->dirty || slice->state != Slice::State::ready) continue;
    const bool found = take_used(*slice);
    if (std::exchange(slice->referenced, false) || found) continue;
    remove(s, slice);
    drop(slice);
    return;
  }
}

SliceCache::Slice* SliceCache::insert(Shard& s, std::uint64_t key) {
  if (s.clock.size() >= shard_slices_max_) evict_one(s);
  auto* slice = new Slice;
  slice->key = key;
  slice->bytes = memory_.take();
  slice->pins = 1;
  slice->clock_index = s.clock.size();
  s.clock.push_back(slice);
  Slice*& bucket = s.buckets[bucket_of(key)];
  slice->bucket_next = bucket;
  bucket = slice;
  return slice;
}

bool SliceCache::peek(std::uint64_t key, std::size_t offset, void* to, std::size_t size) {
  Shard& s = shard(key);
  std::lock_guard guard(s.mutex);
  Slice* slice = find(s, key);
  if (slice == nullptr || slice->state != Slice::State::ready || slice->suspect) return false;
  slice->referenced = true;
  ++s.hits;
  std::memcpy(to, slice->bytes + offset, size);
  if (front_.find(key).value == 0) publish(*slice, 0, slice_bytes_);
  return true;
}

Task<Result<SliceCache::Pin>> SliceCache::pin(io::Queue& q, std::uint64_t key) {
  struct Loaded : Waiter {
    Shard& s;
    Slice& slice;
    Loaded(Shard& shard_, Slice& slice_) : s(shard_), slice(slice_) {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h) {
      handle = h;
      std::lock_guard guard(s.mutex);
      if (slice.state != Slice::State::loading) return false;
      link = slice.waiters;
      slice.waiters = this;
      return true;
    }
    void await_resume() const noexcept {}
  };

  Shard& s = shard(key);
  Slice* slice = nullptr;
  bool load = false;
  {
    std::lock_guard guard(s.mutex);
    slice = find(s, key);
    if (slice == nullptr) {
      slice = insert(s, key);
      load = true;
    } else {
      ++slice->pins;
      slice->referenced = true;
      if (slice->state == Slice::State::ready) {
        ++s.hits;
        co_return Pin(this, slice);
      }
    }
  }
  Pin held(this, slice);
  if (!load) {
    co_await Loaded(s, *slice);
    // The state no longer changes once it has left `loading` while somebody holds a pin.
    if (slice->state == Slice::State::failed) co_return Error(slice->error);
    co_return std::move(held);
  }

  misses_.fetch_add(1, std::memory_order_relaxed);
  const HostOffset where = hooks_.locate(key);
  std::uint8_t* const landed = landing_.take();
  Error error;
  if (where.bytes == 0) {
    error = Error(Kind::corrupt, "a table slice without a table");
  } else {
    error = co_await meta_.read(q, where, landed, slice_bytes_);
  }
  const bool suspect = !error && hooks_.suspect && hooks_.suspect(key, landed);
  Waiter* waiters = nullptr;
  {
    std::lock_guard guard(s.mutex);
    if (!error) store_words(slice->bytes, landed, slice_bytes_);
    slice->suspect = suspect;
    slice->error = error;
    slice->state = error ? Slice::State::failed : Slice::State::ready;
    if (!error && !suspect) publish(*slice, 0, slice_bytes_);
    if (error) remove(s, slice);  // the next one tries again; the last pin deletes it
    waiters = std::exchange(slice->waiters, nullptr);
  }
  landing_.put(landed);
  while (waiters != nullptr) {
    Waiter* next = waiters->link;
    waiters->wake();
    waiters = next;
  }
  if (error) co_return error;
  co_return std::move(held);
}

void SliceCache::unpin(Slice* slice) {
  Shard& s = shard(slice->key);
  std::lock_guard guard(s.mutex);
  assert(slice->pins > 0);
  if (--slice->pins == 0 && slice->state == Slice::State::failed) drop(slice);
}

const std::uint8_t* SliceCache::Pin::data() const { return slice_->bytes; }

void SliceCache::Pin::copy_out(std::size_t offset, void* to, std::size_t size) const {
  std::lock_guard guard(cache_->shard(slice_->key).mutex);
  std::memcpy(to, slice_->bytes + offset, size);
}

void SliceCache::Pin::update(std::size_t offset, const void* from, std::size_t size, bool dirty) {
  Shard& s = cache_->shard(slice_->key);
  std::lock_guard guard(s.mutex);
  assert(offset + size <= cache_->slice_bytes_);
  if (cache_->hooks_.counts) {
    cache_->runs_.withdraw(cache_->run_of(slice_->key, offset));
    store_words(slice_->bytes + offset, from, size);
    if (!slice_->suspect) cache_->publish(*slice_, offset, offset + size);
  } else {
    std::memcpy(slice_->bytes + offset, from, size);
  }
  if (dirty && !slice_->dirty) {
    slice_->dirty = true;
    ++s.dirty;
    cache_->dirty_.fetch_add(1, std::memory_order_relaxed);
  }
}

SliceCache::Staged SliceCache::stage() {
  Staged staged;
  for (std::size_t i = 0; i < kShards; ++i) {
    Shard& s = shards_[i];
    std::lock_guard guard(s.mutex);
    if (s.dirty == 0) continue;
    staged.chunks_.emplace_back(s.dirty * kSliceMemory);
    std::uint8_t* to = staged.chunks_.back().data();
    for (Slice* slice : s.clock) {
      if (!slice->dirty) continue;
      std::memcpy(to, slice->bytes, slice_bytes_);
      slice->dirty = false;
      ++slice->pins;
      staged.slices_.push_back({slice->key, slice, to});
      to += kSliceMemory;
    }
    dirty_.fetch_sub(s.dirty, std::memory_order_relaxed);
    s.dirty = 0;
  }
  std::sort(staged.slices_.begin(), staged.slices_.end(),
            [](const auto& a, const auto& b) { return a.key < b.key; });
  return staged;
}

void SliceCache::restore(Staged& staged) {
  for (const auto& copy : staged.slices_) {
    Shard& s = shard(copy.key);
    std::lock_guard guard(s.mutex);
    --copy.slice->pins;
    if (copy.slice->dirty) continue;
    copy.slice->dirty = true;
    ++s.dirty;
    dirty_.fetch_add(1, std::memory_order_relaxed);
  }
  staged.slices_.clear();
  staged.chunks_.clear();
}

Task<Error> SliceCache::write(io::Queue& q, Staged& staged) {
  AlignedBuffer gather(staged.slices_.size() > 1 ? kGatherBytes : kSliceMemory);
  for (std::size_t i = 0; i < staged.slices_.size();) {
    const HostOffset home = hooks_.locate(staged.slices_[i].key);
    std::size_t bytes = 0;
    std::size_t n = i;
    // Slices with consecutive keys and places are parts of one table.
    while (n < staged.slices_.size() && staged.slices_[n].key == staged.slices_[i].key + (n - i) &&
           hooks_.locate(staged.slices_[n].key) == home + bytes &&
           bytes + slice_bytes_ <= gather.size()) {
      std::memcpy(gather.data() + bytes, staged.slices_[n].copy, slice_bytes_);
      bytes += slice_bytes_;
      ++n;
    }
    assert(n > i && home.bytes != 0);
    Error error = co_await meta_.write(q, part_, home, gather.data(), bytes);
    if (error) {
      restore(staged);
      co_return error;
    }
    i = n;
  }
  for (const auto& copy : staged.slices_) unpin(copy.slice);
  staged.slices_.clear();
  staged.chunks_.clear();
  co_return Error();
}

void SliceCache::forget(std::uint64_t first_key, std::uint64_t count) {
  for (std::size_t i = 0; i < kShards; ++i) {
    Shard& s = shards_[i];
    std::lock_guard guard(s.mutex);
    for (std::size_t at = s.clock.size(); at-- > 0;) {
      Slice* slice = s.clock[at];
      if (count != 0 && slice->key - first_key >= count) continue;
      assert(slice->pins == 0);
      if (slice->dirty) {
        --s.dirty;
        dirty_.fetch_sub(1, std::memory_order_relaxed);
      }
      remove(s, slice);
      drop(slice);
    }
  }
}

std::uint64_t SliceCache::hits() const {
  std::uint64_t sum = sum_of(front_hits_);
  for (std::size_t i = 0; i < kShards; ++i) {
    std::lock_guard guard(shards_[i].mutex);
    sum += shards_[i].hits;
  }
  return sum;
}

}  // namespace pqblk::format::qcow2
