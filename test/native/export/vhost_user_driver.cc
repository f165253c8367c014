// The driver's side of split and packed rings (virtio 1.2, 2.7.13 and 2.8.21).
//
// Room test/export.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "export/vhost_user_client.h"

namespace pqblk::exports::test {
namespace {

constexpr std::uint16_t kNext = 1, kWrite = 2, kIndirect = 4;

template <class T>
T get(const std::uint8_t* place, std::memory_order order = std::memory_order_relaxed) {
  return std::atomic_ref<T>(*reinterpret_cast<T*>(const_cast<std::uint8_t*>(place))).load(order);
}
template <class T>
void put(std::uint8_t* place, T value, std::memory_order order = std::memory_order_relaxed) {
  std::atomic_ref<T>(*reinterpret_cast<T*>(place)).store(value, order);
}

// {address, length, third, fourth}
void put_descriptor(std::uint8_t* place, std::uint64_t address, std::uint32_t length,
                    std::uint16_t third, std::uint16_t fourth) {
  std::memcpy(place, &address, 8);
  std::memcpy(place + 8, &length, 4);
  std::memcpy(place + 12, &third, 2);
  std::memcpy(place + 14, &fourth, 2);
}

bool need_event(std::uint16_t event, std::uint16_t after, std::uint16_t before) {
  return static_cast<std::uint16_t>(after - event - 1) < static_cast<std::uint16_t>(after - before);
}

class SplitDriver final : public DriverRing {
 public:
  SplitDriver(GuestRam& ram, RingOptions options)
      : DriverRing(ram, options), next_of_(options.size), out_(options.size) {
    const std::uint32_t n = options.size;
    descriptors = ram.allocate(std::uint64_t{16} * n, 16);
    driver = ram.allocate(6 + std::uint64_t{2} * n, 2);
    device = ram.allocate(6 + std::uint64_t{8} * n, 4);
    for (std::uint32_t i = 0; i < n; ++i) next_of_[i] = static_cast<std::uint16_t>(i + 1);
    room_ = n;
  }

  using DriverRing::add;
  void add(std::span<const Buffer> buffers, std::uint32_t token) override {
    const bool indirect = options_.indirect && buffers.size() > 1;
    const auto need = static_cast<std::uint32_t>(indirect ? 1 : buffers.size());
    if (room_ < need) std::abort();
    room_ -= need;
    std::uint8_t* const table = ram_.at(descriptors);
    const std::uint16_t head = free_;
    std::uint16_t last = head;
    if (indirect) {
      put_descriptor(table + 16 * head, write_table(head, buffers, false),
                     static_cast<std::uint32_t>(16 * buffers.size()), kIndirect, 0);
      free_ = next_of_[head];
    }
    for (std::uint32_t i = 0; !indirect && i < need; ++i) {
      const Buffer& b = buffers[i];
      const bool more = i + 1 < need;
      const std::uint16_t next = next_of_[free_];
      put_descriptor(table + 16 * free_, b.guest, b.length,
                     static_cast<std::uint16_t>((b.writable ? kWrite : 0) | (more ? kNext : 0)),
                     more ? next : std::uint16_t{0});
      last = std::exchange(free_, next);
    }
    out_[head] = {token, need, last};
    put<std::uint16_t>(ram_.at(driver) + 4 + 2 * (next_ & (options_.size - 1)), head);
    ++next_;
  }

  bool publish() override {
    const std::uint16_t before = published_;
    put<std::uint16_t>(ram_.at(driver) + 2, next_, std::memory_order_release);
    published_ = next_;
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!options_.event_idx) return get<std::uint16_t>(ram_.at(device)) == 0;
    const auto event = get<std::uint16_t>(ram_.at(device) + 4 + std::size_t{8} * options_.size);
    return need_event(event, next_, before);
  }

