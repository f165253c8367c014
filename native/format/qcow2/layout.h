// Sizes of a QCOW2 image that follow from its header, and every limit this reader keeps.
//
// Room format/qcow2: facts and arithmetic only. Field names follow QEMU's docs/interop/qcow2.txt.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/units.h"

namespace pqblk::format::qcow2 {

inline constexpr std::uint32_t kMagic = 0x514649fb;  // "QFI\xfb"
inline constexpr std::uint32_t kClusterBitsMin = 9;
inline constexpr std::uint32_t kClusterBitsMax = 21;          // as QEMU: 2 MiB
inline constexpr std::uint32_t kClusterBitsMinExtended = 14;  // with extended L2 entries
inline constexpr std::uint32_t kRefcountOrderMax = 6;
inline constexpr std::uint64_t kL1BytesMax = 32 * kMiB;             // as QEMU
inline constexpr std::uint64_t kRefcountTableBytesMax = 8 * kMiB;   // as QEMU
inline constexpr std::uint32_t kBackingNameMax = 1023;              // bytes
inline constexpr std::uint32_t kBackingFormatMax = 15;              // bytes, as QEMU
inline constexpr std::uint32_t kSnapshotsMax = 65536;               // as QEMU
inline constexpr std::uint64_t kSnapshotTableBytesMax = 64 * kMiB;  // as QEMU
inline constexpr std::uint32_t kSnapshotExtraMax = 1024;            // bytes of extra data each
inline constexpr std::uint64_t kHostEnd = std::uint64_t{1} << 56;   // L1 and L2 reach below it
inline constexpr std::uint32_t kSubclusters = 32;
inline constexpr std::uint32_t kSliceBytesMax = 4096;  // unit of the L2 and refcount caches

struct Layout {
  std::uint32_t cluster_bits = 16;
  std::uint32_t refcount_order = 4;
  bool extended_l2 = false;

  constexpr std::uint64_t cluster_size() const { return std::uint64_t{1} << cluster_bits; }
  constexpr std::uint64_t clusters(std::uint64_t bytes) const {
    return div_ceil(bytes, cluster_size());
  }
  constexpr std::uint64_t align_to_cluster(std::uint64_t bytes) const {
    return clusters(bytes) << cluster_bits;
  }
  constexpr bool cluster_aligned(std::uint64_t offset) const {
    return (offset & (cluster_size() - 1)) == 0;
  }

  // L2: an entry is 8 bytes, or 16 with the subcluster bitmap.
  constexpr std::uint32_t l2_entry_bits() const { return extended_l2 ? 4 : 3; }
  constexpr std::uint32_t l2_entry_bytes() const { return 1u << l2_entry_bits(); }
  constexpr std::uint32_t l2_bits() const { return cluster_bits - l2_entry_bits(); }
  constexpr std::uint64_t l2_entries() const { return std::uint64_t{1} << l2_bits(); }
  constexpr std::uint64_t l1_index(Slot slot) const { return slot.value >> l2_bits(); }
  constexpr std::uint64_t l2_index(Slot slot) const { return slot.value & (l2_entries() - 1); }
  // L1 entries needed for that many slots.
  constexpr std::uint64_t l1_entries(std::uint64_t slots) const {
    return div_ceil(slots, l2_entries());
  }
  constexpr std::uint64_t subcluster_size() const { return cluster_size() / kSubclusters; }

  // The caches hold tables in slices, so that a miss reads 4 KiB and not a cluster.
  constexpr std::uint32_t slice_bytes() const {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(cluster_size(), kSliceBytesMax));
  }
  constexpr std::uint32_t slice_entries() const { return slice_bytes() >> l2_entry_bits(); }

  constexpr std::uint32_t refcount_bits() const { return 1u << refcount_order; }
  constexpr std::uint64_t refcount_max() const {
    return refcount_order == 6 ? ~std::uint64_t{0} : (std::uint64_t{1} << refcount_bits()) - 1;
  }
  constexpr std::uint64_t refcount_block_entries() const {
    return (cluster_size() * 8) >> refcount_order;
  }
  constexpr std::uint64_t refcount_slice_entries() const {
    return (std::uint64_t{slice_bytes()} * 8) >> refcount_order;
  }
};

}  // namespace pqblk::format::qcow2
