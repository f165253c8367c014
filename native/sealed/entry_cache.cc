#include "sealed/entry_cache.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>
#include <cstring>

namespace pqblk::sealed {

static_assert(kPage == kPoolPageBytes);

struct EntryCache::Page {
  std::uint64_t number = 0;
  std::uint8_t* bytes = nullptr;
  std::uint32_t pins = 0;  // guarded by the shard's mutex, like everything here
  bool loaded = false;
  bool used = false;  // since the eviction last came by
  Error error;
  Waiter* waiters = nullptr;
  Page* older = nullptr;  // neighbours in the ring; null when not linked
  Page* newer = nullptr;
};

void fill_base(std::uint8_t* bytes, std::size_t size, bool zero) {
  const Entry e = zero ? Entry::zero() : Entry::never();
  for (std::size_t at = 0; at + sizeof e <= size; at += sizeof e)
    std::memcpy(bytes + at, &e, sizeof e);
}

EntryCache::EntryCache(const SealedGeometry& geometry, const io::File& file,
                       std::uint64_t bytes_max, HomeMapping home)
    : geometry_(geometry),
      file_(file),
      pages_per_cluster_(geometry.cluster_size() / kPage),
      shard_pages_max_(std::max<std::size_t>(4, bytes_max / kPage / kShards)),
      home_(std::move(home)),
      front_(shard_pages_max_ * kShards) {}

EntryCache::~EntryCache() {
  for (Shard& s : shards_) {
    s.pages.for_each([](std::uint64_t, Page* page) { delete page; });
  }
}

void EntryCache::link(Shard& s, Page* page) {
  if (s.newest == nullptr) {
    page->older = page->newer = page;
  } else {
    page->older = s.newest;
    page->newer = s.newest->newer;  // the oldest
    page->newer->older = page;
    s.newest->newer = page;
  }
  s.newest = page;
}

void EntryCache::unlink(Shard& s, Page* page) {
  if (page->older == nullptr) return;
  if (page->older == page) {
    s.newest = nullptr;
  } else {
    page->older->newer = page->newer;
    page->newer->older = page->older;
    if (s.newest == page) s.newest = page->older;
  }
  page->older = page->newer = nullptr;
}

void EntryCache::drop(Page* page) {
  memory_.put(page->bytes);
  delete page;
}

// A second chance for what was looked at: a look-up then marks its page and moves nothing.
void EntryCache::evict(Shard& s) {
  while (s.pages.size() > shard_pages_max_ && s.newest != nullptr) {
    Page* oldest = s.newest->newer;
    const bool found = front_.take_used(oldest->number);
    if (std::exchange(oldest->used, false) || found) {
      s.newest = oldest;
      continue;
    }
    unlink(s, oldest);
    front_.withdraw(oldest->number);
    s.pages.erase(oldest->number);
    drop(oldest);
  }
}

EntryCache::Page* EntryCache::loaded_page(Shard& s, std::uint64_t number) {
  Page** found = s.pages.find(number);
  if (found == nullptr || !(*found)->loaded) return nullptr;
  (*found)->used = true;
  return *found;
}

bool EntryCache::seek(std::uint64_t number, std::uint32_t index, FrontTable::Found& found) {
  found = front_.find(number);
  if (found.value == 0) {
    Shard& s = shard(number);
    std::lock_guard guard(s.mutex);
    const Page* page = loaded_page(s, number);
    if (page == nullptr) return false;
    front_.publish(number, page->bytes);
    found = front_.find(number);
  }
  if (found.value != 0) __builtin_prefetch(found.page() + index * sizeof(Entry));
  return true;
}

bool EntryCache::peek(std::uint64_t number, std::uint32_t index, const FrontTable::Found& found,
                      std::uint32_t queue, Entry& out) {
  if (found.value == 0) return peek(number, index, 1, &out);
  std::array<std::uint64_t, sizeof(Entry) / 8> words;
  for (std::size_t i = 0; i < words.size(); ++i) {
    words[i] = load_word(found.page() + index * sizeof(Entry) + i * 8);
  }
  if (!found.holds()) return peek(number, index, 1, &out);
  std::memcpy(&out, words.data(), sizeof out);
  front_hits_[queue].add();
  return true;
}

bool EntryCache::peek(std::uint64_t number, std::uint32_t index, std::uint32_t count, Entry* out) {
  Shard& s = shard(number);
  {
    std::lock_guard guard(s.mutex);
    const Page* page = loaded_page(s, number);
    if (page == nullptr) return false;
    const std::uint8_t* from = page->bytes + index * sizeof(Entry);
    if (count == 1) {
      std::memcpy(out, from, sizeof(Entry));
    } else {
      std::memcpy(out, from, count * sizeof(Entry));
    }
    ++s.hits;
  }
  return true;
}

std::uint64_t EntryCache::hits() const {
  std::uint64_t sum = sum_of(front_hits_);
  for (const Shard& s : shards_) {
    std::lock_guard guard(s.mutex);
    sum += s.hits;
  }
  return sum;
}

EntryCache::Page* EntryCache::claim(Shard& s, std::uint64_t number) {
  auto* page = new Page;
  page->number = number;
  page->bytes = memory_.take();
  page->pins = 1;
  s.pages[number] = page;
  return page;
}

// Neighbours of one entry cluster, one read; `landed` has a place for each, `home` is the
// cluster's.
Task<Error> EntryCache::fetch(io::Queue& io, std::uint64_t home, std::uint64_t first,
                              std::span<std::uint8_t* const> landed) {
  const std::uint64_t host = l2_host(home);
  const bool zero = (home & kL2Zero) != 0;
  if (host == 0 || zero) {
    for (std::uint8_t* bytes : landed) fill_base(bytes, kPage, zero);
    co_return Error();
  }
  const std::uint64_t at = host + first % pages_per_cluster_ * kPage;
  if (landed.size() == 1) co_return co_await io.read(file_, at, landed[0], kPage);
  std::vector<iovec> pieces;
  for (std::uint8_t* bytes : landed) pieces.push_back({bytes, kPage});
  co_return co_await io.readv(file_, at, pieces);
}

// Whoever waits for the page looks at it, or at the error, from here on.
void EntryCache::settle(Page* page, const std::uint8_t* landed, Error error) {
  Shard& s = shard(page->number);
  Waiter* wake = nullptr;
  {
    std::lock_guard guard(s.mutex);
    if (!error) store_words(page->bytes, landed, kPage);
    page->loaded = true;
    wake = std::exchange(page->waiters, nullptr);
    if (error) s.pages.erase(page->number);  // the next one tries again
    page->error = std::move(error);
    evict(s);
  }
  while (wake != nullptr) {
    Waiter* next = wake->link;
    wake->wake();
    wake = next;
  }
}

// Of a claimed page that only its loader knows of; whoever asks from here on loads it himself.
bool EntryCache::abandon(Page* page) {
  Shard& s = shard(page->number);
  std::lock_guard guard(s.mutex);
  if (page->pins != 1) return false;
  s.pages.erase(page->number);
  return true;
}

// What the caller has claimed: the first page, and others that were to come along. One that cannot
// be read takes no neighbour with it, and what nobody waits for is not asked for again.
Task<void> EntryCache::load(io::Queue& io, std::span<Page* const> pages) {
  std::array<std::uint8_t*, kRunMax> landed;
  for (std::size_t i = 0; i < pages.size(); ++i) landed[i] = landing_.take();
  const std::span<std::uint8_t* const> all(landed.data(), pages.size());
  const std::uint64_t first = pages[0]->number;
  Result<std::uint64_t> home = co_await home_(io, Slot{first / pages_per_cluster_});
  Error error;
  if (home) {
    error = co_await fetch(io, *home, first, all);
  } else {
    error = home.take_error();
  }
  const bool singly = error && home && pages.size() > 1;
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (!singly) {
      settle(pages[i], landed[i], error);
    } else if (i == 0 || !abandon(pages[i])) {
      Error alone = co_await fetch(io, *home, first + i, all.subspan(i, 1));
      settle(pages[i], landed[i], std::move(alone));
    }
    landing_.put(landed[i]);
  }
}

