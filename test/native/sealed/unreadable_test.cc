// A medium that does not give out a sector: whoever looks at the whole disk names it, and goes on.
#include <doctest/doctest.h>

#include <functional>
#include <vector>

#include "sealed/sealed_lab.h"
#include "sealed/sealed_subject.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

const Error kHang(Kind::canceled, "hang");

void spoil(Lab& lab, std::uint64_t at) { lab.world().options().faults.unreadable_at = at; }
void mend(Lab& lab) { spoil(lab, ~std::uint64_t{0}); }

std::uint64_t host_of(Lab& lab, Sector s) {
  const sealed::SealedGeometry& geometry = lab.backend().sealed_geometry();
  const Places places = places_of(lab.image().cache());
  const Slot slot = geometry.data_slot(geometry.cluster_of(s));
  const std::uint64_t base = load64(lab.image().cache(), places.slot(slot.value));
  return sealed::l2_host(base) + geometry.offset_in_cluster(s);
}

// Where the copy of the log's header is that counts.
std::uint64_t newer_log_header(const sim::Device& image) {
  constexpr std::uint64_t kSerialAt = 8;
  const std::uint64_t log = places_of(image.cache()).extension.log_offset;
  const std::uint64_t a = load64(image.cache(), log + kSerialAt);
  const std::uint64_t b = load64(image.cache(), log + sealed::kPage + kSerialAt);
  return a > b ? log : log + sealed::kPage;
}

// What each of the first sectors holds, by an opener for whom a copy of the log's header cannot be
// read; or why he cannot open the disk.
std::string without_log_header(const SealedShape& shape, const sim::Device& image, bool newer) {
  const std::uint64_t log = places_of(image.cache()).extension.log_offset;
  const std::uint64_t at = newer_log_header(image);
  Lab lab(shape, image);
  spoil(lab, newer ? at : log + log + sealed::kPage - at);
  if (Error e = lab.open(true)) return std::string(kind_name(e.kind()));
  std::string all;
  for (std::uint64_t s = 0; s < 4; ++s) all += lab.look(s) + " ";
  return all;
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("a sector that the medium does not give out is named, and no other") {
  const SealedShape shape{.sectors = 300,
                          .cluster_bits = 12,
                          .overlay_sectors_max = 1 << 20,
                          .session_sectors_max = 1 << 20};
  sim::Device image;
  {
    Lab lab(shape);
    REQUIRE_FALSE(lab.create());
    REQUIRE_FALSE(lab.open());
    REQUIRE_FALSE(lab.write(0, 1, 150));
    REQUIRE_FALSE(lab.write(150, 1, 150));
    REQUIRE_FALSE(lab.close());
    image = lab.image();
  }
  Lab lab(shape, image);
  REQUIRE_FALSE(lab.open(true));
  const sealed::SealedGeometry& geometry = lab.backend().sealed_geometry();
  const Places places = places_of(image.cache());
  const Slot slot = geometry.data_slot(geometry.cluster_of({123}));
  const std::uint64_t host = sealed::l2_host(load64(image.cache(), places.slot(slot.value)));
  lab.world().options().faults.unreadable_at = host + 100;
  std::vector<std::uint64_t> bad, unreadable;
  const std::function<void(Sector)> to_bad = [&](Sector s) { bad.push_back(s.value); };
  const std::function<void(Sector)> to_unreadable = [&](Sector s) {
    unreadable.push_back(s.value);
  };
  const auto verify = [&] {
    auto looked = lab.run(lab.backend().verify(lab.queue(), {0}, 300, to_bad, to_unreadable),
                          Result<std::uint64_t>(Error(kHang)));
    REQUIRE(looked);
    return *looked;
  };
  CHECK(verify() == 299);
  CHECK(bad.empty());
  CHECK(unreadable == std::vector<std::uint64_t>{123});
  CHECK(lab.world().injected() == 2);  // of all sectors, and of this one
  lab.world().options().faults.unreadable_at = ~std::uint64_t{0};
  unreadable.clear();
  CHECK(verify() == 300);
  CHECK(bad.empty());
  CHECK(unreadable.empty());
}

TEST_CASE("a rotation names a sector that the medium does not give out, and goes on") {
  const SealedShape shape{.sectors = 300,
                          .cluster_bits = 16,
                          .overlay_sectors_max = 1 << 20,
                          .session_sectors_max = 1 << 20};
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1, 150));
  REQUIRE_FALSE(lab.checkpoint());
  REQUIRE_FALSE(lab.begin_epoch(2));
  using Rekeyed = image::SealedBackend::Rekeyed;
  const auto rekey = [&](Rekeyed& out) {
    return lab.run(lab.backend().rekey(lab.queue(), {0}, 150 * kSectorSize, out), Error(kHang));
  };
  spoil(lab, host_of(lab, {50}) + 100);
  Rekeyed first, again, last;
  REQUIRE_FALSE(rekey(first));
  CHECK(first.unreadable == std::vector<std::uint64_t>{50});
  CHECK(first.damaged.empty());
  CHECK(first.sectors == 149);
  REQUIRE_FALSE(rekey(again));
  CHECK(again.unreadable == first.unreadable);
  CHECK(again.sectors == 15);  // its cluster would move as a whole
  auto left = lab.run(lab.backend().count_other_epochs(lab.queue(), {0}, 150 * kSectorSize),
                      Result<std::uint64_t>(Error(kHang)));
  REQUIRE(left);
  CHECK(*left == 1);  // so that the old key is kept
  mend(lab);
  REQUIRE_FALSE(rekey(last));
  CHECK(last.unreadable.empty());
  CHECK(last.sectors == 16);
  for (std::uint64_t s = 0; s < 150; ++s) CHECK(lab.look(s) == "v1");
}

