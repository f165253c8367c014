#include "export/virtqueue_inflight.h"

#include <algorithm>
#include <utility>

namespace pqblk::exports {
namespace {

constexpr auto kRelease = std::memory_order_release;
constexpr std::uint16_t kNoBatch = 0xffff;

// Virtio 1.2, 2.8.1: a descriptor is available when its two flags differ and AVAIL is the counter.
constexpr std::uint16_t kAvail = 1 << 7, kUsedFlag = 1 << 15;

}  // namespace

// ---- split ----

bool InflightSplit::recover(std::uint16_t ring_used, std::vector<std::uint16_t>& heads) {
  const bool known = load<std::uint16_t>(data_ + kVersion) == kInflightVersion &&
                     load<std::uint16_t>(data_ + kNumber) == size_;
  const auto batch = static_cast<std::uint16_t>(ring_used - load<std::uint16_t>(data_ + kUsed));
  if (!known || batch > size_) {  // new, or of a ring that has been reset since
    for (std::uint32_t i = 0; i < size_; ++i) *entry(static_cast<std::uint16_t>(i)) = 0;
    store<std::uint16_t>(data_ + kNumber, static_cast<std::uint16_t>(size_));
    store<std::uint16_t>(data_ + kLastBatch, kNoBatch);
    store<std::uint16_t>(data_ + kUsed, ring_used);
    store<std::uint16_t>(data_ + kVersion, kInflightVersion, kRelease);
    counter_ = 0;
    return false;
  }
  if (batch != 0) {
    clear_batch(batch);
    store<std::uint16_t>(data_ + kUsed, ring_used, kRelease);
  }
  std::vector<std::pair<std::uint64_t, std::uint16_t>> found;
  for (std::uint32_t i = 0; i < size_; ++i) {
    const auto head = static_cast<std::uint16_t>(i);
    if (*entry(head) != 1) continue;
    found.emplace_back(load<std::uint64_t>(entry(head) + kCounter), head);
  }
  std::sort(found.begin(), found.end());
  counter_ = found.empty() ? 0 : found.back().first + 1;
  for (const auto& [counter, head] : found) heads.push_back(head);
  return true;
}

void InflightSplit::taken(std::uint16_t head) {
  store<std::uint64_t>(entry(head) + kCounter, counter_++);
  store<std::uint8_t>(entry(head), 1, kRelease);
}

void InflightSplit::giving(std::uint16_t head) {
  store<std::uint16_t>(entry(head) + kNext, load<std::uint16_t>(data_ + kLastBatch));
  store<std::uint16_t>(data_ + kLastBatch, head, kRelease);
}

void InflightSplit::given(std::uint16_t ring_used, std::uint16_t batch) {
  clear_batch(batch);
  store<std::uint16_t>(data_ + kUsed, ring_used, kRelease);
}

void InflightSplit::clear_batch(std::uint16_t batch) {
  std::uint16_t head = load<std::uint16_t>(data_ + kLastBatch);
  for (; batch != 0 && head < size_; --batch) {
    store<std::uint8_t>(entry(head), 0, kRelease);
    head = load<std::uint16_t>(entry(head) + kNext);
  }
}

// ---- packed ----

void InflightPacked::make_new(Place used) {
  for (std::uint32_t i = 0; i < size_; ++i) {
    std::uint8_t* e = entry(static_cast<std::uint16_t>(i));
    *e = 0;
    store<std::uint16_t>(e + kNext, static_cast<std::uint16_t>(i + 1));  // the last: no entry
  }
  store<std::uint16_t>(data_ + kNumber, static_cast<std::uint16_t>(size_));
  store<std::uint16_t>(data_ + kFree, 0);
  store<std::uint16_t>(data_ + kUsed, used.index);
  store<std::uint8_t>(data_ + kWrap, used.wrap ? 1 : 0);
  commit();
  store<std::uint16_t>(data_ + kVersion, kInflightVersion, kRelease);
  counter_ = 0;
}

void InflightPacked::commit() {
  store<std::uint16_t>(data_ + kOldFree, load<std::uint16_t>(data_ + kFree), kRelease);
  store<std::uint8_t>(data_ + kOldWrap, load<std::uint8_t>(data_ + kWrap), kRelease);
  // Last: it is what recover() compares.
  store<std::uint16_t>(data_ + kOldUsed, load<std::uint16_t>(data_ + kUsed), kRelease);
}

void InflightPacked::roll_back() {
  store<std::uint16_t>(data_ + kFree, load<std::uint16_t>(data_ + kOldFree));
  store<std::uint8_t>(data_ + kWrap, load<std::uint8_t>(data_ + kOldWrap));
  store<std::uint16_t>(data_ + kUsed, load<std::uint16_t>(data_ + kOldUsed), kRelease);
}

bool InflightPacked::recover(const std::uint8_t* ring, Place& used, std::vector<Recovered>& out) {
  const bool known = load<std::uint16_t>(data_ + kVersion) == kInflightVersion &&
                     load<std::uint16_t>(data_ + kNumber) == size_;
  if (!known) {
    make_new(used);
    return true;
  }
  const auto old_used = load<std::uint16_t>(data_ + kOldUsed);
  if (old_used >= size_) return false;
  const bool wrap = load<std::uint8_t>(data_ + kOldWrap) != 0;
  // A chain as long as the ring leaves the index as it is and turns the counter.
  if (load<std::uint16_t>(data_ + kUsed) != old_used ||
      (load<std::uint8_t>(data_ + kWrap) != 0) != wrap) {
    // Did the driver see the last one that was given back?
    const auto flags =
        load<std::uint16_t>(ring + kDescriptorBytes * old_used + 14, std::memory_order_acquire);
    const std::uint16_t available = wrap ? kAvail : kUsedFlag;
    if ((flags & (kAvail | kUsedFlag)) != available) commit();
  }
  roll_back();
  if (!clear_free_list()) return false;

  std::vector<std::pair<std::uint64_t, std::uint16_t>> found;
  for (std::uint32_t i = 0; i < size_; ++i) {
    const auto head = static_cast<std::uint16_t>(i);
    if (*entry(head) == 1) found.emplace_back(load<std::uint64_t>(entry(head) + kCounter), head);
  }
  std::sort(found.begin(), found.end());
  counter_ = found.empty() ? 0 : found.back().first + 1;
  for (const auto& [counter, head] : found) {
    if (!chain_of(head, out.emplace_back())) return false;
  }
  used = {load<std::uint16_t>(data_ + kUsed), load<std::uint8_t>(data_ + kWrap) != 0};
  return used.index < size_;
}

bool InflightPacked::clear_free_list() {
  std::uint32_t steps = 0;
  for (auto i = load<std::uint16_t>(data_ + kFree); i < size_;
       i = load<std::uint16_t>(entry(i) + kNext)) {
    if (++steps > size_) return false;
    store<std::uint8_t>(entry(i), 0);
  }
  return true;
}

bool InflightPacked::chain_of(std::uint16_t head, Recovered& out) const {
  out.track = head;
  const std::uint32_t count = load<std::uint16_t>(entry(head) + kCount);
  if (count == 0 || count > size_) return false;
  std::uint16_t i = head;
  for (std::uint32_t n = 0; n < count; ++n) {
    if (i >= size_) return false;
    const std::uint8_t* e = entry(i);
    out.descriptors.push_back({load<std::uint64_t>(e + kAddress), load<std::uint32_t>(e + kLength),
                               load<std::uint16_t>(e + kId), load<std::uint16_t>(e + kFlags)});
    i = load<std::uint16_t>(e + kNext);
  }
  return true;
}

bool InflightPacked::taken(const std::vector<Descriptor>& descriptors, std::uint16_t& track) {
  const auto head = load<std::uint16_t>(data_ + kOldFree);
  if (head >= size_) return false;
  std::uint8_t* first = entry(head);
  std::uint16_t last = head;
  std::uint16_t next = head;
  for (const Descriptor& d : descriptors) {
    if (next >= size_) return false;
    last = next;
    std::uint8_t* e = entry(last);
    store<std::uint64_t>(e + kAddress, d.address);
    store<std::uint32_t>(e + kLength, d.length);
    store<std::uint16_t>(e + kId, d.third);
    store<std::uint16_t>(e + kFlags, d.fourth);
    next = load<std::uint16_t>(e + kNext);
  }
  store<std::uint16_t>(first + kLast, last);
  store<std::uint16_t>(first + kCount, static_cast<std::uint16_t>(descriptors.size()));
  store<std::uint64_t>(first + kCounter, counter_++);
  // In flight first, then out of the free list: recover() clears what the free list still names,
  // and such a chain is simply taken from the ring again.
  store<std::uint8_t>(first, 1, kRelease);
  store<std::uint16_t>(data_ + kFree, next, kRelease);
  store<std::uint16_t>(data_ + kOldFree, next, kRelease);
  track = head;
  return true;
}

bool InflightPacked::giving(std::uint16_t track, Place used_after) {
  const auto last = load<std::uint16_t>(entry(track) + kLast);
  if (last >= size_) return false;
  store<std::uint16_t>(entry(last) + kNext, load<std::uint16_t>(data_ + kFree), kRelease);
  store<std::uint16_t>(data_ + kFree, track, kRelease);
  store<std::uint8_t>(data_ + kWrap, used_after.wrap ? 1 : 0);
  store<std::uint16_t>(data_ + kUsed, used_after.index, kRelease);
  return true;
}

void InflightPacked::given(std::uint16_t track) {
  store<std::uint8_t>(entry(track), 0, kRelease);
  commit();
}

}  // namespace pqblk::exports
