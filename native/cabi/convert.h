// Between the C structs of pqblk.h and the engine's types: sizes, errors, texts.
//
// Room cabi/: a thin shell over image::Disk. It translates and decides nothing; no exception leaves
// it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "base/error.h"
#include "image/disk.h"
#include "pqblk.h"
#include "sealed/keys.h"

struct pqblk_disk {
  std::shared_ptr<pqblk::image::Disk> disk;  // shared with its queues
  std::uint32_t queues;
};

struct pqblk_keys {
  pqblk::sealed::Uuid uuid{};
  pqblk::sealed::VolumeKeys keys;
};

namespace pqblk::cabi {

// Fills `out` (may be null) within its size; returns the kind.
int report(pqblk_error* out, const Error& error) noexcept;

// Runs fn() -> Error.
template <class Fn>
int guarded(pqblk_error* out, Fn fn) noexcept {
  try {
    return report(out, fn());
  } catch (const std::bad_alloc&) {
    return report(out, Error(Kind::no_memory, {}));
  } catch (...) {
    return report(out, Error(Kind::io_error, {}));
  }
}

// As guarded(), for fn(count&) -> Error: the count, or minus the kind.
template <class Fn>
int counted(pqblk_error* out, Fn fn) noexcept {
  int count = 0;
  const int kind = guarded(out, [&] { return fn(count); });
  return kind == PQBLK_OK ? count : -kind;
}

inline Error misuse(const char* what) { return Error(Kind::invalid_argument, what); }

// The rule for structs that the caller fills: `size` is their first member, what he does not have
// is zero, what we do not know must be. `required` is the size that holds all he must say.
template <class T>
Error take(const T* from, std::size_t required, T& out) {
  if (from == nullptr) return misuse("a null pointer instead of a struct");
  const std::size_t size = from->size;
  if (size < required) return misuse("the size of a struct is too small: use its INIT macro");
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  for (std::size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return Error(Kind::unsupported, "a struct has a member that this version of libpqblk lacks");
    }
  }
  out = T{};
  std::memcpy(&out, from, std::min(size, sizeof(T)));
  return {};
}

// The rule for structs that the library fills: nothing is written beyond `size`, what we do not
// know becomes zero.
template <class T>
void put(T* out, T value, std::size_t size) {
  value.size = static_cast<std::uint32_t>(size);
  std::memcpy(static_cast<void*>(out), &value, std::min(size, sizeof(T)));
  if (size > sizeof(T)) {
    std::memset(reinterpret_cast<unsigned char*>(out) + sizeof(T), 0, size - sizeof(T));
  }
}
template <class T>
Error put(T* out, const T& value) {
  if (out == nullptr || out->size < sizeof out->size) {
    return misuse("the size of a struct is too small: use its INIT macro");
  }
  put(out, value, out->size);
  return {};
}

// Cut to what fits, always terminated.
template <std::size_t N>
void put_text(char (&out)[N], std::string_view text) {
  const std::size_t length = std::min(text.size(), N - 1);
  text.copy(out, length);
  out[length] = '\0';
}

// The i-th element of an array whose elements have `stride` bytes.
template <class T>
T* element(T* first, std::size_t stride, std::size_t i) {
  using Byte = std::conditional_t<std::is_const_v<T>, const unsigned char, unsigned char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + i * stride);
}

// Kind::invalid_argument for a number that is no format.
Error parse_format(std::uint32_t number, image::Format& out);

// What a request of the C interface asks for, but for memory, completion and cookie.
Error fill_request(std::uint32_t type, std::uint32_t flags, std::uint64_t offset,
                   std::uint64_t length, image::Request& out);

Result<sealed::VolumeKeys> copy_keys(const sealed::VolumeKeys& keys);

}  // namespace pqblk::cabi
