// A sealed disk in the simulator without crashes: what was written is read, now and after
// reopening.
#include <doctest/doctest.h>

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

TEST_SUITE_END();
