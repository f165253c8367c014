// The split virtqueue (virtio 1.2, 2.7).
//
// Room export/: see virtqueue.h.
#include <deque>
#include <utility>

#include "export/virtqueue.h"
#include "export/virtqueue_access.h"

namespace pqblk::exports {
namespace {

// The available ring: flags, idx, ring[size], used_event. The used ring: flags, idx, ring[size] of
// {id, length}, avail_event.
constexpr std::size_t kFlags = 0, kIndex = 2, kRing = 4, kUsedEntry = 8;
constexpr std::uint16_t kNoInterrupt = 1, kNoNotify = 1;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;

class SplitQueue final : public Virtqueue {
 public:
  SplitQueue(const GuestMemory& memory, const RingSetup& setup);

  Take take(Chain& chain) override;
  void put(const Chain& chain, std::uint32_t written) override;
  void publish() override;
  bool wants_call() override;
  bool ask_for_kicks() override;
  void decline_kicks() override;
  std::uint32_t base() const override { return next_; }

 private:
  Take walk(std::uint16_t head, Chain& chain);
  void walk_indirect(const Descriptor& table, Chain& chain);
  std::uint16_t available(std::memory_order order) const {
    return load<std::uint16_t>(setup_.driver + kIndex, order);
  }

  InflightSplit inflight_;
  std::deque<std::uint16_t> again_;  // heads of an earlier life
  std::uint16_t next_;               // of the available ring, counted without end
  std::uint16_t seen_;               // the driver's index as last read
  std::uint16_t used_;               // of the used ring, with what is not published
  std::uint16_t published_;
  std::uint16_t signalled_;
  bool signalled_once_ = false;
};

SplitQueue::SplitQueue(const GuestMemory& memory, const RingSetup& setup)
    : Virtqueue(memory, setup), inflight_(setup.inflight, setup.size) {
  next_ = static_cast<std::uint16_t>(setup.base);
  used_ = published_ = signalled_ = load<std::uint16_t>(setup_.device + kIndex, kAcquire);
  if (inflight_.present()) {
    std::vector<std::uint16_t> heads;
    // What was taken and not given back lies between the two indices. After a crash the front-end
    // only guesses at the base; a region that begins anew leaves it the last word.
    if (inflight_.recover(used_, heads)) next_ = static_cast<std::uint16_t>(used_ + heads.size());
    again_.assign(heads.begin(), heads.end());
    recovered_ = !again_.empty();
  }
  seen_ = next_;
}

Take SplitQueue::take(Chain& chain) {
  if (!again_.empty()) {
    const std::uint16_t head = again_.front();
    again_.pop_front();
    return walk(head, chain);
  }
  if (seen_ == next_) {
    seen_ = available(kAcquire);
    if (seen_ == next_) return Take::none;
    if (static_cast<std::uint16_t>(seen_ - next_) > size()) {
      return broken("more chains are available than the ring holds");
    }
  }
  const std::size_t at = next_ & (size() - 1);
  const auto head = load<std::uint16_t>(setup_.driver + kRing + 2 * at);
  if (head >= size()) return broken("an available entry names a descriptor beyond the ring");
  const Take result = walk(head, chain);
  if (result != Take::chain) return result;
  ++next_;
  if (inflight_.present()) inflight_.taken(head);
  return Take::chain;
}

Take SplitQueue::walk(std::uint16_t head, Chain& chain) {
  chain.reset();
  chain.id = head;
  std::uint16_t index = head;
  for (std::uint32_t count = 1;; ++count) {
    if (count > size()) return broken("a chain of descriptors has a loop");
    const Descriptor d = Descriptor::read(setup_.descriptors + kDescriptorBytes * index);
    const std::uint16_t flags = d.third;
    if ((flags & kDescriptorIndirect) != 0) {
      if (!has(kFeatureIndirect)) return broken("an indirect descriptor was not agreed upon");
      if ((flags & kDescriptorNext) != 0) return broken("a descriptor follows an indirect one");
      walk_indirect(d, chain);
      return Take::chain;
    }
    collect(chain, d.address, d.length, (flags & kDescriptorWrite) != 0);
    if ((flags & kDescriptorNext) == 0) return Take::chain;
    if (d.fourth >= size()) return broken("a descriptor names a next one beyond the ring");
    index = d.fourth;
  }
}

void SplitQueue::walk_indirect(const Descriptor& table, Chain& chain) {
  const std::uint32_t entries = table.length / kDescriptorBytes;
  const bool sane = entries != 0 && entries <= kSegmentsMax && table.length % kDescriptorBytes == 0;
  const std::uint8_t* place = sane ? at(table.address, table.length) : nullptr;
  if (place == nullptr) {
    chain.fault = "an indirect table of a bad size or outside of the guest's memory";
    return;
  }
  std::uint32_t index = 0;
  for (std::uint32_t count = 1;; ++count) {
    if (count > entries) {
      chain.fault = "an indirect table has a loop";
      return;
    }
    const Descriptor d = Descriptor::read(place + kDescriptorBytes * index);
    if ((d.third & kDescriptorIndirect) != 0) {
      chain.fault = "an indirect table in an indirect table";
      return;
    }
    collect(chain, d.address, d.length, (d.third & kDescriptorWrite) != 0);
    if ((d.third & kDescriptorNext) == 0) return;
    index = d.fourth;
    if (index >= entries) {
      chain.fault = "an indirect descriptor names a next one beyond its table";
      return;
    }
  }
}

void SplitQueue::put(const Chain& chain, std::uint32_t written) {
  const std::size_t offset = kRing + kUsedEntry * (used_ & (size() - 1));
  store<std::uint32_t>(setup_.device + offset, chain.id);
  store<std::uint32_t>(setup_.device + offset + 4, written);
  log_device(offset, kUsedEntry);
  if (inflight_.present()) inflight_.giving(chain.id);
  ++used_;
}

void SplitQueue::publish() {
  if (used_ == published_) return;
  const auto batch = static_cast<std::uint16_t>(used_ - published_);
  store<std::uint16_t>(setup_.device + kIndex, used_, kRelease);
  published_ = used_;
  log_device(kIndex, 2);
  if (inflight_.present()) inflight_.given(used_, batch);
}

bool SplitQueue::wants_call() {
  if (published_ == signalled_) return false;
  // The driver writes its wish and then looks at the index; here it is the other way round.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const std::uint16_t before = std::exchange(signalled_, published_);
  if (!has(kFeatureEventIdx)) {
    return (load<std::uint16_t>(setup_.driver + kFlags) & kNoInterrupt) == 0;
  }
  const bool first = !std::exchange(signalled_once_, true);
  const auto event = load<std::uint16_t>(setup_.driver + kRing + std::size_t{2} * size());
  return first || passed(event, published_, before);
}

bool SplitQueue::ask_for_kicks() {
  if (has(kFeatureEventIdx)) {
    store<std::uint16_t>(setup_.device + kRing + kUsedEntry * size(), next_);
    log_device(kRing + kUsedEntry * size(), 2);
  } else {
    store<std::uint16_t>(setup_.device + kFlags, 0);
    log_device(kFlags, 2);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return available(std::memory_order_relaxed) != next_;
}

void SplitQueue::decline_kicks() {
  if (has(kFeatureEventIdx)) return;  // the event stays behind, and the driver passes it once
  store<std::uint16_t>(setup_.device + kFlags, kNoNotify);
  log_device(kFlags, 2);
}

}  // namespace

Result<std::unique_ptr<Virtqueue>> open_split(const GuestMemory& memory, RingSetup setup) {
  if ((setup.size & (setup.size - 1)) != 0) {
    return Error(Kind::invalid_argument,
                 "the size of a split ring is a power of two, not " + std::to_string(setup.size));
  }
  return std::unique_ptr<Virtqueue>(std::make_unique<SplitQueue>(memory, setup));
}

}  // namespace pqblk::exports
