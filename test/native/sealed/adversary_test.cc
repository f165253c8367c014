// Someone with write access to the file, against a disk that was closed cleanly: each kind of
// change has exactly the outcome that docs/threat-model.md allows, and never wrong plaintext.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>

#include "base/aligned.h"
#include "image/qcow2_backend.h"
#include "sealed/key_area.h"
#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

// Three entry clusters, one table: data at 0..99 (0..9 rewritten), zeros at 100..109, the rest
// never.
const SealedShape kShape{.sectors = 300,
                         .cluster_bits = 12,
                         .overlay_sectors_max = 1 << 20,
                         .session_sectors_max = 1 << 20};
constexpr std::uint64_t kData = 100, kOlder = 10, kZeroes = 10, kFar = 280;

struct Exhibit {
  sim::Device image;   // closed cleanly
  sim::Device older;   // closed cleanly, before kOlder sectors were rewritten
  sim::Device branch;  // a copy of `older` that was written on by another life
  std::vector<std::string> truth;
  Places at;
};

void must(const Error& e) { REQUIRE_MESSAGE(!e, e.to_string()); }

sim::Device closed(Lab& lab) {
  must(lab.close());
  return killed(lab.image());
}

const Exhibit& exhibit() {
  static const Exhibit instance = [] {
    Exhibit x;
    Lab first(kShape);
    must(first.create());
    must(first.open());
    must(first.write(0, 1, kData));
    must(first.write(kFar, 1, 10));
    must(first.write(kData, 1, kZeroes));
    must(first.zero(kData, kZeroes));
    x.older = closed(first);
    Lab second(kShape, x.older);
    must(second.open());
    must(second.write(0, 2, kOlder));
    x.image = closed(second);
    Lab other(kShape, x.older);
    must(other.open());
    must(other.write(0, 3, kOlder));
    x.branch = closed(other);
    Lab reader(kShape, x.image);
    must(reader.open(true));
    x.truth = reader.look_at_all();
    x.at = places_of(x.image.cache());
    return x;
  }();
  return instance;
}

void flip(sim::Device& image, std::uint64_t at, std::uint64_t bit = 0) {
  std::uint8_t byte = 0;
  image.cache().read(at, &byte, 1);
  byte = static_cast<std::uint8_t>(byte ^ (1u << bit));
  image.overwrite(at, &byte, 1);
}

void copy(sim::Device& to, std::uint64_t at, const sim::Device& from, std::uint64_t source,
          std::uint64_t length) {
  std::vector<std::uint8_t> bytes(length);
  from.cache().read(source, bytes.data(), length);
  to.overwrite(at, bytes.data(), length);
}

void swap(sim::Device& image, std::uint64_t a, std::uint64_t b, std::uint64_t length) {
  const sim::Device before = image;
  copy(image, a, before, b, length);
  copy(image, b, before, a, length);
}

// Opens a changed image, read-only and then for writing; `allowed` says whether a sector may look
// like that. The kind of the error when it does not open.
std::string examine(const sim::Device& image,
                    const std::function<bool(std::uint64_t, const std::string&)>& allowed) {
  std::string opened;
  for (const bool read_only : {true, false}) {
    Lab lab(kShape, image);
    Error e = lab.open(read_only);
    opened = e ? std::string(kind_name(e.kind())) : "ok";
    if (e) continue;
    const auto seen = lab.look_at_all();
    for (std::uint64_t s = 0; s < seen.size(); ++s) {
      CHECK_MESSAGE(allowed(s, seen[s]),
                    "sector " << s << " is " << seen[s] << ", was " << exhibit().truth[s]);
    }
  }
  return opened;
}

