// L2 entries and refcount fields: the specification's bits, one by one.

#include <doctest/doctest.h>

#include <vector>

#include "format/qcow2/compressed.h"
#include "format/qcow2/entry.h"
#include "format/qcow2/refcounts.h"
#include "format/qcow2/snapshots.h"
#include "io/stage.h"

namespace pqblk::format::qcow2 {
namespace {

constexpr std::uint64_t kEnd = 1 * kGiB;

L2Entry decode(std::uint64_t raw, std::uint64_t bitmap = 0, bool extended = false,
               std::uint32_t version = 3) {
  return decode_entry({16, 4, extended}, version, raw, bitmap, kEnd);
}

}  // namespace

TEST_CASE("qcow2 entry: standard clusters") {
  CHECK(decode(0).kind == EntryKind::unallocated);
  CHECK(decode(1).kind == EntryKind::zero_plain);
  CHECK(decode(0x50000).kind == EntryKind::data);
  CHECK_FALSE(decode(0x50000).copied);
  CHECK(decode(0x50000 | kCopied).copied);
  CHECK(decode(0x50000 | kCopied).host == HostOffset{0x50000});
  CHECK(decode(0x50001 | kCopied).kind == EntryKind::zero_allocated);
  CHECK(decode(1, 0, false, 2).kind == EntryKind::corrupt);        // version 2 has no zero flag
  CHECK(decode(0x50200).kind == EntryKind::corrupt);               // off its cluster
  CHECK(decode(0x50002).kind == EntryKind::corrupt);               // reserved bit 1
  CHECK(decode(0x50000 | 1ULL << 56).kind == EntryKind::corrupt);  // reserved bit 56
  CHECK(decode(kEnd).kind == EntryKind::corrupt);                  // beyond the file
  CHECK(decode(kEnd - 0x10000).kind == EntryKind::data);
  CHECK(decode(kCopied).kind == EntryKind::corrupt);  // host cluster 0
}

TEST_CASE("qcow2 entry: compressed clusters") {
  // 64 KiB clusters: x = 62 - 8 = 54.
  const std::uint64_t raw = kCompressed | 3ULL << 54 | 0x51234;
  const L2Entry entry = decode(raw);
  CHECK(entry.kind == EntryKind::compressed);
  CHECK(entry.host == HostOffset{0x51234});
  CHECK(entry.compressed_bytes == 4 * 512 - (0x51234 & 511));
  CHECK(decode(raw | kCopied).kind == EntryKind::corrupt);
  CHECK(decode(kCompressed | kEnd).kind == EntryKind::corrupt);
  CHECK(decode(raw, 1, true).kind == EntryKind::corrupt);  // no subclusters
}

TEST_CASE("qcow2 entry: extended entries") {
  CHECK(decode(0, 0, true).kind == EntryKind::unallocated);
  const L2Entry zeros = decode(0, subcluster_bitmap(0, 0xf0), true);
  CHECK(zeros.kind == EntryKind::unallocated);
  CHECK(zeros.zero == 0xf0);
  const L2Entry data = decode(0x50000 | kCopied, subcluster_bitmap(0xf, 0xf0), true);
  CHECK(data.kind == EntryKind::data);
  CHECK(data.allocated == 0xf);
  CHECK(decode(0x50001, 0, true).kind == EntryKind::corrupt);  // no zero flag here
  CHECK(decode(0x50000, subcluster_bitmap(1, 1), true).kind == EntryKind::corrupt);
  CHECK(decode(0, subcluster_bitmap(1, 0), true).kind == EntryKind::corrupt);
}

TEST_CASE("qcow2 refcounts: every width against a model of bits") {
  for (std::uint32_t order = 0; order <= kRefcountOrderMax; ++order) {
    CAPTURE(order);
    const std::uint32_t width = 1u << order;
    const std::uint64_t entries = 512 * 8 / width;
    std::vector<std::uint8_t> block(512);
    std::vector<std::uint64_t> model(entries);
    io::test::Random random(order);
    for (int i = 0; i < 5000; ++i) {
      const std::uint64_t index = random.below(entries);
      const std::uint64_t value = order == 6 ? random.next() : random.below(1ULL << width);
      set_refcount(block.data(), order, index, value);
      model[index] = value;
    }
    for (std::uint64_t i = 0; i < entries; ++i) {
      REQUIRE(get_refcount(block.data(), order, i) == model[i]);
      // The specification, bit by bit: big-endian words, sub-byte entries from the lowest bit.
      std::uint64_t value = 0;
      if (width < 8) {
        value = (block[i * width / 8] >> (i * width % 8)) & ((1u << width) - 1);
      } else {
        for (std::uint32_t n = 0; n < width / 8; ++n) value = value << 8 | block[i * width / 8 + n];
      }
      REQUIRE(value == model[i]);
    }
  }
}

TEST_CASE("qcow2 compressed: garbage and short data are refused") {
  std::vector<std::uint8_t> cluster(65536);
  for (const Compression type : {Compression::zlib, Compression::zstd}) {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
      const auto noise = io::test::pattern(seed, 1 + seed * 7);
      CHECK(decompress(type, noise, cluster).kind() == Kind::corrupt);
    }
    CHECK(decompress(type, {}, cluster).kind() == Kind::corrupt);
  }
}

TEST_CASE("qcow2 snapshots: a damaged table is refused") {
  Header header;
  header.snapshot_count = 1;
  std::vector<std::uint8_t> table(128);
  SnapshotRecord record{};
  record.l1_table_offset = 65536;
  record.l1_size = 2;
  record.id_size = 1;
  record.name_size = 4;
  record.extra_data_size = 16;
  std::uint64_t used = 0;
  const auto parse = [&] {
    std::memcpy(table.data(), &record, sizeof record);
    std::memcpy(table.data() + 56, "1name", 5);
    Result<std::vector<Snapshot>> parsed = parse_snapshots(table, header, 1 * kMiB, used);
    return parsed ? Kind::ok : parsed.error().kind();
  };
  CHECK(parse() == Kind::ok);
  CHECK(used == 64);
  record.l1_table_offset = 65537;
  CHECK(parse() == Kind::corrupt);
  record.l1_table_offset = 2 * kMiB;
  CHECK(parse() == Kind::corrupt);
  record.l1_table_offset = 65536;
  record.l1_size = 0xffffffff;
  CHECK(parse() == Kind::corrupt);
  record.l1_size = 2;
  record.name_size = 200;
  CHECK(parse() == Kind::corrupt);
  record.name_size = 4;
  record.extra_data_size = 8;  // version 3 needs 16
  CHECK(parse() == Kind::corrupt);
  header.snapshot_count = 9;
  record.extra_data_size = 16;
  CHECK(parse() == Kind::corrupt);
}

}  // namespace pqblk::format::qcow2