TEST_CASE("the sectors of a page of entries that cannot be read are named, and no other") {
  const SealedShape shape{.sectors = 300,
                          .cluster_bits = 16,
                          .overlay_sectors_max = 1 << 20,
                          .session_sectors_max = 1 << 20};
  sim::Device closed, unclean;
  std::uint64_t page = 0;
  {
    Lab lab(shape);
    REQUIRE_FALSE(lab.create());
    REQUIRE_FALSE(lab.open());
    REQUIRE_FALSE(lab.write(0, 1, 150));
    REQUIRE_FALSE(lab.write(150, 1, 150));
    const sealed::SealedGeometry geometry = lab.backend().sealed_geometry();
    REQUIRE_FALSE(lab.close());
    closed = lab.image();
    REQUIRE(geometry.entry_offset({128}) == sealed::kPage);
    const std::uint64_t slot = places_of(closed.cache()).slot(geometry.entry_slot({128}).value);
    page = sealed::l2_host(load64(closed.cache(), slot)) + sealed::kPage;
    REQUIRE_FALSE(lab.open());
    REQUIRE_FALSE(lab.write(200, 2));
    REQUIRE_FALSE(lab.flush());
    unclean = killed(lab.image());
  }
  std::vector<std::uint64_t> lost;
  for (std::uint64_t s = 128; s < 256; ++s) lost.push_back(s);

  SUBCASE("by a rotation, which keeps the old key") {
    Lab lab(shape, closed);
    spoil(lab, page + 100);
    REQUIRE_FALSE(lab.open());
    REQUIRE_FALSE(lab.begin_epoch(2));
    image::SealedBackend::Rekeyed out, rest;
    const auto rekey = [&](image::SealedBackend::Rekeyed& done) {
      return lab.run(lab.backend().rekey(lab.queue(), {0}, 300 * kSectorSize, done), Error(kHang));
    };
    const auto left = [&] {
      auto found = lab.run(lab.backend().count_other_epochs(lab.queue(), {0}, 300 * kSectorSize),
                           Result<std::uint64_t>(Error(kHang)));
      REQUIRE(found);
      return *found;
    };
    REQUIRE_FALSE(rekey(out));
    CHECK(out.unreadable == lost);
    CHECK(out.damaged.empty());
    CHECK(out.sectors == 300 - lost.size());
    CHECK(left() == lost.size());
    mend(lab);
    REQUIRE_FALSE(rekey(rest));
    CHECK(rest.unreadable.empty());
    CHECK(rest.sectors == lost.size());
    CHECK(left() == 0);
    for (std::uint64_t s = 0; s < 300; ++s) CHECK(lab.look(s) == "v1");
  }

  SUBCASE("and those at the disk's end keep nobody from writing elsewhere") {
    Lab lab(shape, closed);
    spoil(lab, page + sealed::kPage + 100);  // the rest of the last cluster is in it as well
    REQUIRE_FALSE(lab.open());
    CHECK_FALSE(lab.write(0, 2));
    CHECK(lab.look(299) == "io_error");
    auto end =
        lab.run(lab.backend().end_beyond_size(lab.queue()), Result<std::uint64_t>(Error(kHang)));
    REQUIRE(end);
    CHECK(*end == 0);
  }

  SUBCASE("by a check, which knows what the log has without that page") {
    Lab lab(shape, unclean);
    spoil(lab, page + 100);
    REQUIRE_FALSE(lab.open(true));
    std::erase(lost, 200);
    std::vector<std::uint64_t> unreadable;
    const std::function<void(Sector)> never = [](Sector) { FAIL("nothing is damaged"); };
    const std::function<void(Sector)> name = [&](Sector s) { unreadable.push_back(s.value); };
    auto looked = lab.run(lab.backend().verify(lab.queue(), {0}, 300, never, name),
                          Result<std::uint64_t>(Error(kHang)));
    REQUIRE(looked);
    CHECK(*looked == 300 - lost.size());
    CHECK(unreadable == lost);
  }
}