namespace {
// Suspends until the loader wakes it; the list is guarded by the shard's mutex.
struct LoadWait : Waiter {
  ShortLock& mutex;
  Waiter*& list;
  bool& loaded;
  LoadWait(ShortLock& m, Waiter*& l, bool& done) : mutex(m), list(l), loaded(done) {}
  bool await_ready() const noexcept { return false; }
  bool await_suspend(std::coroutine_handle<> h) {
    handle = h;
    std::lock_guard guard(mutex);
    if (loaded) return false;
    link = list;
    list = this;
    return true;
  }
  void await_resume() const noexcept {}
};
}  // namespace

Task<Result<EntryCache::Pin>> EntryCache::wait_loaded(io::Queue& io, Page* page) {
  static_cast<void>(io);
  Shard& s = shard(page->number);
  co_await LoadWait(s.mutex, page->waiters, page->loaded);
  Pin pin(this, page);
  if (page->error) co_return Error(page->error);
  co_return std::move(pin);
}

Task<Result<EntryCache::Pin>> EntryCache::pin(io::Queue& io, std::uint64_t number,
                                              std::uint64_t run) {
  std::array<Page*, kRunMax> pages;
  bool loader = false;
  {
    Shard& s = shard(number);
    std::lock_guard guard(s.mutex);
    if (Page** found = s.pages.find(number)) {
      pages[0] = *found;
      unlink(s, pages[0]);
      ++pages[0]->pins;
      ++s.hits;
    } else {
      pages[0] = claim(s, number);
      loader = true;
    }
  }
  if (!loader) co_return co_await wait_loaded(io, pages[0]);
  const std::uint64_t left_in_cluster = pages_per_cluster_ - number % pages_per_cluster_;
  const std::size_t most = std::min({run, left_in_cluster, std::uint64_t{kRunMax}});
  std::size_t count = 1;
  for (; count < most; ++count) {
    Shard& s = shard(number + count);
    std::lock_guard guard(s.mutex);
    if (s.pages.find(number + count) != nullptr) break;
    pages[count] = claim(s, number + count);
  }
  misses_.fetch_add(count, std::memory_order_relaxed);
  run_ends_[run_ends_next_.fetch_add(1, std::memory_order_relaxed) % run_ends_.size()].store(
      number + count, std::memory_order_relaxed);
  co_await load(io, {pages.data(), count});
  for (std::size_t i = 1; i < count; ++i) unpin(pages[i]);
  Pin result(this, pages[0]);
  if (pages[0]->error) co_return Error(pages[0]->error);
  co_return std::move(result);
}

