// The header parser against damaged headers, and header -> bytes -> header.

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "format/qcow2/header_pages.h"

namespace pqblk::format::qcow2 {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::uint64_t kFileSize = 1 * kMiB;

Header sample() {
  Header header;
  header.size = 100 * kMiB;
  header.l1_size = 1;
  header.l1_offset = {3 * 65536};
  header.refcount_table_offset = {65536};
  header.refcount_table_clusters = 1;
  header.backing_name = "base.img";
  header.set_backing_format("raw");
  header.set_extension(0x12345678, {1, 2, 3});
  header.set_feature_names();
  return header;
}

Bytes bytes_of(const Header& header) {
  Result<Bytes> bytes = header.serialise();
  REQUIRE(bytes);
  return *bytes;
}

template <class T>
void put(Bytes& bytes, std::size_t at, T value) {
  const Field<T, std::endian::big> field(value);
  std::memcpy(bytes.data() + at, &field, sizeof field);
}

Error parse(const Bytes& bytes, bool allow_sealed = false, std::uint64_t size = kFileSize) {
  Result<Header> header = parse_header(bytes, size, allow_sealed);
  return header ? Error() : header.take_error();
}

struct Damage {
  const char* what;
  std::function<void(Bytes&)> apply;
  Kind kind;
  const char* message;  // part of it
};

}  // namespace

TEST_CASE("qcow2 header: what is written is what is parsed") {
  const Header in = sample();
  Result<Header> out = parse_header(bytes_of(in), kFileSize, false);
  REQUIRE(out);
  CHECK(out->version == 3);
  CHECK(out->size == in.size);
  CHECK(out->layout.cluster_bits == 16);
  CHECK(out->layout.refcount_order == 4);
  CHECK(out->l1_offset == in.l1_offset);
  CHECK(out->backing_name == "base.img");
  CHECK(out->backing_format() == "raw");
  REQUIRE(out->find(0x12345678) != nullptr);
  CHECK(out->find(0x12345678)->data == Bytes{1, 2, 3});
  CHECK(bytes_of(*out) == bytes_of(in));
}

TEST_CASE("qcow2 header: version 2 has no feature words") {
  Header in = sample();
  in.version = 2;
  Result<Header> out = parse_header(bytes_of(in), kFileSize, false);
  REQUIRE(out);
  CHECK(out->version == 2);
  CHECK(out->incompatible == 0);
  CHECK(out->layout.refcount_order == 4);
  CHECK(out->backing_name == "base.img");
}