  std::optional<Used> pop() override {
    const auto index = get<std::uint16_t>(ram_.at(device) + 2, std::memory_order_acquire);
    if (index == seen_) return std::nullopt;
    const std::uint8_t* entry =
        ram_.at(device) + 4 + std::size_t{8} * (seen_ & (options_.size - 1));
    const auto id = get<std::uint32_t>(entry);
    const auto written = get<std::uint32_t>(entry + 4);
    ++seen_;
    if (id >= options_.size || out_[id].slots == 0) {
      ++complaints;
      return pop();
    }
    // The chain is still linked as it was taken.
    next_of_[out_[id].last] = std::exchange(free_, static_cast<std::uint16_t>(id));
    room_ += std::exchange(out_[id].slots, 0);
    return Used{out_[id].token, written};
  }

  bool ask_for_calls(std::uint16_t answers) override {
    if (!options_.event_idx) answers = 1;
    const auto skipped = static_cast<std::uint16_t>(answers - 1);
    if (options_.event_idx) {
      put<std::uint16_t>(ram_.at(driver) + 4 + std::size_t{2} * options_.size,
                         static_cast<std::uint16_t>(seen_ + skipped));
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
    return static_cast<std::uint16_t>(get<std::uint16_t>(ram_.at(device) + 2) - seen_) > skipped;
  }

  std::uint32_t base() const override { return get<std::uint16_t>(ram_.at(device) + 2); }

 private:
  struct Out {
    std::uint32_t token = 0, slots = 0;  // by head; no slots: not out
    std::uint16_t last = 0;
  };
  std::vector<std::uint16_t> next_of_;  // of a chain, or of the free descriptors
  std::vector<Out> out_;
  std::uint16_t free_ = 0;
  std::uint32_t room_ = 0;
  std::uint16_t next_ = 0, published_ = 0, seen_ = 0;
};

class PackedDriver final : public DriverRing {
 public:
  PackedDriver(GuestRam& ram, RingOptions options) : DriverRing(ram, options), out_(options.size) {
    descriptors = ram.allocate(std::uint64_t{16} * options.size, 16);
    driver = ram.allocate(4, 4);
    device = ram.allocate(4, 4);
    for (std::uint32_t i = 0; i < options.size; ++i) ids_.push_back(static_cast<std::uint16_t>(i));
    room_ = options.size;
  }

  using DriverRing::add;
  void add(std::span<const Buffer> buffers, std::uint32_t token) override {
    const bool indirect = options_.indirect && buffers.size() > 1;
    const auto need = static_cast<std::uint32_t>(indirect ? 1 : buffers.size());
    if (room_ < need || ids_.empty()) std::abort();
    room_ -= need;
    const std::uint16_t id = ids_.back();
    ids_.pop_back();
    out_[id] = {token, need, true};
    std::uint8_t* head = ram_.at(descriptors) + std::size_t{16} * next_;
    std::uint16_t head_flags = 0;
    for (std::uint32_t i = 0; i < need; ++i) {
      std::uint8_t* place = ram_.at(descriptors) + std::size_t{16} * next_;
      std::uint16_t flags = wrap_ ? 1 << 7 : 1 << 15;
      Buffer b = buffers[i];
      if (indirect) {
        b = {write_table(id, buffers, true), static_cast<std::uint32_t>(16 * buffers.size()),
             false};
        flags |= kIndirect;
      }
      if (b.writable) flags |= kWrite;
      if (i + 1 < need) flags |= kNext;
      std::memcpy(place, &b.guest, 8);
      put<std::uint32_t>(place + 8, b.length);
      put<std::uint16_t>(place + 12, id);
      if (i == 0) {
        head_flags = flags;
      } else {
        put<std::uint16_t>(place + 14, flags);
      }
      if (++next_ == options_.size) {
        next_ = 0;
        wrap_ = !wrap_;
      }
    }
    // Chains become visible one by one, in order; publish() only asks about the kick.
    put<std::uint16_t>(head + 14, head_flags, std::memory_order_release);
    added_ += need;
  }