bool EntryCache::continues_run(std::uint64_t number) const {
  return std::any_of(run_ends_.begin(), run_ends_.end(), [&](const auto& end) {
    return end.load(std::memory_order_relaxed) == number;
  });
}

Task<Result<std::pair<bool, EntryCache::Pin>>> EntryCache::pin_if_present(io::Queue& io,
                                                                          std::uint64_t number) {
  Shard& s = shard(number);
  Page* page = nullptr;
  {
    std::lock_guard guard(s.mutex);
    Page** found = s.pages.find(number);
    if (found == nullptr) co_return std::pair<bool, Pin>(false, Pin());
    page = *found;
    unlink(s, page);
    ++page->pins;
  }
  Result<Pin> pin = co_await wait_loaded(io, page);
  if (!pin) co_return std::pair<bool, Pin>(false, Pin());  // its load failed: it is not cached
  co_return std::pair<bool, Pin>(true, std::move(*pin));
}

void EntryCache::unpin(Page* page) {
  Shard& s = shard(page->number);
  std::lock_guard guard(s.mutex);
  if (--page->pins != 0) return;
  Page** found = s.pages.find(page->number);
  if (found == nullptr || *found != page) {  // its load failed, this was the last user
    drop(page);
    return;
  }
  link(s, page);
  evict(s);
}

void EntryCache::Pin::read(std::uint32_t index, std::uint32_t count, Entry* out) const {
  std::lock_guard guard(cache_->shard(page_->number).mutex);
  std::memcpy(out, page_->bytes + index * sizeof(Entry), count * sizeof(Entry));
}

void EntryCache::Pin::update(std::uint32_t index, const Entry& entry) {
  std::lock_guard guard(cache_->shard(page_->number).mutex);
  const FrontTable::Change change = cache_->front_.change(page_->number);
  store_words(page_->bytes + index * sizeof(Entry), &entry, sizeof entry);
}

void EntryCache::Pin::replace(const std::uint8_t* bytes) {
  std::lock_guard guard(cache_->shard(page_->number).mutex);
  const FrontTable::Change change = cache_->front_.change(page_->number);
  store_words(page_->bytes, bytes, kPage);
}

const std::uint8_t* EntryCache::Pin::bytes() const { return page_->bytes; }

}  // namespace pqblk::sealed
