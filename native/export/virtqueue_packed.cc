// The packed virtqueue (virtio 1.2, 2.8).
//
// Room export/: see virtqueue.h. Used descriptors become visible one by one, in order: a batch
// whose first one is written last would leave half of itself behind when the process is killed.
#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

#include "export/virtqueue.h"
#include "export/virtqueue_access.h"

namespace pqblk::exports {
namespace {

constexpr std::uint16_t kAvail = 1 << 7, kUsed = 1 << 15;
constexpr std::size_t kIdPlace = 12, kFlagsPlace = 14, kLengthPlace = 8;
// Event suppression: {off_wrap, flags}.
constexpr std::size_t kEventPlace = 0, kEventFlags = 2;
constexpr std::uint16_t kEventEnable = 0, kEventDisable = 1, kEventDescriptor = 2;
constexpr std::uint16_t kWrapBit = 1 << 15;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

using Place = InflightPacked::Place;

class PackedQueue final : public Virtqueue {
 public:
  PackedQueue(const GuestMemory& memory, const RingSetup& setup);
  Error recover();

  Take take(Chain& chain) override;
  void put(const Chain& chain, std::uint32_t written) override;
  void publish() override;
  bool wants_call() override;
  bool ask_for_kicks() override;
  void decline_kicks() override;
  std::uint32_t base() const override { return word(next_) | (std::uint32_t{word(used_)} << 16); }

 private:
  struct Given {
    std::uint16_t id, slots, track;
    std::uint32_t written;
  };
  static std::uint16_t word(Place p) {
    return static_cast<std::uint16_t>(p.index | (p.wrap ? kWrapBit : 0));
  }
  static Place place(std::uint16_t w) {
    return {static_cast<std::uint16_t>(w & (kWrapBit - 1)), (w & kWrapBit) != 0};
  }
  Place plus(Place p, std::uint32_t slots) const;
  std::uint32_t line(Place p) const { return p.index + (p.wrap ? 0 : size()); }
  bool is_available(std::uint16_t flags) const {
    return ((flags & kAvail) != 0) == next_.wrap && ((flags & kUsed) != 0) != next_.wrap;
  }
  std::uint16_t flags_at(Place p, std::memory_order order) const {
    return load<std::uint16_t>(setup_.descriptors + kDescriptorBytes * p.index + kFlagsPlace,
                               order);
  }
  Take gather(std::uint16_t head_flags);
  Take walk(Chain& chain);
  void walk_indirect(const Descriptor& table, Chain& chain);
  bool write_back(const Given& given);
  bool is_due(std::uint32_t slots) const;

