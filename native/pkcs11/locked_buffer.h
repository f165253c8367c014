// A buffer for messages that may hold a PIN or a shared secret: locked, left out of core dumps,
// between guard pages, wiped when it goes.
//
// Room pkcs11/. Locking is best effort: where the system refuses (RLIMIT_MEMLOCK), the bytes may
// reach swap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/error.h"

namespace pqblk::pkcs11 {

class LockedBuffer {
 public:
  static Result<LockedBuffer> make(std::size_t bytes);

  LockedBuffer(LockedBuffer&& other) noexcept;
  LockedBuffer& operator=(LockedBuffer&&) = delete;
  ~LockedBuffer();

  std::span<std::uint8_t> bytes() const { return {data_, size_}; }
  void wipe();

 private:
  LockedBuffer(void* base, std::size_t mapped, std::uint8_t* data, std::size_t size)
      : base_(base), mapped_(mapped), data_(data), size_(size) {}

  void* base_;
  std::size_t mapped_;
  std::uint8_t* data_;
  std::size_t size_;
};

}  // namespace pqblk::pkcs11