bool unchanged(std::uint64_t s, const std::string& seen) { return seen == exhibit().truth[s]; }
bool unchanged_or_error(std::uint64_t s, const std::string& seen) {
  return unchanged(s, seen) || seen == "integrity" || seen == "corrupt";
}
bool unchanged_or_unmapped(std::uint64_t s, const std::string& seen) {
  return unchanged_or_error(s, seen) || seen == "zeros";
}
// Those of `bad` fail their tag; no other one is touched.
auto only(std::vector<std::uint64_t> bad) {
  return [bad = std::move(bad)](std::uint64_t s, const std::string& seen) {
    const bool expected = std::find(bad.begin(), bad.end(), s) != bad.end();
    return expected ? seen == "integrity" : unchanged(s, seen);
  };
}

// Host offsets of a sector's ciphertext (clusters have one sector here) and of its entry.
std::uint64_t cipher_at(const sim::Device& image, std::uint64_t sector) {
  const sealed::SealedGeometry g{kShape.cluster_bits, kShape.sectors * kSectorSize};
  const Places p = places_of(image.cache());
  return sealed::l2_host(load64(image.cache(), p.slot(g.data_slot({sector}).value)));
}
std::uint64_t entry_at(const sim::Device& image, std::uint64_t sector) {
  const sealed::SealedGeometry g{kShape.cluster_bits, kShape.sectors * kSectorSize};
  const Places p = places_of(image.cache());
  return sealed::l2_host(load64(image.cache(), p.slot(g.entry_slot({sector}).value))) +
         g.entry_offset({sector});
}
std::uint64_t data_slot_at(std::uint64_t sector) { return exhibit().at.slot(sector); }
std::uint64_t entry_slot_at(std::uint64_t sector) {
  const sealed::SealedGeometry g{kShape.cluster_bits, kShape.sectors * kSectorSize};
  return exhibit().at.slot(g.entry_slot({sector}).value);
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("the exhibit is what it should be") {
  const Exhibit& x = exhibit();
  for (std::uint64_t s = 0; s < kShape.sectors; ++s) {
    const char* want = s < kOlder                                  ? "v2"
                       : s < kData || (s >= kFar && s < kFar + 10) ? "v1"
                                                                   : "zeros";
    CHECK(x.truth[s] == want);
  }
}

TEST_CASE("a changed header is refused, whatever the byte") {
  for (std::uint64_t at = 0; at < sealed::kHeaderMacBytes; ++at) {
    for (const std::uint32_t bit : {0u, 1u, 7u}) {
      sim::Device image = exhibit().image;
      flip(image, at, bit);
      const bool dirty = at == 79 && bit == 0;
      const bool corrupt = at == 79 && bit == 1;
      if (dirty || corrupt) {  // not under the MAC
        Lab lab(kShape, image);
        CHECK(!lab.open(true));
        CHECK(lab.look_at_all() == exhibit().truth);
        Lab writer(kShape, image);
        CHECK(writer.open().ok() == dirty);
        continue;
      }
      for (const bool read_only : {true, false}) {
        Lab lab(kShape, image);
        const Error e = lab.open(read_only);
        const bool refused = e.kind() == Kind::integrity || e.kind() == Kind::unsupported ||
                             e.kind() == Kind::corrupt || e.kind() == Kind::wrong_key ||
                             (at < 4 && e.kind() == Kind::invalid_argument);  // no qcow2 at all
        CHECK_MESSAGE(refused, "byte " << at << " bit " << bit << ": " << e.to_string());
      }
    }
  }
}

TEST_CASE("the feature bit or the extension cannot be stripped") {
  sim::Device image = exhibit().image;
  flip(image, 72, 0);  // bit 56 of incompatible_features
  Lab lab(kShape, image);
  CHECK(lab.open().kind() == Kind::unsupported);
  image = exhibit().image;
  const std::uint8_t zeros[8] = {};
  image.overwrite(112, zeros, 8);  // the end of the extensions
  Lab other(kShape, image);
  CHECK(other.open().kind() == Kind::corrupt);
}

TEST_CASE("keys open their own volume only") {
  Lab lab(kShape, exhibit().image);
  auto options = open_options(kShape);
  options.expected_uuid[0] ^= 1;
  CHECK(lab.open(std::move(options)).kind() == Kind::wrong_key);
  Lab other(kShape, exhibit().image);
  options = open_options(kShape);
  std::swap(options.keys.integrity, options.keys.data[0].key);
  CHECK(other.open(std::move(options)).kind() == Kind::integrity);
}

TEST_CASE("one damaged copy of the key area is reported, two are an error") {
  const Places& at = exhibit().at;
  const auto read = [](const sim::Device& image) {
    Lab lab(kShape, image);
    auto area = lab.run(sealed::read_key_area(lab.queue().io, lab.file(), exhibit().at.extension),
                        Result<sealed::KeyArea>(Error(Kind::canceled, "hang")));
    REQUIRE(area);
    return std::move(*area);
  };
  for (const std::uint64_t offset : {0, 9, 17, 21, 40, 4096, 30000, 69631}) {
    for (std::size_t copy = 0; copy < 2; ++copy) {
      sim::Device image = exhibit().image;
      flip(image, at.extension.key_area[copy] + offset, 3);
      const sealed::KeyArea area = read(image);
      CHECK(area[copy].blob.empty());
      CHECK(area[1 - copy].blob == create_options(kShape).key_area);
      CHECK(examine(image, unchanged) == "ok");
      flip(image, at.extension.key_area[1 - copy] + offset, 3);
      const sealed::KeyArea none = read(image);
      CHECK(none[0].blob.empty());
      CHECK(none[1].blob.empty());
    }
  }
}

TEST_CASE("the session table survives the loss of one copy, and heals") {
  const auto& table = exhibit().at.extension.session_table;
  for (const std::uint64_t offset : {0, 13, 100, 130, 150, 230, 260}) {
    for (int copy = 0; copy < 2; ++copy) {
      sim::Device image = exhibit().image;
      flip(image, table[copy] + offset);
      CHECK(examine(image, unchanged) == "ok");
      Lab lab(kShape, image);  // the next session repairs it
      must(lab.open());
      must(lab.write(50, 9));
      sim::Device healed = closed(lab);
      for (std::uint64_t i = 0; i < exhibit().at.extension.session_table_length; i += 512) {
        std::uint8_t a[512], b[512];
        healed.cache().read(table[0] + i, a, 512);
        healed.cache().read(table[1] + i, b, 512);
        CHECK(std::equal(a, a + 512, b));
      }
    }
  }
  sim::Device heads = exhibit().image;
  flip(heads, table[0] + 40);
  flip(heads, table[1] + 97);
  CHECK(examine(heads, unchanged) == "integrity");
  // An entry in both copies: what was sealed in that session is lost. The log names the second.
  for (const std::uint64_t session : {1u, 2u}) {
    sim::Device entry = exhibit().image;
    flip(entry, table[0] + session * 128 + 20);
    flip(entry, table[1] + session * 128 + 20);
    const std::string opened = examine(entry, [](std::uint64_t s, const std::string& seen) {
      return s >= kOlder && exhibit().truth[s] == "v1" ? seen == "integrity" : unchanged(s, seen);
    });
    CHECK(opened == (session == 1 ? "ok" : "wrong_key"));
  }
}

TEST_CASE("one damaged copy of the log header does no harm, two are an error") {
  const std::uint64_t log = exhibit().at.extension.log_offset;
  for (const std::uint64_t offset : {0, 8, 17, 40, 50, 70, 100, 130}) {
    sim::Device image = exhibit().image;
    flip(image, log + offset);
    CHECK(examine(image, unchanged) == "ok");
    flip(image, log + sealed::kPage + offset);
    CHECK(examine(image, unchanged) == "integrity");
  }
}

TEST_CASE("changed log blocks of a closed disk mean nothing") {
  const auto& x = exhibit().at.extension;
  for (std::uint64_t at = sealed::kLogHeadBytes; at < x.log_length; at += 1777) {
    sim::Device image = exhibit().image;
    flip(image, x.log_offset + at, at % 8);
    CHECK(examine(image, unchanged) == "ok");
  }
}

TEST_CASE("a changed entry fails its sector and no other") {
  for (const std::uint64_t sector : {0ul, 57ul, kFar}) {
    for (std::uint64_t byte = 0; byte < sizeof(sealed::Entry); ++byte) {
      sim::Device image = exhibit().image;
      flip(image, entry_at(image, sector) + byte, byte % 8);
      CHECK(examine(image, only({sector})) == "ok");
    }
    for (const std::uint32_t bit : {6u, 7u}) {  // the state
      sim::Device image = exhibit().image;
      flip(image, entry_at(image, sector) + 28, bit);
      CHECK(examine(image, only({sector})) == "ok");
    }
  }
  // A zero or never entry is canonical, or an error.
  for (const std::uint64_t sector : {kData, kData + kZeroes + 5}) {
    for (std::uint64_t byte = 0; byte < sizeof(sealed::Entry); ++byte) {
      sim::Device image = exhibit().image;
      flip(image, entry_at(image, sector) + byte, byte % 6);
      CHECK(examine(image, only({sector})) == "ok");
    }
  }
}

TEST_CASE("a changed ciphertext fails its sector and no other") {
  for (std::uint64_t byte = 0; byte < kSectorSize; byte += 97) {
    sim::Device image = exhibit().image;
    const std::uint64_t sector = byte % kData;
    flip(image, cipher_at(image, sector) + byte, byte % 8);
    CHECK(examine(image, only({sector})) == "ok");
  }
}

TEST_CASE("a large read hands out all or nothing, wherever its memory lies") {
  constexpr std::uint64_t kCount = 8;
  // One piece, sectors apart, pieces that no sector fits, and a page that the guest names twice.
  struct Shape {
    const char* name;
    std::vector<std::pair<std::size_t, std::size_t>> pieces;  // place in memory, length
  };
  const std::vector<Shape> shapes = {
      {"whole", {{0, 8 * kSectorSize}}},
      {"sectors",
       {{0, 3 * kSectorSize}, {4 * kSectorSize, kSectorSize}, {5 * kSectorSize, 4 * kSectorSize}}},
      {"odd", {{0, 5000}, {8192, 8 * kSectorSize - 5000}}},
      {"unaligned", {{1, 8 * kSectorSize}}},
      {"twice", {{0, 2 * kSectorSize}, {0, 2 * kSectorSize}, {2 * kSectorSize, 4 * kSectorSize}}},
  };
  const std::uint64_t first = kOlder;
  for (const bool tampered : {false, true}) {
    sim::Device image = exhibit().image;
    if (tampered) flip(image, cipher_at(image, first + 5) + 7);
    Lab lab(kShape, image);
    must(lab.open(true));
    std::vector<std::uint8_t> truth(kCount * kSectorSize);
    for (std::uint64_t i = 0; i < kCount; ++i) {
      if (tampered && i == 5) continue;
      const iovec one{truth.data() + i * kSectorSize, kSectorSize};
      const image::GuestBuffers data{{&one, 1}, 0, kSectorSize};
      must(lab.run(lab.backend().read(lab.queue(), {(first + i) << kSectorShift}, data),
                   Error(Kind::canceled, "hang")));
    }
    for (const Shape& shape : shapes) {
      CAPTURE(shape.name);
      AlignedBuffer memory(16 * kSectorSize);
      std::memset(memory.data(), 0xEE, memory.size());
      std::vector<iovec> iov;
      for (const auto& [at, length] : shape.pieces) iov.push_back({memory.data() + at, length});
      const image::GuestBuffers data{iov, 0, kCount * kSectorSize};
      const Error e = lab.run(lab.backend().read(lab.queue(), {first << kSectorShift}, data),
                              Error(Kind::canceled, "hang"));
      CHECK(e.kind() == (tampered ? Kind::integrity : Kind::ok));
      // A page that is named twice holds what came last.
      std::vector<std::uint8_t> expected(memory.size(), 0xEE);
      std::size_t done = 0;
      for (const auto& [at, length] : shape.pieces) {
        const auto from = truth.begin() + static_cast<std::ptrdiff_t>(done);
        const auto to = expected.begin() + static_cast<std::ptrdiff_t>(at);
        if (tampered)
          std::fill_n(to, length, std::uint8_t{0});
        else
          std::copy_n(from, length, to);
        done += length;
      }
      CHECK(std::equal(expected.begin(), expected.end(), memory.data()));
    }
    must(lab.close());
  }
}

TEST_CASE("changed tables give errors or unmapped sectors") {
  const Places& at = exhibit().at;
  for (std::uint32_t bit = 0; bit < 64; ++bit) {
    const std::uint64_t byte = 7 - bit / 8;
    CAPTURE(bit);
    sim::Device l1 = exhibit().image, data = l1, entry = l1;
    flip(l1, at.l1 + byte, bit % 8);
    examine(l1, unchanged_or_unmapped);
    flip(data, data_slot_at(20) + byte, bit % 8);
    examine(data, [](std::uint64_t s, const std::string& seen) {
      return s == 20 ? unchanged_or_error(s, seen) : unchanged(s, seen);
    });
    flip(entry, entry_slot_at(20) + byte, bit % 8);
    examine(entry, [](std::uint64_t s, const std::string& seen) {
      return s < 128 ? unchanged_or_unmapped(s, seen) : unchanged(s, seen);
    });
    sim::Device refcount = exhibit().image;
    flip(refcount, at.refcount_table + byte, bit % 8);
    examine(refcount, unchanged_or_error);  // it may now name a data cluster, which is noticed
  }
  const std::uint64_t block = load64(exhibit().image.cache(), at.refcount_table);
  for (std::uint64_t byte = 0; byte < 4096; byte += 61) {
    sim::Device image = exhibit().image;
    flip(image, block + byte, byte % 8);
    examine(image, unchanged);
  }
}

// A count of zero makes the allocator give a live cluster away: the sectors there fail, later.
TEST_CASE("lowered refcounts destroy, but give no wrong plaintext") {
  sim::Device image = exhibit().image;
  const std::uint64_t block = load64(image.cache(), exhibit().at.refcount_table);
  const std::uint8_t zeros[2048] = {};
  image.overwrite(block, zeros, sizeof zeros);
  Lab lab(kShape, image);
  if (lab.open()) return;
  for (std::uint64_t s = 120; s < 270; ++s) {
    if (lab.write(s, 5)) break;  // refused: the allocator has noticed
  }
  for (std::uint64_t s = 0; s < kShape.sectors; ++s) {
    const std::string seen = lab.look(s);
    const bool mine = s >= 120 && s < 270 && seen == "v5";
    CHECK_MESSAGE((mine || unchanged_or_error(s, seen)), "sector " << s << " is " << seen);
  }
}

TEST_CASE("swapped sectors, entries and clusters fail") {
  const sim::Device& whole = exhibit().image;
  sim::Device image = whole;
  swap(image, cipher_at(whole, 3), cipher_at(whole, 40), kSectorSize);
  CHECK(examine(image, only({3, 40})) == "ok");
  swap(image, entry_at(whole, 3), entry_at(whole, 40),
       sizeof(sealed::Entry));  // with their entries
  CHECK(examine(image, only({3, 40})) == "ok");
  image = whole;
  swap(image, entry_at(whole, 3), entry_at(whole, 40), sizeof(sealed::Entry));
  CHECK(examine(image, only({3, 40})) == "ok");
  image = whole;
  swap(image, data_slot_at(3), data_slot_at(40), 8);
  CHECK(examine(image, only({3, 40})) == "ok");
  image = whole;
  copy(image, data_slot_at(3), whole, data_slot_at(40), 8);  // two sectors in one place
  CHECK(examine(image, only({3})) == "ok");
  image = whole;  // the tables of entries: never and zero sectors may change places, data may not
  swap(image, entry_slot_at(0), entry_slot_at(kFar), 8);
  CHECK(examine(image, [](std::uint64_t s, const std::string& seen) {
          return unchanged(s, seen) || seen == "integrity" || seen == "zeros";
        }) == "ok");
  image = whole;
  const std::uint8_t nothing[8] = {};
  image.overwrite(data_slot_at(3), nothing, 8);  // its entry still says that there is data
  CHECK(examine(image, only({3})) == "ok");
}

// Limit 4 of the design: without the freshness tier an older pair is authentic.
TEST_CASE("an older sector with its entry reads as that older version") {
  const Exhibit& x = exhibit();
  sim::Device image = x.image;
  copy(image, cipher_at(image, 4), x.older, cipher_at(x.older, 4), kSectorSize);
  CHECK(examine(image, only({4})) == "ok");  // the ciphertext alone is not enough
  copy(image, entry_at(image, 4), x.older, entry_at(x.older, 4), sizeof(sealed::Entry));
  CHECK(examine(image, [](std::uint64_t s, const std::string& seen) {
          return s == 4 ? seen == "v1" : unchanged(s, seen);
        }) == "ok");
  const std::uint8_t never[sizeof(sealed::Entry)] = {};
  image = x.image;
  image.overwrite(entry_at(image, 4), never, sizeof never);
  CHECK(examine(image, [](std::uint64_t s, const std::string& seen) {
          return s == 4 ? seen == "zeros" : unchanged(s, seen);
        }) == "ok");
}

// Both lives drew a session of the same number; their salts differ, and so do their keys.
TEST_CASE("a sector of another copy of the image does not open") {
  const Exhibit& x = exhibit();
  sim::Device image = x.image;
  copy(image, cipher_at(image, 4), x.branch, cipher_at(x.branch, 4), kSectorSize);
  copy(image, entry_at(image, 4), x.branch, entry_at(x.branch, 4), sizeof(sealed::Entry));
  CHECK(examine(image, only({4})) == "ok");
  // With the other copy's session table, its own sectors no longer do.
  for (int i = 0; i < 2; ++i) {
    copy(image, x.at.extension.session_table[i], x.branch, x.at.extension.session_table[i], 4096);
  }
  CHECK(examine(image, [](std::uint64_t s, const std::string& seen) {
          return s == 4 ? seen == "v3" : s < kOlder ? seen == "integrity" : unchanged(s, seen);
        }) == "ok");
}

TEST_CASE("backing name and policy are authenticated, and consent is needed") {
  sealed::CreateOptions options = create_options(kShape);
  options.backing_policy = sealed::BackingPolicy::unauthenticated;
  options.backing_name = "base.raw";
  options.backing_format = "raw";
  Lab maker(kShape);
  const sealed::VolumeKeys keys = test_keys();
  must(maker.run(sealed::create_image(maker.queue().io, maker.file(), options, keys),
                 Error(Kind::canceled, "hang")));
  const sim::Device image = killed(maker.image());
  Lab refused(kShape, image);
  CHECK(refused.open().kind() == Kind::gate_refused);
  const auto open = [&](const sim::Device& changed) {
    auto how = open_options(kShape);
    how.allow_unauthenticated_backing = true;
    return Lab(kShape, changed).open(std::move(how)).kind();
  };
  CHECK(open(image) == Kind::gate_refused);  // allowed, but not given
  sim::Device policy = image;
  flip(policy, sealed::kExtensionAt + offsetof(sealed::ExtensionRaw, backing_policy), 1);
  CHECK(open(policy) == Kind::integrity);
  sim::Device name = image;
  flip(name, load64(image.cache(), 8), 0);
  CHECK(open(name) == Kind::integrity);
  sim::Device shorter = image;
  flip(shorter, 19, 0);  // the name's length
  CHECK(open(shorter) == Kind::corrupt);
}

TEST_SUITE_END();
