// A disk at rest: when nobody has written for a while the log goes home by itself, and neither a
// writer nor a close waits for that.
#include <doctest/doctest.h>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {
constexpr std::uint64_t kSecond = 1'000'000'000;
constexpr SealedShape kShape{.sectors = 300, .cluster_bits = 12, .rest_ns = 30 * kSecond};

void pass(Lab& lab, std::uint64_t seconds) {
  const auto sleep = [](io::Queue& queue, std::uint64_t ns) -> Task<Error> {
    co_await queue.sleep(ns);
    co_return Error();
  };
  CHECK_FALSE(lab.run(sleep(lab.queue().io, seconds * kSecond), Error(Kind::canceled, "hangs")));
}

class Rested {
 public:
  Rested() {
    REQUIRE_FALSE(lab.create());
    REQUIRE_FALSE(lab.open());
  }
  void pass(std::uint64_t seconds) { ::pass(lab, seconds); }
  image::BackendStats stats() { return lab.backend().stats(); }

  Lab lab{kShape};
};
}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("the log of a disk at rest goes home, once") {
  Rested disk;
  for (std::uint64_t version = 1; version <= 2; ++version) {
    CHECK_FALSE(disk.lab.write(7, version, 20));
    CHECK(disk.stats().log_used != 0);
    disk.pass(61);
    CHECK(disk.stats().log_used == 0);
    CHECK(disk.stats().checkpoints == version);
    CHECK(disk.lab.look(26) == "v" + std::to_string(version));
  }
  disk.pass(600);  // nothing happens to a disk that stays at rest
  CHECK(disk.stats().checkpoints == 2);
  CHECK_FALSE(disk.lab.close());
}

TEST_CASE("a disk that is written to now and then is not at rest") {
  Rested disk;
  for (std::uint64_t version = 1; version <= 12; ++version) {
    CHECK_FALSE(disk.lab.write(7, version));
    disk.pass(20);
  }
  CHECK(disk.stats().checkpoints == 0);
  disk.pass(61);
  CHECK(disk.stats().checkpoints == 1);
  CHECK(disk.lab.look(7) == "v12");
  CHECK_FALSE(disk.lab.close());
}

// What was written while a checkpoint ran, and nobody wrote after it, is not forgotten.
TEST_CASE("a disk goes to rest whatever else was going on when its writers left off") {
  for (std::uint64_t steps = 1; steps <= 60; ++steps) {
    SealedShape shape = kShape;
    shape.overlay_sectors_max = 24;
    shape.session_sectors_max = 1 << 20;
    shape.rest_ns = steps * 1'000;
    Lab lab(shape);
    REQUIRE_FALSE(lab.create());
    REQUIRE_FALSE(lab.open());
    for (const std::uint64_t at : {0, 100, 200}) REQUIRE_FALSE(lab.write(at, 1, 100));
    REQUIRE_FALSE(lab.checkpoint());
    REQUIRE_FALSE(lab.write(100, 2, 100));  // asks for a checkpoint
    for (std::uint64_t sector = 0; sector < 4; ++sector) REQUIRE_FALSE(lab.write(sector, 3));
    pass(lab, 1);
    CHECK_MESSAGE(lab.backend().stats().log_used == 0, "after ", steps, " steps");
    REQUIRE_FALSE(lab.close());
  }
}

TEST_CASE("a close does not wait until the disk would be at rest") {
  Rested disk;
  CHECK_FALSE(disk.lab.write(7, 1));
  const std::uint64_t begun = disk.lab.world().now_ns();
  CHECK_FALSE(disk.lab.close());
  CHECK(disk.lab.world().now_ns() - begun < kSecond);
}

TEST_SUITE_END();
