#include <algorithm>
#include <cstring>

#include "format/qcow2/checker.h"

namespace pqblk::format::qcow2 {
namespace {

constexpr std::uint64_t kReadBytes = 256 * kKiB;
constexpr std::uint64_t kBitmapDirectoryMax = 64 * kMiB;
constexpr std::uint32_t kBitmapsMax = 65535;
constexpr std::uint64_t kBitmapTableMax = 8 * kMiB;  // entries

struct BitmapDirectoryEntry {  // "Bitmap directory", fixed part
  Be64 table_offset;
  Be32 table_size;
  Be32 flags;
  std::uint8_t type;
  std::uint8_t granularity_bits;
  Be16 name_size;
  Be32 extra_data_size;
};
static_assert(sizeof(BitmapDirectoryEntry) == 24);

std::string hex(std::uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

// Counts a reference to every cluster of a range. False (and a corruption) when it leaves the file.
bool Checker::refer(HostOffset at, std::uint64_t length, const std::string& what) {
  if (length == 0) return true;
  const std::uint64_t end = meta_.host_end();
  if (at.bytes >= end || length > end - at.bytes) {
    corruption(what + " at host offset " + hex(at.bytes) + " lies beyond the end of the file");
    return false;
  }
  const std::uint64_t last = (at.bytes + length - 1) >> layout_.cluster_bits;
  for (std::uint64_t c = at.bytes >> layout_.cluster_bits; c <= last; ++c) counts_.add(c);
  return true;
}

void Checker::count_entry(Slot slot, std::uint64_t raw, std::uint64_t bitmap, Use use) {
  if (raw == 0 && bitmap == 0) return;
  const L2Entry entry = decode_entry(layout_, version_, raw, bitmap, meta_.host_end());
  const bool active = use == Use::active;
  switch (entry.kind) {
    case EntryKind::corrupt:
      corruption("the L2 entry of slot " + std::to_string(slot.value) + " is malformed (" +
                 hex(raw) + ")");
      return;
    case EntryKind::compressed: {
      // The sector count is an upper bound; what lies behind the file is not there.
      const std::uint64_t length =
          std::min<std::uint64_t>(entry.compressed_bytes, meta_.host_end() - entry.host.bytes);
      refer(entry.host, length, "a compressed cluster");
      if (active) ++report_.compressed_clusters;
      break;
    }
    case EntryKind::data:
    case EntryKind::zero_allocated: {
      std::string what = "the cluster of slot ";
      what += std::to_string(slot.value);
      refer(entry.host, layout_.cluster_size(), what);
      if (active && entry.kind == EntryKind::zero_allocated) ++report_.zero_clusters;
      break;
    }
    case EntryKind::zero_plain:
      if (active) ++report_.zero_clusters;
      return;
    case EntryKind::unallocated:
      return;
  }
  if (active) ++report_.allocated_clusters;
}

Task<Error> Checker::count_l2(HostOffset at, std::uint64_t l1_index, Use use) {
  const std::uint64_t step = std::min(layout_.cluster_size(), kReadBytes);
  AlignedBuffer buffer(static_cast<std::size_t>(step));
  const std::size_t words_each = layout_.l2_entry_bytes() / 8;
  std::uint64_t slot = l1_index << layout_.l2_bits();
  for (std::uint64_t done = 0; done < layout_.cluster_size(); done += step) {
    Error error = co_await meta_.read(q_, at + done, buffer.data(), buffer.size());
    if (error) co_return error;
    const auto* words = reinterpret_cast<const Be64*>(buffer.data());
    for (std::size_t i = 0; i < step / 8; i += words_each, ++slot) {
      std::uint64_t raw = words[i];
      if (use == Use::active && options_.entry_override) {
        raw = options_.entry_override({slot}, raw);
      }
      count_entry({slot}, raw, words_each == 2 ? words[i + 1].get() : 0, use);
    }
  }
  co_return Error();
}

Task<Error> Checker::count_l1(HostOffset at, std::uint64_t entries, Use use) {
  const char* what = use == Use::active ? "the L1 table" : "the L1 table of a snapshot";
  if (entries == 0 || !refer(at, entries * 8, what)) co_return Error();
  AlignedBuffer l1(align_up<std::size_t>(static_cast<std::size_t>(entries * 8), meta_.piece()));
  Error error = co_await meta_.read(q_, at, l1.data(), l1.size());
  if (error) co_return error;
  const auto* words = reinterpret_cast<const Be64*>(l1.data());
  for (std::uint64_t i = 0; i < entries; ++i) {
    error = progress();
    if (error) co_return error;
    const std::uint64_t raw = words[i];
    const Tables::L1State state = metadata_.tables().l1_state(raw);
    if (state == Tables::L1State::none) continue;
    if (state == Tables::L1State::corrupt) {
      corruption("entry " + std::to_string(i) + " of " + what + " is malformed (" + hex(raw) + ")");
      continue;
    }
    if (!refer(Tables::l1_host(raw), layout_.cluster_size(), "an L2 table")) continue;
    error = co_await count_l2(Tables::l1_host(raw), i, use);
    if (error) co_return error;
  }
  co_return Error();
}

void Checker::count_override_slots() {
  if (!options_.override_slots || !options_.entry_override) return;
  options_.override_slots([this](Slot slot) {
    // Slots whose table exists were counted with it.
    const std::uint64_t index = layout_.l1_index(slot);
    if (index < metadata_.tables().l1_size() && metadata_.tables().l1_entry(index) != 0) return;
    count_entry(slot, options_.entry_override(slot, 0), 0, Use::active);
  });
}

Task<Error> Checker::count_bitmap_table(HostOffset at, std::uint64_t entries) {
  if (entries > kBitmapTableMax) {
    corruption("a bitmap table of " + std::to_string(entries) + " entries");
    co_return Error();
  }
  if (entries == 0 || !refer(at, entries * 8, "a bitmap table")) co_return Error();
  AlignedBuffer table(align_up<std::size_t>(static_cast<std::size_t>(entries * 8), meta_.piece()));
  Error error = co_await meta_.read(q_, at, table.data(), table.size());
  if (error) co_return error;
  const auto* words = reinterpret_cast<const Be64*>(table.data());
  for (std::uint64_t i = 0; i < entries; ++i) {
    const std::uint64_t offset = words[i] & kOffsetMask;
    if (offset != 0) refer({offset}, layout_.cluster_size(), "a cluster of a bitmap");
  }
  co_return Error();
}

// Only bitmaps that the autoclear bit calls consistent count; others are leaks, as for QEMU.
Task<Error> Checker::count_bitmaps() {
  const Header& header = metadata_.header();
  const Extension* extension = header.find(kExtensionBitmaps);
  if (extension == nullptr || (header.autoclear & bit(kBitmapsBit)) == 0) co_return Error();
  BitmapsExtension fixed;
  std::memcpy(&fixed, extension->data.data(), sizeof fixed);
  const std::uint64_t size = fixed.bitmap_directory_size;
  const HostOffset at{fixed.bitmap_directory_offset};
  if (fixed.nb_bitmaps > kBitmapsMax || size > kBitmapDirectoryMax ||
      !layout_.cluster_aligned(at.bytes)) {
    corruption("the bitmap directory is malformed");
    co_return Error();
  }
  if (size == 0 || !refer(at, size, "the bitmap directory")) co_return Error();
  AlignedBuffer directory(align_up<std::size_t>(static_cast<std::size_t>(size), meta_.piece()));
  Error error = co_await meta_.read(q_, at, directory.data(), directory.size());
  if (error) co_return error;
  std::uint64_t from = 0;
  for (std::uint32_t i = 0; i < fixed.nb_bitmaps; ++i) {
    if (size - from < sizeof(BitmapDirectoryEntry)) {
      corruption("the bitmap directory ends early");
      co_return Error();
    }
    BitmapDirectoryEntry entry;
    std::memcpy(&entry, directory.data() + from, sizeof entry);
    const std::uint64_t length = align_up<std::uint64_t>(
        sizeof entry + std::uint64_t{entry.name_size} + entry.extra_data_size, 8);
    if (length > size - from || !layout_.cluster_aligned(entry.table_offset)) {
      corruption("bitmap directory entry " + std::to_string(i) + " is malformed");
      co_return Error();
    }
    from += length;
    error = co_await count_bitmap_table({entry.table_offset}, entry.table_size);
    if (error) co_return error;
  }
  co_return Error();
}

// Table and blocks; remembered apart, since a rebuild drops them.
void Checker::count_refcount_structure() {
  const Header& header = metadata_.header();
  const std::uint64_t before = report_.corruptions;
  const auto add = [this](HostOffset at, std::uint64_t clusters, const char* what) {
    if (!refer(at, clusters << layout_.cluster_bits, what)) {
      structure_damaged_ = true;
      return;
    }
    structure_.emplace_back(at.bytes >> layout_.cluster_bits, clusters);
  };
  add(header.refcount_table_offset, header.refcount_table_clusters, "the refcount table");
  const Refcounts& refcounts = metadata_.refcounts();
  for (std::uint64_t i = 0; i < refcounts.table_size(); ++i) {
    const std::uint64_t entry = refcounts.table_entry(i);
    if (entry == 0) continue;
    if (!layout_.cluster_aligned(entry)) {
      corruption("refcount table entry " + std::to_string(i) + " is malformed (" + hex(entry) +
                 ")");
      structure_damaged_ = true;
      continue;
    }
    add({entry}, 1, "a refcount block");
    if (counts_.get(entry >> layout_.cluster_bits) > 1) {
      corruption("refcount block " + std::to_string(i) + " at " + hex(entry) +
                 " is used for something else, too");
      structure_damaged_ = true;
    }
  }
  structure_corruptions_ = report_.corruptions - before;
}

Task<Error> Checker::count_references() {
  const Header& header = metadata_.header();
  refer({0}, layout_.cluster_size(), "the header");
  Error error = co_await count_l1(header.l1_offset, header.l1_size, Use::active);
  if (error) co_return error;
  count_override_slots();
  if (!metadata_.snapshots().empty()) {
    refer(header.snapshots_offset, metadata_.snapshot_table_bytes(), "the snapshot table");
  }
  for (const Snapshot& snapshot : metadata_.snapshots()) {
    error = co_await count_l1(snapshot.l1_offset, snapshot.l1_size, Use::snapshot);
    if (error) co_return error;
  }
  error = co_await count_bitmaps();
  if (error) co_return error;
  for (const MetadataMap::Range& region : meta_.map().regions()) {
    refer(region.at, region.length, region.name);
  }
  count_refcount_structure();
  co_return Error();
}

}  // namespace pqblk::format::qcow2
