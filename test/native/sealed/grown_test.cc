// A disk that was grown, under the header that it had before.
#include <doctest/doctest.h>

#include <vector>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

const Error kHang(Kind::canceled, "hang");

Error resize(Lab& lab, std::uint64_t sectors) {
  return lab.run(lab.backend().resize(lab.queue(), sectors * kSectorSize), Error(kHang));
}

Error open_to_resize(Lab& lab, const SealedShape& shape) {
  image::SealedOptions how = open_options(shape);
  how.to_resize = true;
  return lab.open(std::move(how));
}

std::uint64_t end_beyond_size(Lab& lab) {
  using End = Result<std::uint64_t>;
  const End end = lab.run(lab.backend().end_beyond_size(lab.queue()), End(Error(kHang)));
  REQUIRE(end);
  return *end;
}

// Grown to `grown` sectors, written at `at`, closed, and the header of before put back.
sim::Device grown_and_put_back(const SealedShape& shape, std::uint64_t grown, std::uint64_t at) {
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1));
  REQUIRE_FALSE(lab.write(shape.sectors - 30, 1, 30));
  REQUIRE_FALSE(lab.close());
  std::vector<std::uint8_t> header(sealed::kPage);
  lab.image().cache().read(0, header.data(), header.size());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(resize(lab, grown));
  REQUIRE_FALSE(lab.write(at, 2));
  REQUIRE_FALSE(lab.close());
  sim::Device image = killed(lab.image());
  image.overwrite(0, header.data(), header.size());
  return image;
}

sealed::SealedGeometry geometry_of(const SealedShape& shape) {
  return {.cluster_bits = shape.cluster_bits, .size = shape.sectors * kSectorSize};
}

// Where the entry of a sector is in the image.
std::uint64_t entry_of(const SealedShape& shape, const sim::Device& image, Sector s) {
  const sealed::EntryPlace place = geometry_of(shape).entry_place(s);
  const std::uint64_t slot = places_of(image.cache()).slot(place.slot.value);
  return sealed::l2_host(load64(image.cache(), slot)) + place.offset;
}

std::uint64_t data_of(const SealedShape& shape, const sim::Device& image, Sector s) {
  const sealed::SealedGeometry geometry = geometry_of(shape);
  const Slot slot = geometry.data_slot(geometry.cluster_of(s));
  const std::uint64_t at = places_of(image.cache()).slot(slot.value);
  return sealed::l2_host(load64(image.cache(), at)) + geometry.offset_in_cluster(s);
}

