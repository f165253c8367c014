// Bytes of a simulated file, cheap to copy: 4 KiB pages in chunks of 64, shared until written.
//
// Room test/sim. A crash image is a copy of a whole disk, taken thousands of times a second;
// copying a Pages copies one pointer for each 256 KiB. Absent pages are zeros. Single-threaded.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace pqblk::sim {

class Pages {
 public:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kPagesPerChunk = 64;

  std::uint64_t size() const { return size_; }
  // Whether anything was written there since it was made, zeroed or cut off, be it zeros.
  bool holds(std::uint64_t offset) const {
    return offset < size_ && find(offset / kPage) != nullptr;
  }
  void resize(std::uint64_t size);                                         // new bytes are zeros
  void read(std::uint64_t offset, void* out, std::size_t length) const;    // zeros beyond the end
  void write(std::uint64_t offset, const void* data, std::size_t length);  // grows as needed
  void zero(std::uint64_t offset, std::uint64_t length);                   // within the size only
  // Equal content gives an equal hash; cached in the shared parts.
  std::uint64_t hash() const;

 private:
  struct Page {
    std::array<std::uint8_t, kPage> bytes{};
    std::uint64_t hash = 0;
    bool hashed = false;
  };
  struct Chunk {
    std::array<std::shared_ptr<Page>, kPagesPerChunk> pages;
    std::uint64_t hash = 0;
    bool hashed = false;
  };
  const Page* find(std::uint64_t page) const;
  std::shared_ptr<Page>& own_slot(std::uint64_t page);
  Page& own(std::uint64_t page);
  static std::uint64_t hash_of(Page& page);
  static std::uint64_t hash_of(Chunk& chunk);

  std::vector<std::shared_ptr<Chunk>> chunks_;
  std::uint64_t size_ = 0;
};

std::uint64_t mix64(std::uint64_t value);  // a bijective scramble
std::uint64_t hash_bytes(const void* data, std::size_t length);

}  // namespace pqblk::sim
