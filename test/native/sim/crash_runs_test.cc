// The runners on the toy store: the right one survives every seed, each wrong one is caught.
#include "sim/crash_runs.h"

#include <doctest/doctest.h>

#include "effort.h"
#include "sim/toy_store.h"

using namespace pqblk;  // NOLINT
using namespace pqblk::sim;

TEST_SUITE_BEGIN("solo");

TEST_CASE("a right store survives random crashes") {
  const ToyFault fault = ToyFault::none;
  const CrashReport report = crash_runs(toy_subject(12, fault), 1, test::effort(300), {});
  CHECK_MESSAGE(report.ok(), report.failure);
  MESSAGE("lives " << report.counts.lives << ", crashes " << report.counts.crashes << ", steps "
                   << report.counts.steps);
}

TEST_CASE("a right store survives failing operations") {
  const ToyFault fault = ToyFault::none;
  const CrashReport report =
      crash_runs(toy_subject(12, fault), 1, test::effort(300), {.fault_runs_one_in = 2});
  CHECK_MESSAGE(report.ok(), report.failure);
}

TEST_SUITE_END();

TEST_SUITE_BEGIN("hunt");

TEST_CASE("every wrong store is caught") {
  for (std::size_t i = 1; i < kToyFaults; ++i) {
    const auto fault = static_cast<ToyFault>(i);
    const bool injected = fault == ToyFault::forgets_failed_sync;
    const CrashReport report =
        crash_runs(toy_subject(12, fault), 1, 300, {.fault_runs_one_in = injected ? 1U : 0U});
    MESSAGE(std::string(toy_fault_name(fault))
            << " after " << report.counts.runs << " runs: " << report.failure);
    CHECK_MESSAGE(!report.ok(), "survived: " << std::string(toy_fault_name(fault)));
  }
}

TEST_SUITE_END();
