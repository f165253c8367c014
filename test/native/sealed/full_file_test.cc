// A file that can grow no further: what a write that finds no cluster costs, and what helps it.
#include <doctest/doctest.h>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

TEST_SUITE_BEGIN("solo");

TEST_CASE("a write without room waits for a checkpoint only where one may give clusters back") {
  const SealedShape shape{.sectors = 4096,
                          .cluster_bits = 12,
                          .log_bytes = kMiB,
                          .overlay_sectors_max = 1 << 20,
                          .session_sectors_max = 1 << 20,
                          .relocate_bytes_min = kGiB};
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1));
  lab.world().options().faults.file_size_max = lab.image().cache().size();
  std::uint64_t full = 0;
  Error e;
  while (!e && full < shape.sectors - 1) e = lab.write(++full, 1);
  REQUIRE(e.kind() == Kind::no_space);
  REQUIRE_FALSE(lab.checkpoint());

  const std::uint64_t before = lab.backend().stats().checkpoints;
  for (std::uint64_t i = 0; i < 20; ++i) {
    REQUIRE_FALSE(lab.write(0, 2 + i));  // is in the log, where a checkpoint would take it from
    CHECK(lab.write(full, 1).kind() == Kind::no_space);
  }
  CHECK(lab.backend().stats().checkpoints == before);

  REQUIRE_FALSE(lab.run(lab.backend().discard(lab.queue(), {kSectorSize}, kSectorSize),
                        Error(Kind::canceled, "hang")));
  CHECK_FALSE(lab.write(full, 7));
  CHECK(lab.look(full) == "v7");
  CHECK(lab.look(0) == "v21");
  CHECK(lab.look(1) == "zeros");
}

TEST_SUITE_END();