  InflightPacked inflight_;
  std::deque<InflightPacked::Recovered> again_;
  Place next_;
  Place used_;
  std::vector<Given> given_;
  std::vector<Descriptor> gathered_;  // of the chain being taken
  std::uint32_t unsignalled_ = 0;     // slots used since the driver was last told
  bool news_ = false;                 // something was published since wants_call()
};

PackedQueue::PackedQueue(const GuestMemory& memory, const RingSetup& setup)
    : Virtqueue(memory, setup), inflight_(setup.inflight, setup.size) {
  next_ = place(static_cast<std::uint16_t>(setup.base));
  used_ = place(static_cast<std::uint16_t>(setup.base >> 16));
  given_.reserve(setup.size);
  gathered_.reserve(setup.size);
}

Error PackedQueue::recover() {
  if (next_.index >= size() || used_.index >= size()) {
    return Error(Kind::invalid_argument, "the base of a packed ring lies beyond it");
  }
  if (!inflight_.present()) return {};
  std::vector<InflightPacked::Recovered> found;
  Place used = used_;
  if (!inflight_.recover(setup_.descriptors, used, found)) {
    return Error(Kind::corrupt, "the region of requests in flight contradicts itself");
  }
  std::uint32_t slots = 0;
  for (const auto& chain : found) slots += static_cast<std::uint32_t>(chain.descriptors.size());
  if (slots > size()) {
    return Error(Kind::corrupt, "more descriptors are in flight than the ring holds");
  }
  used_ = used;
  next_ = plus(used_, slots);
  recovered_ = !found.empty();
  for (auto& chain : found) again_.push_back(std::move(chain));
  return {};
}

Place PackedQueue::plus(Place p, std::uint32_t slots) const {
  const std::uint32_t index = p.index + slots;
  if (index < size()) return {static_cast<std::uint16_t>(index), p.wrap};
  return {static_cast<std::uint16_t>(index - size()), !p.wrap};
}

Take PackedQueue::take(Chain& chain) {
  if (!again_.empty()) {
    gathered_ = again_.front().descriptors;
    const std::uint16_t track = again_.front().track;
    again_.pop_front();
    const Take result = walk(chain);
    chain.track = track;
    return result;
  }
  const std::uint16_t flags = flags_at(next_, kAcquire);
  if (!is_available(flags)) return Take::none;
  if (gather(flags) == Take::broken) return Take::broken;
  const Take result = walk(chain);
  if (result != Take::chain) return result;
  if (inflight_.present() && !inflight_.taken(gathered_, chain.track)) {
    return broken("more descriptors are in flight than the ring holds");
  }
  next_ = plus(next_, chain.slots);
  return Take::chain;
}

// Copies the chain's descriptors out of the ring. The driver wrote the head's flags last.
Take PackedQueue::gather(std::uint16_t head_flags) {
  gathered_.clear();
  Place at = next_;
  for (std::uint16_t flags = head_flags;; flags = gathered_.back().fourth) {
    Descriptor d = Descriptor::read(setup_.descriptors + kDescriptorBytes * at.index);
    if (gathered_.empty()) d.fourth = flags;  // as it was checked
    gathered_.push_back(d);
    if ((d.fourth & kDescriptorNext) == 0) return Take::chain;
    if (gathered_.size() == size()) return broken("a chain of descriptors has no end");
    at = plus(at, 1);
  }
}

Take PackedQueue::walk(Chain& chain) {
  chain.reset();
  chain.id = gathered_.back().third;
  chain.slots = static_cast<std::uint16_t>(gathered_.size());
  for (const Descriptor& d : gathered_) {
    const std::uint16_t flags = d.fourth;
    if ((flags & kDescriptorIndirect) == 0) {
      collect(chain, d.address, d.length, (flags & kDescriptorWrite) != 0);
      continue;
    }
    if (!has(kFeatureIndirect)) return broken("an indirect descriptor was not agreed upon");
    if ((flags & kDescriptorNext) != 0) return broken("a descriptor follows an indirect one");
    walk_indirect(d, chain);
  }
  return Take::chain;
}

void PackedQueue::walk_indirect(const Descriptor& table, Chain& chain) {
  const std::uint32_t entries = table.length / kDescriptorBytes;
  const bool sane = entries != 0 && entries <= kSegmentsMax && table.length % kDescriptorBytes == 0;
  const std::uint8_t* place_of = sane ? at(table.address, table.length) : nullptr;
  if (place_of == nullptr) {
    chain.fault = "an indirect table of a bad size or outside of the guest's memory";
    return;
  }
  for (std::uint32_t i = 0; i < entries; ++i) {  // all of them; NEXT means nothing here
    const Descriptor d = Descriptor::read(place_of + kDescriptorBytes * i);
    if ((d.fourth & kDescriptorIndirect) != 0) {
      chain.fault = "an indirect table in an indirect table";
      return;
    }
    collect(chain, d.address, d.length, (d.fourth & kDescriptorWrite) != 0);
  }
}

void PackedQueue::put(const Chain& chain, std::uint32_t written) {
  given_.push_back({chain.id, chain.slots, chain.track, written});
}

bool PackedQueue::write_back(const Given& given) {
  const std::size_t at = kDescriptorBytes * used_.index;
  std::uint8_t* descriptor = setup_.descriptors + at;
  const bool wrap = used_.wrap;
  const Place after = plus(used_, given.slots);
  store<std::uint32_t>(descriptor + kLengthPlace, given.written);
  store<std::uint16_t>(descriptor + kIdPlace, given.id);
  if (inflight_.present() && !inflight_.giving(given.track, after)) return false;
  const auto flags = static_cast<std::uint16_t>((wrap ? kAvail | kUsed : 0) |
                                                (given.written != 0 ? kDescriptorWrite : 0));
  store<std::uint16_t>(descriptor + kFlagsPlace, flags, kRelease);
  if (inflight_.present()) inflight_.given(given.track);
  used_ = after;
  return true;
}

void PackedQueue::publish() {
  if (given_.empty()) return;
  std::uint32_t slots = 0;
  for (const Given& given : given_) {
    slots += given.slots;
    if (!write_back(given)) trouble_ = "the region of requests in flight was tampered with";
  }
  given_.clear();
  if (log_ && setup_.device_log_address) {
    // The ring itself is written too; its guest address follows from where it is mapped.
    log_->mark(memory_.guest_of(setup_.descriptors), RingSetup::descriptor_bytes(size()));
  }
  unsignalled_ = std::min(unsignalled_ + slots, 2 * size());
  news_ = true;
}

bool PackedQueue::wants_call() {
  if (!std::exchange(news_, false)) return false;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const bool wants = is_due(unsignalled_);
  if (wants) unsignalled_ = 0;
  return wants;
}

bool PackedQueue::is_due(std::uint32_t slots) const {
  const auto flags = load<std::uint16_t>(setup_.driver + kEventFlags, kAcquire);
  if (flags == kEventDisable) return false;
  if (flags != kEventDescriptor || !has(kFeatureEventIdx)) return true;
  const Place event = place(load<std::uint16_t>(setup_.driver + kEventPlace));
  if (event.index >= size()) return true;
  const std::uint32_t turn = 2 * size();  // positions until both indices and counters repeat
  return (line(used_) + turn - line(event) - 1) % turn < slots;
}

bool PackedQueue::ask_for_kicks() {
  if (has(kFeatureEventIdx)) {
    store<std::uint16_t>(setup_.device + kEventPlace, word(next_));
    store<std::uint16_t>(setup_.device + kEventFlags, kEventDescriptor, kRelease);
  } else {
    store<std::uint16_t>(setup_.device + kEventFlags, kEventEnable);
  }
  log_device(0, 4);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return is_available(flags_at(next_, std::memory_order_relaxed));
}

void PackedQueue::decline_kicks() {
  store<std::uint16_t>(setup_.device + kEventFlags, kEventDisable);
  log_device(0, 4);
}

}  // namespace

Result<std::unique_ptr<Virtqueue>> open_packed(const GuestMemory& memory, RingSetup setup) {
  auto queue = std::make_unique<PackedQueue>(memory, setup);
  if (Error e = queue->recover()) return e;
  return std::unique_ptr<Virtqueue>(std::move(queue));
}

}  // namespace pqblk::exports