void flip(sim::Device& image, std::uint64_t at) {
  std::uint8_t byte = 0;
  image.cache().read(at, &byte, 1);
  byte ^= 4;
  image.overwrite(at, &byte, 1);
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("a log that names what lies beyond the size of an older header is folded all the same") {
  const SealedShape shape;
  const SealedShape grown{.sectors = 400};
  Lab small(shape);
  REQUIRE_FALSE(small.create());
  REQUIRE_FALSE(small.open());
  REQUIRE_FALSE(small.write(0, 1, 8));
  REQUIRE_FALSE(small.close());
  std::vector<std::uint8_t> header(sealed::kPage);
  small.image().cache().read(0, header.data(), header.size());
  REQUIRE_FALSE(small.open());
  REQUIRE_FALSE(resize(small, grown.sectors));
  REQUIRE_FALSE(small.write(0, 2));
  REQUIRE_FALSE(small.write(300, 3, 4));
  REQUIRE_FALSE(small.write(1, 4, 3));
  REQUIRE_FALSE(small.flush());
  sim::Device image = killed(small.image());
  image.overwrite(0, header.data(), header.size());

  for (const bool read_only : {true, false}) {
    Lab lab(shape, image);
    if (!read_only) CHECK(lab.open().kind() == Kind::corrupt);
    REQUIRE_FALSE((read_only ? lab.open(true) : open_to_resize(lab, shape)));
    CHECK(lab.backend().recovery().damaged == 0);
    CHECK(lab.look(0) == "v2");
    CHECK(lab.look(1) == "v4");
    CHECK(lab.look(3) == "v4");
    CHECK(lab.look(4) == "v1");
    CHECK(end_beyond_size(lab) == 304 * kSectorSize);
    if (read_only) continue;
    REQUIRE_FALSE(resize(lab, grown.sectors));
    CHECK(lab.look(300) == "v3");
    CHECK(lab.look(303) == "v3");
    CHECK(lab.look(304) == "zeros");
    REQUIRE_FALSE(lab.close());
  }
}

TEST_CASE("a disk that has data beyond its size takes no write before it has grown again") {
  struct Case {
    std::uint64_t sectors, grown, at, end;
    std::uint32_t cluster_bits = 13;
  };
  const std::vector<Case> cases{
      {40, 400, 40, 42},             // the next cluster
      {40, 400, 399, 400},           // of the same L2 table
      {2100, 4000, 3001, 3002},      // in the middle of nothing
      {39, 40, 39, 40},              // the rest of the last cluster
      {100, 200, 110, 111, 16},      // the same
      {2031, 2100, 2040, 2048, 16},  // the rest of the last entry cluster
      {2031, 2100, 2090, 2096, 16},  // the next one
  };
  for (const Case& c : cases) {
    CAPTURE(c.at);
    const SealedShape shape{.sectors = c.sectors,
                            .cluster_bits = c.cluster_bits,
                            .overlay_sectors_max = 1 << 20,
                            .session_sectors_max = 1 << 20};
    Lab lab(shape, grown_and_put_back(shape, c.grown, c.at));
    CHECK(lab.open().kind() == Kind::corrupt);
    REQUIRE_FALSE(lab.open(true));
    CHECK(end_beyond_size(lab) == c.end * kSectorSize);
    CHECK(lab.look(0) == "v1");
    REQUIRE_FALSE(lab.close());
    REQUIRE_FALSE(open_to_resize(lab, shape));
    CHECK(lab.zero(0, c.sectors).kind() == Kind::corrupt);
    CHECK(lab.write(c.sectors - 1, 9).kind() == Kind::corrupt);
    CHECK(resize(lab, c.sectors).kind() == Kind::corrupt);
    REQUIRE_FALSE(resize(lab, c.end));
    REQUIRE_FALSE(lab.zero(0, c.sectors));
    CHECK(lab.look(c.at) == "v2");
    REQUIRE_FALSE(lab.close());
    REQUIRE_FALSE(lab.open());
    CHECK(end_beyond_size(lab) == 0);
    CHECK(lab.look(c.at) == "v2");
    REQUIRE_FALSE(lab.close());
  }
}

TEST_CASE("an entry beyond the size that nothing opens is no data") {
  const SealedShape shape{.sectors = 39};
  const sim::Device whole = grown_and_put_back(shape, 40, 39);
  const std::uint64_t entry = entry_of(shape, whole, {39});
  const std::uint64_t data = data_of(shape, whole, {39});
  REQUIRE(Lab(shape, whole).open().kind() == Kind::corrupt);
  // Its tag, its nonce, its session, its state, and what it is of.
  for (const std::uint64_t at : {entry + 3, entry + 20, entry + 31, data + 100}) {
    CAPTURE(at - entry);
    sim::Device image = whole;
    flip(image, at);
    Lab lab(shape, image);
    CHECK_FALSE(lab.open());
    CHECK_FALSE(lab.write(38, 3));
    CHECK(lab.look(38) == "v3");
  }
  sim::Device image = whole;
  std::vector<std::uint8_t> never(sizeof(sealed::Entry));
  never[3] = 4;  // malformed: one bit of an entry that was never written
  image.overwrite(entry, never.data(), never.size());
  CHECK_FALSE(Lab(shape, image).open());
}

TEST_CASE("data beyond the size that the medium does not give out may be data") {
  const SealedShape shape{.sectors = 39};
  const sim::Device image = grown_and_put_back(shape, 40, 39);
  Lab lab(shape, image);
  lab.world().options().faults.unreadable_at = data_of(shape, image, {39}) + 100;
  CHECK(lab.open().kind() == Kind::corrupt);
  REQUIRE_FALSE(lab.open(true));
  CHECK(end_beyond_size(lab) == 40 * kSectorSize);
}

TEST_SUITE_END();
