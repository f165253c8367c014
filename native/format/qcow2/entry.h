// L2 entries: from raw words to facts, and back.
//
// Room format/qcow2: pure functions. Spec: "L2 table entry", "Standard Cluster Descriptor",
// "Compressed Clusters Descriptor", "Extended L2 Entries".
#pragma once

#include <cstdint>

#include "base/units.h"
#include "format/qcow2/layout.h"

namespace pqblk::format::qcow2 {

inline constexpr std::uint64_t kCopied = std::uint64_t{1} << 63;
inline constexpr std::uint64_t kCompressed = std::uint64_t{1} << 62;
inline constexpr std::uint64_t kZero = 1;
inline constexpr std::uint64_t kOffsetMask = 0x00fffffffffffe00;  // bits 9-55
inline constexpr std::uint64_t kL1Reserved = ~(kCopied | kOffsetMask);
inline constexpr std::uint64_t kL2Reserved = 0x3f000000000001fe;  // bits 1-8 and 56-61

enum class EntryKind : std::uint8_t {
  unallocated,     // reads from the backing file, or zeros
  zero_plain,      // reads zeros, no host cluster
  zero_allocated,  // reads zeros, a host cluster is kept for it
  data,            // `host`; with extended L2 see the subcluster bits
  compressed,      // `host` (any byte), `compressed_bytes`
  corrupt,         // reserved bits, a misaligned offset, or a place beyond the file
};

struct L2Entry {
  EntryKind kind = EntryKind::unallocated;
  bool copied = false;                 // refcount is exactly one: may be overwritten in place
  HostOffset host;                     // data, zero_allocated, compressed
  std::uint32_t compressed_bytes = 0;  // upper bound: to the end of its last 512-byte sector
  // Extended L2 only (kind unallocated or data): bit i is subcluster i.
  std::uint32_t allocated = 0;
  std::uint32_t zero = 0;
  std::uint64_t raw = 0;  // first word as stored
};

// `host_end`: bytes of the image file (or of what was allocated since); offsets lie below it.
// With extended L2 the kind is unallocated (no host cluster), data (a host cluster), or compressed,
// and `allocated` / `zero` say the rest; without, `bitmap` is ignored. `version` 2 has no zero
// flag.
L2Entry decode_entry(const Layout& layout, std::uint32_t version, std::uint64_t raw,
                     std::uint64_t bitmap, std::uint64_t host_end);

constexpr std::uint64_t data_entry(HostOffset host) { return host.bytes | kCopied; }
constexpr std::uint64_t zero_entry() { return kZero; }
constexpr std::uint64_t zero_entry(HostOffset host) { return host.bytes | kCopied | kZero; }
constexpr std::uint64_t subcluster_bitmap(std::uint32_t allocated, std::uint32_t zero) {
  return std::uint64_t{zero} << 32 | allocated;
}

}  // namespace pqblk::format::qcow2
