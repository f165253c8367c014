// A medium that does not give out a sector: whoever looks at the whole disk names it, and goes on.
#include <doctest/doctest.h>

#include <functional>
#include <vector>

#include "sealed/sealed_lab.h"
#include "sealed/sealed_subject.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

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
  const Error hang(Kind::io_error, "hang");
  const auto verify = [&] {
    return lab.run(lab.backend().verify(lab.queue(), {0}, 300, to_bad, to_unreadable), Error(hang));
  };
  CHECK_FALSE(verify());
  CHECK(bad.empty());
  CHECK(unreadable == std::vector<std::uint64_t>{123});
  CHECK(lab.world().injected() == 2);  // of all sectors, and of this one
  lab.world().options().faults.unreadable_at = ~std::uint64_t{0};
  unreadable.clear();
  CHECK_FALSE(verify());
  CHECK(bad.empty());
  CHECK(unreadable.empty());
}

TEST_SUITE_END();
