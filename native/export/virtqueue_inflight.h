// The region in which a vhost-user back-end records the chains it has taken, so that the one that
// comes after a crash gives each of them back once (vhost-user, "Inflight I/O tracking").
//
// Room export/, private to the rings: layouts and the steps on them. The memory is shared with the
// front-end, which only keeps it: what is read from it is checked like anything hostile. Stores
// that must not swap are releases: a killed process leaves what came before the last one, in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "export/virtqueue_access.h"

namespace pqblk::exports {

inline constexpr std::uint16_t kInflightVersion = 1;
inline constexpr std::size_t kInflightHeaderBytes = 32;  // of one queue's part, both layouts
inline constexpr std::size_t kInflightEntryBytes = 32;   // the packed layout's; split needs 16

// One queue's part of the region. Both layouts get the larger one's room.
struct InflightRegion {
  std::uint8_t* data = nullptr;
  bool present() const { return data != nullptr; }
  static constexpr std::uint64_t bytes(std::uint32_t ring_size) {
    const std::uint64_t plain = kInflightHeaderBytes + kInflightEntryBytes * ring_size;
    return (plain + 63) / 64 * 64;
  }
};

// Layout QueueRegionSplit.
class InflightSplit {
 public:
  InflightSplit() = default;
  InflightSplit(InflightRegion region, std::uint32_t size) : data_(region.data), size_(size) {}
  bool present() const { return data_ != nullptr; }

  // Brings the region up to date with the ring's used index; `heads` get those that were taken and
  // not given back, in the order of taking. False: it knew nothing of this ring and begins anew.
  bool recover(std::uint16_t ring_used, std::vector<std::uint16_t>& heads);
  void taken(std::uint16_t head);
  void giving(std::uint16_t head);                           // before the used index grows
  void given(std::uint16_t ring_used, std::uint16_t batch);  // after it did

 private:
  static constexpr std::size_t kVersion = 8, kNumber = 10, kLastBatch = 12, kUsed = 14,
                               kEntries = 16;
  static constexpr std::size_t kEntry = 16, kNext = 6, kCounter = 8;
  std::uint8_t* entry(std::uint16_t head) const { return data_ + kEntries + kEntry * head; }
  void clear_batch(std::uint16_t batch);

  std::uint8_t* data_ = nullptr;
  std::uint32_t size_ = 0;
  std::uint64_t counter_ = 0;
};

// Layout QueueRegionPacked. The ring's descriptors are kept here because used ones overwrite them.
class InflightPacked {
 public:
  struct Recovered {
    std::uint16_t track = 0;
    std::vector<Descriptor> descriptors;
  };
  struct Place {
    std::uint16_t index = 0;
    bool wrap = true;
  };

  InflightPacked() = default;
  InflightPacked(InflightRegion region, std::uint32_t size) : data_(region.data), size_(size) {}
  bool present() const { return data_ != nullptr; }

  // As above; `used` comes in as the front-end's base says and goes out as the region says. `ring`:
  // the descriptor ring. False: the region contradicts itself.
  bool recover(const std::uint8_t* ring, Place& used, std::vector<Recovered>& out);
  // The chain's descriptors, one after the other; returns its entry. False: no room, which only a
  // region that was tampered with can lead to.
  bool taken(const std::vector<Descriptor>& descriptors, std::uint16_t& track);
  bool giving(std::uint16_t track, Place used_after);  // before the descriptor's flags change
  void given(std::uint16_t track);                     // after they did

 private:
  static constexpr std::size_t kVersion = 8, kNumber = 10, kFree = 12, kOldFree = 14, kUsed = 16,
                               kOldUsed = 18, kWrap = 20, kOldWrap = 21;
  static constexpr std::size_t kNext = 2, kLast = 4, kCount = 6, kCounter = 8, kId = 16,
                               kFlags = 18, kLength = 20, kAddress = 24;
  std::uint8_t* entry(std::uint16_t index) const {
    return data_ + kInflightHeaderBytes + kInflightEntryBytes * index;
  }
  void make_new(Place used);
  void commit();
  void roll_back();
  bool clear_free_list();
  bool chain_of(std::uint16_t head, Recovered& out) const;

  std::uint8_t* data_ = nullptr;
  std::uint32_t size_ = 0;
  std::uint64_t counter_ = 0;
};

}  // namespace pqblk::exports
