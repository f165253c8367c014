// Fixed-width big- and little-endian fields for on-disk structures.
//
// Room base/. A Be<T>/Le<T> has alignment 1 and the size of T, so a struct of them is the on-disk
// layout itself; static_assert its size and offsets where it is declared.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>

namespace pqblk {

template <std::unsigned_integral T>
constexpr T byte_swap(T v) {
  if constexpr (sizeof(T) == 1) return v;
  if constexpr (sizeof(T) == 2) return __builtin_bswap16(v);
  if constexpr (sizeof(T) == 4) return __builtin_bswap32(v);
  if constexpr (sizeof(T) == 8) return __builtin_bswap64(v);
}

template <std::unsigned_integral T, std::endian E>
class Field {
 public:
  Field() = default;
  Field(T v) { *this = v; }  // NOLINT: a field is used like the number it stores
  Field& operator=(T v) {
    if constexpr (E != std::endian::native) v = byte_swap(v);
    std::memcpy(bytes_, &v, sizeof v);
    return *this;
  }
  operator T() const {  // NOLINT
    T v;
    std::memcpy(&v, bytes_, sizeof v);
    if constexpr (E != std::endian::native) v = byte_swap(v);
    return v;
  }
  T get() const { return *this; }

 private:
  unsigned char bytes_[sizeof(T)];
};

using Be16 = Field<std::uint16_t, std::endian::big>;
using Be32 = Field<std::uint32_t, std::endian::big>;
using Be64 = Field<std::uint64_t, std::endian::big>;
using Le16 = Field<std::uint16_t, std::endian::little>;
using Le32 = Field<std::uint32_t, std::endian::little>;
using Le64 = Field<std::uint64_t, std::endian::little>;

}  // namespace pqblk
