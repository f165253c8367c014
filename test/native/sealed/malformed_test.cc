// A sector's entry that is none (a flipped bit of its state): its sector alone is lost. Whoever
// looks at the whole disk names it and goes on, and a write heals it.
#include <doctest/doctest.h>

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "sealed/sealed_lab.h"
#include "sealed/sealed_subject.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

TEST_SUITE_BEGIN("solo");

namespace {
constexpr std::uint64_t kLost = 123;
constexpr std::uint64_t kSectors = 300;

// Of sectors that all hold version 1, one whose entry has a state that there is not.
sim::Device with_malformed_entry(const SealedShape& shape) {
  sim::Device image;
  {
    Lab lab(shape);
    REQUIRE_FALSE(lab.create());
    REQUIRE_FALSE(lab.open());
    REQUIRE_FALSE(lab.write(0, 1, kSectors / 2));
    REQUIRE_FALSE(lab.write(kSectors / 2, 1, kSectors / 2));
    REQUIRE_FALSE(lab.close());
    image = lab.image();
  }
  const sealed::SealedGeometry geometry{shape.cluster_bits, kSectors * kSectorSize};
  const Places places = places_of(image.cache());
  const Slot slot = geometry.entry_slot({kLost});
  const std::uint64_t state = sealed::l2_host(load64(image.cache(), places.slot(slot.value))) +
                              geometry.entry_offset({kLost}) + offsetof(sealed::Entry, word);
  std::uint8_t byte = 0;
  image.cache().read(state, &byte, 1);
  byte |= 0xC0;
  image.overwrite(state, &byte, 1);
  return image;
}

std::vector<std::uint64_t> found_bad(Lab& lab) {
  std::vector<std::uint64_t> bad;
  const std::function<void(Sector)> to_bad = [&](Sector s) { bad.push_back(s.value); };
  const std::function<void(Sector)> never = [](Sector) { FAIL("all of it can be read"); };
  CHECK(lab.run(lab.backend().verify(lab.queue(), {0}, kSectors, to_bad, never),
                Result<std::uint64_t>(Error(Kind::canceled, "hang"))));
  return bad;
}
}  // namespace

TEST_CASE("a malformed entry loses its sector and no other") {
  for (const bool nonvolatile : {false, true}) {  // writes by way of the log, or in place
    for (const std::uint64_t written : {1, 4}) {
      CAPTURE(nonvolatile);
      CAPTURE(written);
      const SealedShape shape{.sectors = kSectors,
                              .cluster_bits = 12,
                              .non_volatile = nonvolatile,
                              .overlay_sectors_max = 1 << 20,
                              .session_sectors_max = 1 << 20};
      Lab lab(shape, with_malformed_entry(shape));
      REQUIRE_FALSE(lab.open());
      CHECK(lab.look(kLost) == "integrity");
      CHECK(lab.look(kLost - 1) == "v1");
      CHECK(found_bad(lab) == std::vector<std::uint64_t>{kLost});

      image::SealedBackend::Rekeyed rekeyed;
      CHECK_FALSE(lab.run(lab.backend().rekey(lab.queue(), {0}, kSectors * kSectorSize, rekeyed),
                          Error(Kind::canceled, "hang")));
      CHECK(rekeyed.damaged == std::vector<std::uint64_t>{kLost});

      REQUIRE_FALSE(lab.write(kLost - written + 1, 2, written));
      CHECK(lab.look(kLost) == "v2");
      CHECK(found_bad(lab).empty());
      REQUIRE_FALSE(lab.checkpoint());
      CHECK(lab.look(kLost) == "v2");
    }
  }
}

TEST_SUITE_END();
