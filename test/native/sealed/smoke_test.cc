// A sealed disk in the simulator without crashes: what was written is read, now and after
// reopening.
#include <doctest/doctest.h>

#include "sealed/sealed_lab.h"
#include "sealed/sealed_subject.h"
#include "sim/crash_runs.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

TEST_SUITE_BEGIN("solo");

TEST_CASE("a sealed disk keeps what is written over clean closes") {
  const sim::CrashReport report = sim::crash_runs(
      sealed_subject({}), 1, 20, {.branches = 0, .power_loss = false, .kill = false});
  CHECK_MESSAGE(report.ok(), report.failure);
}

TEST_CASE("a sealed disk works without any memory for its caches") {
  const SealedShape shape{.sectors = 300,
                          .cluster_bits = 12,
                          .overlay_sectors_max = 1 << 20,
                          .session_sectors_max = 1 << 20};
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  image::SealedOptions options = open_options(shape);
  options.limits.entry_cache = 0;
  options.limits.l2_cache = 0;
  REQUIRE_FALSE(lab.open(std::move(options)));
  for (std::uint64_t version = 1; version <= 3; ++version) {
    CHECK_FALSE(lab.write(0, version, 200));
    CHECK_FALSE(lab.checkpoint());
    CHECK(lab.look(199) == "v" + std::to_string(version));
  }
  CHECK(lab.look(250) == "zeros");
  CHECK_FALSE(lab.close());
}

TEST_SUITE_END();