TEST_CASE("qcow2 header: each damaged field is refused, by name") {
  const Damage damages[] = {
      {"magic", [](Bytes& b) { b[0] = 'X'; }, Kind::invalid_argument, "not a qcow2"},
      {"version 4", [](Bytes& b) { put<std::uint32_t>(b, 4, 4); }, Kind::unsupported, "version 4"},
      {"cluster bits 8", [](Bytes& b) { put<std::uint32_t>(b, 20, 8); }, Kind::corrupt,
       "cluster bits 8"},
      {"cluster bits 22", [](Bytes& b) { put<std::uint32_t>(b, 20, 22); }, Kind::corrupt,
       "cluster bits 22"},
      {"AES", [](Bytes& b) { put<std::uint32_t>(b, 32, 1); }, Kind::unsupported, "AES"},
      {"LUKS", [](Bytes& b) { put<std::uint32_t>(b, 32, 2); }, Kind::unsupported, "LUKS"},
      {"backing name too long", [](Bytes& b) { put<std::uint32_t>(b, 16, 1024); }, Kind::corrupt,
       "backing file name of 1024"},
      {"backing name outside", [](Bytes& b) { put<std::uint64_t>(b, 8, 65536); }, Kind::corrupt,
       "outside the header"},
      {"backing name in the header", [](Bytes& b) { put<std::uint64_t>(b, 8, 8); }, Kind::corrupt,
       "outside the header"},
      {"1 EiB in a tiny L1", [](Bytes& b) { put<std::uint64_t>(b, 24, std::uint64_t{1} << 60); },
       Kind::corrupt, "cannot map"},
      {"size over 63 bits", [](Bytes& b) { put<std::uint64_t>(b, 24, ~std::uint64_t{0}); },
       Kind::corrupt, "absurd"},
      {"L1 over 32 MiB", [](Bytes& b) { put<std::uint32_t>(b, 36, 4 * 1024 * 1024 + 1); },
       Kind::corrupt, "at most 32 MiB"},
      {"L1 beyond the file", [](Bytes& b) { put<std::uint64_t>(b, 40, 64 * kMiB); }, Kind::corrupt,
       "beyond the end"},
      {"L1 off its cluster", [](Bytes& b) { put<std::uint64_t>(b, 40, 3 * 65536 + 512); },
       Kind::corrupt, "not on a cluster"},
      {"L1 in the header", [](Bytes& b) { put<std::uint64_t>(b, 40, 0); }, Kind::corrupt,
       "overlaps the header"},
      {"refcount table off its cluster", [](Bytes& b) { put<std::uint64_t>(b, 48, 65537); },
       Kind::corrupt, "not on a cluster"},
      {"no refcount table", [](Bytes& b) { put<std::uint32_t>(b, 56, 0); }, Kind::corrupt,
       "refcount table of 0"},
      {"refcount table over 8 MiB", [](Bytes& b) { put<std::uint32_t>(b, 56, 129); }, Kind::corrupt,
       "at most 8 MiB"},
      {"too many snapshots", [](Bytes& b) { put<std::uint32_t>(b, 60, 65537); }, Kind::corrupt,
       "65537 snapshots"},
      {"snapshot table beyond the file",
       [](Bytes& b) {
         put<std::uint32_t>(b, 60, 3);
         put<std::uint64_t>(b, 64, kFileSize);
       },
       Kind::corrupt, "snapshot table"},
      {"external data file", [](Bytes& b) { put<std::uint64_t>(b, 72, 1u << 2); },
       Kind::unsupported, "external data file"},
      {"unknown feature", [](Bytes& b) { put<std::uint64_t>(b, 72, std::uint64_t{1} << 40); },
       Kind::unsupported, "incompatible bit 40"},
      {"sealed", [](Bytes& b) { put<std::uint64_t>(b, 72, std::uint64_t{1} << 56); },
       Kind::unsupported, "sealed disk (pqblk): keys needed"},
      {"compression bit without type", [](Bytes& b) { put<std::uint64_t>(b, 72, 1u << 3); },
       Kind::corrupt, "compression type 0"},
      {"compression type without bit", [](Bytes& b) { b[104] = 1; }, Kind::corrupt,
       "compression type 1"},
      {"unknown compression",
       [](Bytes& b) {
         put<std::uint64_t>(b, 72, 1u << 3);
         b[104] = 9;
       },
       Kind::unsupported, "compression type 9"},
      {"refcount order 7", [](Bytes& b) { put<std::uint32_t>(b, 96, 7); }, Kind::corrupt,
       "refcount order 7"},
      {"header length 100", [](Bytes& b) { put<std::uint32_t>(b, 100, 100); }, Kind::corrupt,
       "header length 100"},
      {"header length odd", [](Bytes& b) { put<std::uint32_t>(b, 100, 109); }, Kind::corrupt,
       "header length 109"},
      {"header length beyond", [](Bytes& b) { put<std::uint32_t>(b, 100, 1 << 20); }, Kind::corrupt,
       "header length"},
      {"extension too long", [](Bytes& b) { put<std::uint32_t>(b, 116, 0x7fffffff); },
       Kind::corrupt, "leaves the extension area"},
      {"bitmaps bit without extension", [](Bytes& b) { put<std::uint64_t>(b, 88, 1); },
       Kind::corrupt, "bitmaps bit"},
  };
  const Bytes good = bytes_of(sample());
  CHECK(parse(good).ok());
  for (const Damage& damage : damages) {
    CAPTURE(damage.what);
    Bytes bad = good;
    damage.apply(bad);
    const Error error = parse(bad);
    CHECK(error.kind() == damage.kind);
    CHECK_MESSAGE(error.message().find(damage.message) != std::string::npos, error.message());
  }
}

