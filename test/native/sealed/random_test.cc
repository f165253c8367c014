// Random crash runs of sealed disks of many shapes: power loss, kill -9, failing and short I/O.
//
// The seeds are fixed, so that a run is a regression test; PQBLK_SOAK_SECONDS runs new ones.
#include <doctest/doctest.h>

#include "effort.h"
#include "sealed/sealed_subject.h"
#include "sim/crash_runs.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

struct Case {
  const char* name;
  SealedShape shape;
  sim::CrashOptions options = {};
};

constexpr auto kChaCha = crypto::Suite::chacha20_poly1305;
constexpr std::uint64_t kShortRest = 50'000;  // fifty steps of the world
constexpr sim::CrashOptions kFailing{.fault_runs_one_in = 2};
constexpr sim::CrashOptions kRotating{.operations = 150};
constexpr sim::CrashOptions kFailingRotation{.operations = 150, .fault_runs_one_in = 2};
constexpr sim::CrashOptions kBusy{.operations = 120, .clients = 8, .queues = 3};

const Case kCases[] = {
    {"volatile", {}},
    {"non-volatile", {.non_volatile = true}},
    {"4 KiB clusters", {.sectors = 1300, .cluster_bits = 12}},
    {"16 KiB clusters, ChaCha20", {.cluster_bits = 14, .suite = kChaCha}},
    {"64 KiB clusters, full log",
     {.sectors = 64,
      .cluster_bits = 16,
      .overlay_sectors_max = 1 << 20,
      .relocate_bytes_min = kGiB},
     kBusy},
    {"tiny overlay and sessions", {.overlay_sectors_max = 4, .session_sectors_max = 20}},
    {"non-volatile, tiny sessions, ChaCha20",
     {.suite = kChaCha, .non_volatile = true, .session_sectors_max = 20}},
    {"nothing relocates", {.relocate_bytes_min = kGiB}, kBusy},
    {"non-volatile and busy", {.sectors = 16, .non_volatile = true}, kBusy},
    {"often at rest", {.rest_ns = kShortRest}},
    {"often at rest, non-volatile", {.non_volatile = true, .rest_ns = kShortRest}, kFailing},
    {"rotating, often at rest", {.sectors = 12, .rest_ns = kShortRest, .rotates = true}, kRotating},
    {"rotating", {.sectors = 12, .rotates = true}, kRotating},
    {"rotating, non-volatile, tiny sessions",
     {.sectors = 12, .non_volatile = true, .session_sectors_max = 20, .rotates = true},
     kRotating},
    {"rotating, 16 KiB clusters", {.sectors = 16, .cluster_bits = 14, .rotates = true}, kRotating},
    {"failing I/O, rotating", {.sectors = 12, .rotates = true}, kFailingRotation},
    {"losing log headers", {.loses_log_header = true}},
    {"losing log headers, rotating",
     {.sectors = 12, .rotates = true, .loses_log_header = true},
     kRotating},
    {"losing log headers, busy",
     {.sectors = 16, .non_volatile = true, .loses_log_header = true},
     kBusy},
    {"failing I/O", {}, kFailing},
    {"failing I/O, non-volatile", {.non_volatile = true}, kFailing},
    {"failing I/O, 64 KiB clusters", {.cluster_bits = 16}, kFailing},
};

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("sealed disks of every shape survive random crashes") {
  const std::uint32_t soak = soak_seconds();
  const std::uint64_t seeds = effort(300);
  for (const Case& c : kCases) {
    SUBCASE(c.name) {
      const sim::Subject subject = sealed_subject(c.shape);
      const auto cases = static_cast<std::uint32_t>(std::size(kCases));
      const sim::CrashReport report = soak != 0
                                          ? sim::crash_soak(subject, soak / cases + 1, c.options)
                                          : sim::crash_runs(subject, 1, seeds, c.options);
      CHECK_MESSAGE(report.ok(), report.failure);
      sim::note_seeds(c.name, report);
    }
  }
}

TEST_SUITE_END();
