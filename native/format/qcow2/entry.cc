#include "format/qcow2/entry.h"

namespace pqblk::format::qcow2 {
namespace {

L2Entry corrupt(std::uint64_t raw) {
  L2Entry entry;
  entry.kind = EntryKind::corrupt;
  entry.raw = raw;
  return entry;
}

L2Entry decode_compressed(const Layout& layout, std::uint64_t raw, std::uint64_t host_end) {
  // x = 62 - (cluster_bits - 8): offset below bit x, additional sectors from there to bit 61.
  const std::uint32_t x = 62 - (layout.cluster_bits - 8);
  const std::uint64_t descriptor = raw & ~(kCopied | kCompressed);
  const std::uint64_t offset = descriptor & ((std::uint64_t{1} << x) - 1);
  const std::uint64_t sectors = descriptor >> x;
  // COPIED is never set on a compressed cluster, and its offset stays below bit 56.
  if ((raw & kCopied) != 0 || offset >= kHostEnd || offset >= host_end) return corrupt(raw);
  L2Entry entry;
  entry.kind = EntryKind::compressed;
  entry.raw = raw;
  entry.host = {offset};
  entry.compressed_bytes = static_cast<std::uint32_t>((sectors + 1) * 512 - (offset & 511));
  return entry;
}

}  // namespace

L2Entry decode_entry(const Layout& layout, std::uint32_t version, std::uint64_t raw,
                     std::uint64_t bitmap, std::uint64_t host_end) {
  if ((raw & kCompressed) != 0) {
    if (layout.extended_l2 && bitmap != 0) return corrupt(raw);
    return decode_compressed(layout, raw, host_end);
  }
  const std::uint64_t offset = raw & kOffsetMask;
  const bool copied = (raw & kCopied) != 0;
  const bool zero = (raw & kZero) != 0;
  if ((raw & kL2Reserved) != 0 || !layout.cluster_aligned(offset)) return corrupt(raw);
  if (offset != 0 && offset >= host_end) return corrupt(raw);
  // Offset zero with COPIED means host cluster 0, which only an external data file may do.
  if (offset == 0 && copied) return corrupt(raw);

  L2Entry entry;
  entry.raw = raw;
  entry.copied = copied;
  entry.host = {offset};
  if (layout.extended_l2) {
    entry.allocated = static_cast<std::uint32_t>(bitmap);
    entry.zero = static_cast<std::uint32_t>(bitmap >> 32);
    if (zero || (entry.allocated & entry.zero) != 0) return corrupt(raw);
    if (offset == 0 && entry.allocated != 0) return corrupt(raw);
    entry.kind = offset == 0 ? EntryKind::unallocated : EntryKind::data;
    return entry;
  }
  if (zero) {
    if (version < 3) return corrupt(raw);
    entry.kind = offset == 0 ? EntryKind::zero_plain : EntryKind::zero_allocated;
  } else {
    entry.kind = offset == 0 ? EntryKind::unallocated : EntryKind::data;
  }
  return entry;
}

}  // namespace pqblk::format::qcow2
