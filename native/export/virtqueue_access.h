// Fields of rings that two parties share: little-endian, atomic where the other side writes them.
//
// Room export/, private to the rings. read_once() is for what must not change between check and
// use: the compiler may not go back to the memory for a second look.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "base/endian.h"

namespace pqblk::exports {

template <class T>
T from_le(T value) {
  if constexpr (std::endian::native != std::endian::little) value = byte_swap(value);
  return value;
}

template <class T>
T load(const std::uint8_t* place, std::memory_order order = std::memory_order_relaxed) {
  auto* field = reinterpret_cast<T*>(const_cast<std::uint8_t*>(place));
  return from_le(std::atomic_ref<T>(*field).load(order));
}

template <class T>
void store(std::uint8_t* place, T value, std::memory_order order = std::memory_order_relaxed) {
  std::atomic_ref<T>(*reinterpret_cast<T*>(place)).store(from_le(value), order);
}

// At any alignment.
template <class T>
T read_once(const std::uint8_t* place) {
  struct __attribute__((packed, may_alias)) Unaligned {
    T value;
  };
  return from_le(reinterpret_cast<const volatile Unaligned*>(place)->value);
}

inline constexpr std::size_t kDescriptorBytes = 16;
inline constexpr std::uint16_t kDescriptorNext = 1;
inline constexpr std::uint16_t kDescriptorWrite = 2;
inline constexpr std::uint16_t kDescriptorIndirect = 4;

// Both rings' descriptors are 16 bytes; the last two fields have their own names in each.
struct Descriptor {
  std::uint64_t address = 0;
  std::uint32_t length = 0;
  std::uint16_t third = 0;   // split: flags; packed: buffer id
  std::uint16_t fourth = 0;  // split: next; packed: flags

  static Descriptor read(const std::uint8_t* place) {
    const auto low = read_once<std::uint64_t>(place);
    const auto high = read_once<std::uint64_t>(place + 8);
    return {low, static_cast<std::uint32_t>(high), static_cast<std::uint16_t>(high >> 32),
            static_cast<std::uint16_t>(high >> 48)};
  }
};

// Virtio 1.2, 2.7.10: did an index pass `event` on its way from `before` to `after`?
inline bool passed(std::uint16_t event, std::uint16_t after, std::uint16_t before) {
  return static_cast<std::uint16_t>(after - event - 1) < static_cast<std::uint16_t>(after - before);
}

}  // namespace pqblk::exports
