// Offsets and indices as distinct types, so that one cannot be passed for another.
//
// Room base/. A GuestOffset is a byte position on the disk the guest sees; a HostOffset one in the
// image file. A Sector here is always the sealed unit of 4096 bytes; virtio's 512-byte sectors are
// bytes shifted and never get a type of their own.
#pragma once

#include <compare>
#include <cstdint>

namespace pqblk {

inline constexpr std::uint64_t kKiB = 1024;
inline constexpr std::uint64_t kMiB = 1024 * kKiB;
inline constexpr std::uint64_t kGiB = 1024 * kMiB;
inline constexpr std::uint64_t kTiB = 1024 * kGiB;
inline constexpr std::uint32_t kSectorSize = 4096;  // sealed sector
inline constexpr std::uint32_t kSectorShift = 12;
inline constexpr std::uint32_t kVirtioSectorSize = 512;

template <class Tag>
struct Offset {
  std::uint64_t bytes = 0;
  constexpr auto operator<=>(const Offset&) const = default;
  constexpr Offset operator+(std::uint64_t n) const { return {bytes + n}; }
};
using GuestOffset = Offset<struct GuestTag>;
using HostOffset = Offset<struct HostTag>;

template <class Tag>
struct Index {
  std::uint64_t value = 0;
  constexpr auto operator<=>(const Index&) const = default;
};
using Sector = Index<struct SectorTag>;         // guest sector of 4096 bytes
using ClusterIndex = Index<struct ClusterTag>;  // guest cluster
using Slot = Index<struct SlotTag>;             // linear L2 slot: l1_index * l2_entries + l2_index

template <class T>
constexpr T div_ceil(T a, T b) {
  return a / b + (a % b != 0);
}
template <class T>
constexpr T align_up(T a, T b) {
  return div_ceil(a, b) * b;
}
template <class T>
constexpr T align_down(T a, T b) {
  return a - a % b;
}

}  // namespace pqblk
