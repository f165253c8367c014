// The exhaustive explorer on the toy store.
#include "sim/scope.h"

#include <doctest/doctest.h>

#include "effort.h"
#include "sim/planted.h"
#include "sim/toy_store.h"

using namespace pqblk;  // NOLINT
using namespace pqblk::sim;

namespace {

const std::vector<OpSpec> kAlphabet = {{OpType::flush},
                                       {OpType::write, 0},
                                       {OpType::write_fua, 0},
                                       {OpType::write, 1},
                                       {OpType::zero, 0}};

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("a right store survives every crash of every program of four operations") {
  const ToyFault fault = ToyFault::none;
  const ProgramSpace space{kAlphabet, 4};
  const std::uint64_t programs = test::effort(space.size());
  const ScopeReport report = explore(toy_subject(2, fault), space.some(programs, 1),
                                     {.epilogue = {{OpType::write, 0}, {OpType::flush}}});
  CHECK_MESSAGE(report.ok(), report.failure);
  CHECK(report.complete);
  CHECK(report.programs >= programs);
  MESSAGE(report.text());
}

TEST_SUITE_END();

TEST_SUITE_BEGIN("hunt");

TEST_CASE("every wrong store is caught in a small scope") {
  for (std::size_t i = 1; i < kToyFaults; ++i) {
    const auto fault = static_cast<ToyFault>(i);
    if (fault == ToyFault::forgets_failed_sync) continue;  // no faults are injected here
    const ProgramSpace space{kAlphabet, 4};
    const ScopeReport report = explore(toy_subject(2, fault), space.some(10'000, 1),
                                       {.clients = 3, .schedule_deviations = 2});
    CHECK_MESSAGE(!report.ok(), "survived: " << std::string(toy_fault_name(fault)));
    MESSAGE(std::string(toy_fault_name(fault)) << ", " << report.text() << ": " << report.failure);
  }
}

TEST_SUITE_END();