TEST_CASE("qcow2 header: extended L2 wants clusters of 16 KiB") {
  Header header = sample();
  header.incompatible = bit(kExtendedL2Bit);
  CHECK(parse(bytes_of(header)).ok());
  Bytes bytes = bytes_of(header);
  put<std::uint32_t>(bytes, 20, 13);
  CHECK(parse(bytes).kind() == Kind::corrupt);
}

TEST_CASE("qcow2 header: an unknown bit is named by the image's own table") {
  Header header = sample();
  header.incompatible = std::uint64_t{1} << 40;
  Bytes table(48);
  table[1] = 40;
  std::memcpy(table.data() + 2, "time travel", 11);
  header.set_extension(kExtensionFeatureNames, table);
  CHECK(parse(bytes_of(header)).message().find("time travel") != std::string::npos);
  table[5] = '\n';  // no control characters in messages
  header.set_extension(kExtensionFeatureNames, table);
  CHECK(parse(bytes_of(header)).message().find('\n') == std::string::npos);
}

TEST_CASE("qcow2 header: the sealed extension comes first and within 512 bytes") {
  Header header = sample();
  header.incompatible = bit(kSealedBit);
  CHECK(parse(bytes_of(header), true).kind() == Kind::corrupt);  // no extension
  header.set_extension(kExtensionSealed, Bytes(300, 7));
  header.set_feature_names();
  const Bytes bytes = bytes_of(header);
  CHECK(parse(bytes, true).ok());
  CHECK(parse(bytes, false).kind() == Kind::unsupported);
  CHECK(bytes[112 + 8] == 7);  // directly behind the header
  header.set_extension(kExtensionSealed, Bytes(393, 7));
  CHECK_FALSE(header.serialise());
}

TEST_CASE("qcow2 header: every truncation and every flipped byte is survived") {
  const Bytes good = bytes_of(sample());
  for (std::size_t n = 0; n < 600; ++n) {
    const Bytes cut(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(n));
    static_cast<void>(parse(cut, false, n).ok());
  }
  for (std::size_t i = 0; i < 600; ++i) {
    for (const unsigned flip : {0x01u, 0x80u, 0xffu}) {
      Bytes bad = good;
      bad[i] = static_cast<std::uint8_t>(bad[i] ^ flip);
      static_cast<void>(parse(bad).ok());
      static_cast<void>(parse(bad, true).ok());
    }
  }
}

TEST_CASE("qcow2 header: patching changes fields in place and nothing else") {
  Header header = sample();
  Bytes bytes = bytes_of(header);
  header.l1_offset = {5 * 65536};
  header.size = 101 * kMiB;
  Bytes patched = bytes;
  header.patch(patched);
  CHECK(patched == bytes_of(header));
  CHECK(patched != bytes);
}

// One of a size of its own ends in the second page, where the end marker and the name are.
TEST_CASE("qcow2 header: a page that cannot be read is an error where the header needs it") {
  Header in = sample();
  const Bytes small = bytes_of(in);
  in.set_extension(0x23456789, Bytes(4000, 7));
  const Bytes large = bytes_of(in);
  const auto kind_without = [](Bytes bytes, std::uint64_t at) {
    HeaderPages pages{AlignedBuffer(bytes.size()), {at}, Error(Kind::io_error, "there")};
    std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), HeaderPages::kPage, 0);
    std::copy(bytes.begin(), bytes.end(), pages.bytes.data());
    Result<Header> header = parse_header_pages(pages, kFileSize, false);
    return header ? Kind::ok : header.error().kind();
  };
  CHECK(kind_without(small, 4096) == Kind::ok);
  CHECK(kind_without(large, 4096) == Kind::io_error);
  CHECK(kind_without(large, 8192) == Kind::ok);

  in = sample();
  in.backing_offset = 60'000;  // the name, behind a gap
  CHECK(kind_without(bytes_of(in), 57'344) == Kind::io_error);
}

}  // namespace pqblk::format::qcow2