  bool publish() override {
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const std::uint32_t added = std::exchange(added_, 0);
    const auto flags = get<std::uint16_t>(ram_.at(device) + 2, std::memory_order_acquire);
    if (flags == 1) return false;
    if (flags == 0) return true;
    const auto word = get<std::uint16_t>(ram_.at(device));
    const std::uint32_t turn = 2 * options_.size;
    const std::uint32_t event = (word & 0x7fffU) + ((word >> 15U) != 0 ? 0 : options_.size);
    const std::uint32_t here = next_ + (wrap_ ? 0 : options_.size);
    return (here + turn - event - 1) % turn < added;
  }

  std::optional<Used> pop() override {
    std::uint8_t* place = ram_.at(descriptors) + std::size_t{16} * seen_;
    const auto flags = get<std::uint16_t>(place + 14, std::memory_order_acquire);
    const bool avail = (flags & (1U << 7U)) != 0, used = (flags & (1U << 15U)) != 0;
    if (avail != used || used != seen_wrap_) return std::nullopt;
    const auto id = get<std::uint16_t>(place + 12);
    const auto written = get<std::uint32_t>(place + 8);
    if (id >= options_.size || !out_[id].out) {
      ++complaints;
      return std::nullopt;
    }
    out_[id].out = false;
    ids_.push_back(id);
    room_ += out_[id].slots;
    seen_ += out_[id].slots;
    if (seen_ >= options_.size) {
      seen_ -= options_.size;
      seen_wrap_ = !seen_wrap_;
    }
    return Used{out_[id].token, written};
  }

  bool ask_for_calls(std::uint16_t /*answers*/) override {
    if (options_.event_idx) {
      put<std::uint16_t>(ram_.at(driver),
                         static_cast<std::uint16_t>(seen_ | (seen_wrap_ ? 0x8000U : 0)));
      put<std::uint16_t>(ram_.at(driver) + 2, 2, std::memory_order_release);
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const auto flags = get<std::uint16_t>(ram_.at(descriptors) + std::size_t{16} * seen_ + 14);
    const bool avail = (flags & (1U << 7U)) != 0, used = (flags & (1U << 15U)) != 0;
    return avail == used && used == seen_wrap_;
  }

  std::uint32_t base() const override { return 0x8000'8000; }  // a front-end cannot know it

 private:
  struct Out {
    std::uint32_t token = 0, slots = 0;
    bool out = false;
  };
  std::vector<std::uint16_t> ids_;
  std::vector<Out> out_;
  std::uint32_t next_ = 0, seen_ = 0, room_ = 0, added_ = 0;
  bool wrap_ = true, seen_wrap_ = true;
};

}  // namespace

DriverRing::DriverRing(GuestRam& ram, RingOptions options) : ram_(ram), options_(options) {
  if (!options.indirect) return;
  for (std::uint32_t i = 0; i < options.size; ++i) {
    tables_.push_back(ram.allocate(16 * kTableMax, 16));
  }
}

std::uint64_t DriverRing::write_table(std::uint32_t id, std::span<const Buffer> buffers,
                                      bool packed) {
  if (buffers.size() > kTableMax) std::abort();
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const bool more = i + 1 < buffers.size();
    const std::uint16_t write = buffers[i].writable ? kWrite : 0;
    const auto next = static_cast<std::uint16_t>(i + 1);
    put_descriptor(
        ram_.at(tables_[id]) + 16 * i, buffers[i].guest, buffers[i].length,
        packed ? std::uint16_t{0} : static_cast<std::uint16_t>(write | (more ? kNext : 0)),
        packed ? write : next);
  }
  return tables_[id];
}

std::unique_ptr<DriverRing> DriverRing::make(GuestRam& ram, RingOptions options) {
  if (options.packed) return std::make_unique<PackedDriver>(ram, options);
  return std::make_unique<SplitDriver>(ram, options);
}

}  // namespace pqblk::exports::test
