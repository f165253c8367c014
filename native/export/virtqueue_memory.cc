#include "export/virtqueue_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "base/units.h"

namespace pqblk::exports {
namespace {

constexpr std::uint64_t kPageMin = 4096;
constexpr std::uint64_t kMappingMax = std::uint64_t{1} << 46;

bool overlap(std::uint64_t a, std::uint64_t a_size, std::uint64_t b, std::uint64_t b_size) {
  return a < b + b_size && b < a + a_size;
}

}  // namespace

// ---- SharedMapping ----

SharedMapping::~SharedMapping() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Result<SharedMapping> SharedMapping::map(int fd, std::uint64_t bytes) {
  // A memfd that can still be sealed shrinks no more from here on; what cannot is taken as it is.
  ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK);
  struct stat status {};
  if (::fstat(fd, &status) != 0) return Error::from_errno(errno, "map shared memory");
  if (bytes == 0 || bytes > kMappingMax) {
    return Error(Kind::invalid_argument, "shared memory of " + std::to_string(bytes) + " bytes");
  }
  // A touch beyond the end of a file is SIGBUS.
  if (S_ISREG(status.st_mode) && static_cast<std::uint64_t>(status.st_size) < bytes) {
    return Error(Kind::invalid_argument, "the descriptor of shared memory holds " +
                                             std::to_string(status.st_size) + " bytes, not the " +
                                             std::to_string(bytes) + " that were announced");
  }
  // Huge pages are unmapped whole; their size is the block size of their file system.
  const auto block = static_cast<std::uint64_t>(std::max<blksize_t>(status.st_blksize, 0));
  const std::uint64_t page =
      std::max(block != 0 && (block & (block - 1)) == 0 ? block : 0, kPageMin);
  const std::uint64_t whole = align_up(bytes, page);
  void* data = ::mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (data == MAP_FAILED) return Error::from_errno(errno, "map shared memory");
  ::madvise(data, whole, MADV_DONTDUMP);  // guests' memory has no place in a core file
  SharedMapping mapping;
  mapping.data_ = static_cast<std::uint8_t*>(data);
  mapping.size_ = whole;
  return mapping;
}

// ---- DirtyLog ----

Result<std::shared_ptr<DirtyLog>> DirtyLog::map(int fd, std::uint64_t offset, std::uint64_t bytes) {
  if (bytes == 0 || bytes > kLogBytesMax || offset > kLogBytesMax) {
    return Error(Kind::invalid_argument,
                 "a dirty log of " + std::to_string(bytes) + " bytes at " + std::to_string(offset));
  }
  auto mapping = SharedMapping::map(fd, offset + bytes);
  if (!mapping) return mapping.take_error();
  return std::shared_ptr<DirtyLog>(new DirtyLog(std::move(*mapping), offset, bytes));
}

void DirtyLog::mark(std::uint64_t guest, std::uint64_t length) {
  if (length == 0) return;
  const std::uint64_t end = std::min((guest + length - 1) / kLogPage + 1, pages_);
  for (std::uint64_t page = guest / kLogPage; page < end; ++page) {
    // The front-end takes and clears bits meanwhile.
    std::atomic_ref<std::uint8_t> byte(mapping_.data()[offset_ + page / 8]);
    byte.fetch_or(static_cast<std::uint8_t>(1U << (page % 8)), std::memory_order_release);
  }
}

// ---- GuestMemory ----

Error GuestMemory::add(const MemorySlot& slot, int fd) {
  if (slots_.size() >= kMemorySlotsMax) {
    return Error(Kind::no_memory, "more than " + std::to_string(kMemorySlotsMax) + " memory slots");
  }
  const bool sane = slot.size != 0 && slot.size <= kMappingMax && slot.file_offset <= kMappingMax &&
                    slot.guest + slot.size > slot.guest && slot.user + slot.size > slot.user;
  if (!sane) return Error(Kind::invalid_argument, "a memory slot whose range is not one");
  for (const Mapped& other : slots_) {
    if (overlap(slot.guest, slot.size, other.slot.guest, other.slot.size) ||
        overlap(slot.user, slot.size, other.slot.user, other.slot.size)) {
      return Error(Kind::invalid_argument, "memory slots overlap");
    }
  }
  auto mapping = SharedMapping::map(fd, slot.file_offset + slot.size);
  if (!mapping) return mapping.take_error();
  const auto after = std::upper_bound(
      slots_.begin(), slots_.end(), slot.guest,
      [](std::uint64_t guest, const Mapped& other) { return guest < other.slot.guest; });
  slots_.insert(after, Mapped{slot, std::move(*mapping)});
  return {};
}

Error GuestMemory::remove(const MemorySlot& slot) {
  const auto at = std::find_if(slots_.begin(), slots_.end(), [&](const Mapped& other) {
    return other.slot.guest == slot.guest && other.slot.user == slot.user &&
           other.slot.size == slot.size;
  });
  if (at == slots_.end()) return Error(Kind::not_found, "no such memory slot");
  slots_.erase(at);
  return {};
}

const GuestMemory::Mapped* GuestMemory::find(std::uint64_t guest) const {
  auto after = std::upper_bound(
      slots_.begin(), slots_.end(), guest,
      [](std::uint64_t address, const Mapped& other) { return address < other.slot.guest; });
  if (after == slots_.begin()) return nullptr;
  const Mapped& candidate = *--after;
  return guest - candidate.slot.guest < candidate.slot.size ? &candidate : nullptr;
}

GuestMemory::Window GuestMemory::window_of(std::uint64_t guest) const {
  const Mapped* mapped = find(guest);
  if (mapped == nullptr) return {};
  return {mapped->slot.guest, mapped->slot.size, mapped->host()};
}

std::uint8_t* GuestMemory::at(std::uint64_t guest, std::uint64_t length) const {
  return window_of(guest).at(guest, length);
}

std::uint8_t* GuestMemory::at_user(std::uint64_t user, std::uint64_t length) const {
  for (const Mapped& mapped : slots_) {
    if (user < mapped.slot.user || user - mapped.slot.user >= mapped.slot.size) continue;
    const std::uint64_t inside = user - mapped.slot.user;
    return length <= mapped.slot.size - inside ? mapped.host() + inside : nullptr;
  }
  return nullptr;
}

bool GuestMemory::translate(std::uint64_t guest, std::uint64_t length,
                            std::vector<iovec>& out) const {
  const std::size_t before = out.size();
  while (length != 0) {
    const Mapped* mapped = find(guest);
    if (mapped == nullptr) {
      out.resize(before);
      return false;
    }
    const std::uint64_t inside = guest - mapped->slot.guest;
    const std::uint64_t piece = std::min(length, mapped->slot.size - inside);
    out.push_back({mapped->host() + inside, piece});
    guest += piece;
    length -= piece;
  }
  return true;
}

std::uint64_t GuestMemory::guest_of(const void* host) const {
  const auto* place = static_cast<const std::uint8_t*>(host);
  for (const Mapped& mapped : slots_) {
    if (place >= mapped.host() && place < mapped.host() + mapped.slot.size) {
      return mapped.slot.guest + static_cast<std::uint64_t>(place - mapped.host());
    }
  }
  return 0;
}

}  // namespace pqblk::exports