TEST_CASE("what a copy of the session table is for, when the other one cannot be read") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 7));
  REQUIRE_FALSE(lab.close());
  const sealed::Extension places = places_of(lab.image().cache()).extension;
  for (const std::uint64_t at : {places.session_table[0], places.session_table[1]}) {
    spoil(lab, at + 200);
    auto info = lab.run(sealed::read_public_info(lab.queue().io, lab.file()),
                        Result<sealed::PublicInfo>(Error(kHang)));
    REQUIRE(info);
    CHECK(info->sessions == 1);
    REQUIRE_FALSE(lab.open(true));
    CHECK(lab.look(0) == "v7");
    REQUIRE_FALSE(lab.close());
  }
}

TEST_CASE("a closed disk opens with either copy of its log's header") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  for (std::uint64_t life = 1; life < 4; ++life) {
    REQUIRE_FALSE(lab.open());
    REQUIRE_FALSE(lab.write(0, life, 3));
    REQUIRE_FALSE(lab.checkpoint());
    REQUIRE_FALSE(lab.write(2, life + 10));
    REQUIRE_FALSE(lab.close());
    const std::string v = "v" + std::to_string(life);
    const std::string want = v + " " + v + " v" + std::to_string(life + 10) + " zeros ";
    CHECK(without_log_header(shape, lab.image(), false) == want);
    CHECK(without_log_header(shape, lab.image(), true) == want);
  }
}

// The newer copy names the log's begin. With the older one all of the log is found, or none of it:
// nobody may take that for a disk without a log. See log_copies_test.cc.
TEST_CASE("what was written last is found without a copy of the log's header") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1, 3));
  REQUIRE_FALSE(lab.checkpoint());
  REQUIRE_FALSE(lab.write(1, 2, 2));
  REQUIRE_FALSE(lab.flush());
  const sim::Device one_life = killed(lab.image());
  CHECK(without_log_header(shape, one_life, false) == "v1 v2 v2 zeros ");
  CHECK(without_log_header(shape, one_life, true) == "v1 v2 v2 zeros ");

  REQUIRE_FALSE(lab.close());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(2, 3, 2));
  REQUIRE_FALSE(lab.flush());
  const sim::Device next_life = killed(lab.image());
  CHECK(without_log_header(shape, next_life, false) == "v1 v2 v3 v3 ");
  CHECK(without_log_header(shape, next_life, true) == "v1 v2 v3 v3 ");
}

TEST_CASE("a log header that cannot be read back ends the writing") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1));
  spoil(lab, newer_log_header(lab.image()));
  CHECK(lab.checkpoint().kind() == Kind::io_error);
  mend(lab);
}

TEST_SUITE_END();
