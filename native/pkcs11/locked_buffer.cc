#include "pkcs11/locked_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace pqblk::pkcs11 {

Result<LockedBuffer> LockedBuffer::make(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t size = (bytes + page - 1) / page * page;
  const std::size_t mapped = size + 2 * page;
  void* base = ::mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return Error::from_errno(errno, "map secret memory");
  auto* data = static_cast<std::uint8_t*>(base) + page;
  if (::mprotect(data, size, PROT_READ | PROT_WRITE) != 0) {
    Error error = Error::from_errno(errno, "map secret memory");
    ::munmap(base, mapped);
    return error;
  }
  (void)::mlock(data, size);
  ::madvise(data, size, MADV_DONTDUMP);
  ::madvise(data, size, MADV_WIPEONFORK);
  return LockedBuffer(base, mapped, data, bytes);
}

LockedBuffer::LockedBuffer(LockedBuffer&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      mapped_(other.mapped_),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

LockedBuffer::~LockedBuffer() {
  if (base_ == nullptr) return;
  wipe();
  ::munmap(base_, mapped_);
}

void LockedBuffer::wipe() {
  if (data_ != nullptr) ::explicit_bzero(data_, size_);
}

}  // namespace pqblk::pkcs11
