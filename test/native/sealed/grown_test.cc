// A disk that was grown and not closed, under the header that it had before.
#include <doctest/doctest.h>

#include <vector>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

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
  const Error hang(Kind::canceled, "hang");
  const std::uint64_t size = grown.sectors * kSectorSize;
  REQUIRE_FALSE(small.run(small.backend().resize(small.queue(), size), Error(hang)));
  REQUIRE_FALSE(small.write(0, 2));
  REQUIRE_FALSE(small.write(300, 3, 4));
  REQUIRE_FALSE(small.write(1, 4, 3));
  REQUIRE_FALSE(small.flush());
  sim::Device image = killed(small.image());
  image.overwrite(0, header.data(), header.size());

  for (const bool read_only : {true, false}) {
    Lab lab(shape, image);
    REQUIRE_FALSE(lab.open(read_only));
    CHECK(lab.backend().recovery().damaged == 0);
    CHECK(lab.look(0) == "v2");
    CHECK(lab.look(1) == "v4");
    CHECK(lab.look(3) == "v4");
    CHECK(lab.look(4) == "v1");
    if (read_only) continue;
    REQUIRE_FALSE(lab.run(lab.backend().resize(lab.queue(), size), Error(hang)));
    CHECK(lab.look(300) == "v3");
    CHECK(lab.look(303) == "v3");
    CHECK(lab.look(304) == "zeros");
    REQUIRE_FALSE(lab.close());
  }
}

TEST_SUITE_END();
