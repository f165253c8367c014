// Exhaustive small scope on the real engine: every short program over a few sectors, crashed at
// every step with every subset of unflushed writes, and again inside recovery.
//
// PQBLK_SOAK_SECONDS explores longer programs for about that long.
#include "sim/scope.h"

#include <doctest/doctest.h>

#include <chrono>

#include "effort.h"
#include "sealed/sealed_subject.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT
using Op = sim::OpType;

namespace {

// Two clusters of two sectors: neighbours in one cluster, and one beside them.
const SealedShape kTwoClusters{.sectors = 4, .overlay_sectors_max = 1 << 20};
const SealedShape kTwoSafeClusters{
    .sectors = 4, .non_volatile = true, .overlay_sectors_max = 1 << 20};

const std::vector<sim::OpSpec> kAlphabet = {
    {Op::write, 0},   {Op::write, 1},  {Op::write_fua, 0}, {Op::write_cluster, 0},
    {Op::write, 2},   {Op::zero, 0},   {Op::flush},        {Op::zero_unmap, 0, 2},
    {Op::discard, 1}, {Op::checkpoint}};

void explore_all(const char* name, const SealedShape& shape, std::uint32_t length,
                 std::uint64_t programs, const sim::ScopeOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  const sim::ProgramSpace space{kAlphabet, length};
  const sim::ScopeReport report =
      sim::explore(sealed_subject(shape), space.some(programs, 1), options);
  CHECK_MESSAGE(report.ok(), report.failure);
  const auto spent = std::chrono::steady_clock::now() - begin;
  MESSAGE(std::chrono::duration_cast<std::chrono::milliseconds>(spent).count()
          << " ms, " << std::string(name) << ", length " << length << ": " << report.text());
}

// One client, crashed inside recovery too; and two clients in many schedules.
sim::ScopeOptions deep(std::uint64_t images) {
  return {.clients = 1, .schedule_deviations = 0, .images_max = images, .recovery_images_max = 4};
}
sim::ScopeOptions wide(std::uint64_t images) {
  return {.clients = 2, .schedule_deviations = 1, .images_max = images, .recovery_crashes = 0};
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("sealed disks survive every crash of every short program") {
  explore_all("volatile, one client", kTwoClusters, 2, effort(100), deep(effort(16)));
  explore_all("non-volatile, one client", kTwoSafeClusters, 2, effort(100), deep(effort(16)));
  explore_all("volatile, one client", kTwoClusters, 3, effort(120), deep(effort(8)));
  explore_all("volatile, two clients", kTwoClusters, 3, effort(16), wide(effort(8)));
  explore_all("non-volatile, two clients", kTwoSafeClusters, 3, effort(16), wide(effort(8)));
}

// Lengths 3 to 6 in turn, other programs each time round.
TEST_CASE("sealed disks survive every crash of longer programs") {
  using Clock = std::chrono::steady_clock;
  const bool soak = soak_seconds() != 0;
  const auto end = Clock::now() + std::chrono::seconds(soak_seconds());
  sim::ScopeReport report;
  std::uint64_t programs = 0;
  for (std::uint64_t round = 1; (round <= 4 || Clock::now() < end) && report.ok(); ++round) {
    const sim::ProgramSpace space{kAlphabet, static_cast<std::uint32_t>(3 + round % 4)};
    const SealedShape& shape = round % 8 < 4 ? kTwoClusters : kTwoSafeClusters;
    report = sim::explore(sealed_subject(shape), space.some(soak ? 2 : 1, round),
                          round % 2 == 0 ? deep(soak ? 64 : 4) : wide(soak ? 32 : 2));
    programs += report.programs;
  }
  CHECK_MESSAGE(report.ok(), report.failure);
  MESSAGE("longer programs: " << programs);
}

TEST_SUITE_END();
