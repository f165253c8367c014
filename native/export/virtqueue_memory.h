// Guest memory as the back-end of a virtqueue sees it: regions mapped here, addresses checked and
// translated, and the log of pages that were written (live migration).
//
// Room export/: knows addresses and mappings, nothing of rings or requests. A table changes only
// while no queue uses it; translation needs no lock. What a guest or a front-end says is checked
// here and nowhere else. One thing cannot be: a front-end that truncates memory which it handed
// over ends this process (SIGBUS); a memfd is sealed against that, others are trusted.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/error.h"

namespace pqblk::exports {

inline constexpr std::size_t kMemorySlotsMax = 256;
inline constexpr std::uint64_t kLogPage = 4096;  // bytes that one bit of the dirty log stands for
inline constexpr std::uint64_t kLogBytesMax = std::uint64_t{1} << 32;

// A shared mapping of a descriptor, from its start to `bytes`; unmapped at the end.
class SharedMapping {
 public:
  SharedMapping() = default;
  SharedMapping(SharedMapping&& other) noexcept { swap(other); }
  SharedMapping& operator=(SharedMapping&& other) noexcept {
    swap(other);
    return *this;
  }
  ~SharedMapping();
  // Does not keep the descriptor. Errors: invalid_argument when the file is shorter than `bytes`.
  static Result<SharedMapping> map(int fd, std::uint64_t bytes);

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void swap(SharedMapping& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

// A bit for each page of the guest's physical memory. Set from the queues' threads.
class DirtyLog {
 public:
  // `offset`, `bytes`: where the bitmap lies in the file. Errors: invalid_argument.
  static Result<std::shared_ptr<DirtyLog>> map(int fd, std::uint64_t offset, std::uint64_t bytes);
  // What lies beyond those bytes is not marked: the front-end made them as many as the guest's
  // memory needs, and what follows in the file is something else.
  void mark(std::uint64_t guest, std::uint64_t length);

 private:
  DirtyLog(SharedMapping mapping, std::uint64_t offset, std::uint64_t bytes)
      : mapping_(std::move(mapping)), offset_(offset), pages_(bytes * 8) {}
  const SharedMapping mapping_;
  const std::uint64_t offset_, pages_;
};

// Addresses of one region: the guest's, and those of the front-end's own process.
struct MemorySlot {
  std::uint64_t guest = 0;
  std::uint64_t user = 0;
  std::uint64_t size = 0;
  std::uint64_t file_offset = 0;  // of its first byte in the descriptor that came with it
};

class GuestMemory {
 public:
  // A region as it is mapped here: whoever looks up many addresses keeps the last one's, while the
  // table does not change.
  struct Window {
    std::uint64_t guest = 0, size = 0;
    std::uint8_t* host = nullptr;

    // As GuestMemory::at(), within this region.
    std::uint8_t* at(std::uint64_t address, std::uint64_t length) const {
      const std::uint64_t inside = address - guest;
      return inside < size && length <= size - inside ? host + inside : nullptr;
    }
  };
  Window window_of(std::uint64_t guest) const;  // of no size where there is none

  // Maps it; the descriptor stays the caller's. Errors: invalid_argument (overlap, overflow, a file
  // that is too short), no_memory (too many slots, no address space).
  Error add(const MemorySlot& slot, int fd);
  // The file offset does not matter. Error: not_found.
  Error remove(const MemorySlot& slot);
  void clear() { slots_.clear(); }
  std::size_t slots() const { return slots_.size(); }

  // `length` bytes (not 0) of guest memory in one piece; null when any of it is not there.
  std::uint8_t* at(std::uint64_t guest, std::uint64_t length) const;
  // The same by the front-end's address.
  std::uint8_t* at_user(std::uint64_t user, std::uint64_t length) const;
  // Appends the pieces; false when any of it is not there, and `out` then is as it was.
  bool translate(std::uint64_t guest, std::uint64_t length, std::vector<iovec>& out) const;
  // The guest's address of a place that translate() or at() returned.
  std::uint64_t guest_of(const void* host) const;

 private:
  struct Mapped {
    MemorySlot slot;
    SharedMapping mapping;
    std::uint8_t* host() const { return mapping.data() + slot.file_offset; }
  };
  const Mapped* find(std::uint64_t guest) const;

  std::vector<Mapped> slots_;  // by guest address, without overlap
};

}  // namespace pqblk::exports
