// Raw, qcow2 and sealed images under random crashes: no sector older than its last flush, no mix
// beyond what the device itself does, and a structure that check finds clean.
#include "sim/images.h"

#include <doctest/doctest.h>

#include "effort.h"
#include "sim/crash_runs.h"
#include "sim/scope.h"

using namespace pqblk;  // NOLINT
using namespace pqblk::sim;

namespace {

constexpr std::uint32_t kSubjects = 13;  // a soak is shared by them

void survives(const Subject& subject, std::uint64_t seeds, const CrashOptions& options) {
  const std::uint32_t soak = test::soak_seconds();
  const CrashReport report = soak != 0 ? crash_soak(subject, soak / kSubjects + 1, options)
                                       : crash_runs(subject, 1, test::effort(seeds), options);
  CHECK_MESSAGE(report.ok(), report.failure);
  note_seeds(subject.name, report);
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("raw images survive random crashes") { survives(raw_subject(24), 200, {}); }

TEST_CASE("qcow2 images survive random crashes") {
  survives(qcow2_subject({}), 200, {});
  survives(qcow2_subject({.cluster_bits = 14, .refcount_bits = 1}), 100, {});
  survives(qcow2_subject({.cluster_bits = 16, .extended_l2 = true}), 100, {});
}

TEST_CASE("sealed images are whole after every clean close") {
  survives(checked_sealed_subject({}), 60, {});
  survives(checked_sealed_subject({.cluster_bits = 16}), 60, {});
  survives(checked_sealed_subject({.non_volatile = true}), 60, {});
}

// A mapping may come home whose data did not: the file must be as long as what it names.
TEST_CASE("sealed images survive random crashes on a file system without fallocate") {
  for (const std::uint32_t bits : {12U, 16U}) {
    Subject subject = checked_sealed_subject({.cluster_bits = bits});
    subject.file.device.allocates = false;
    survives(subject, 60, {.generations = 6});
  }
}

// Each image that a crash can leave is opened, and crashed again at every step of that; whoever
// opens it at last and closes it leaves nothing taken that no entry names.
TEST_CASE("a crash in the middle of taking back reserved clusters leaves none of them") {
  const std::vector<std::vector<OpSpec>> programs = {
      {{OpType::write, 0}, {OpType::write_cluster, 0}, {OpType::flush}, {OpType::checkpoint}},
      {{OpType::write, 2}, {OpType::checkpoint}, {OpType::discard, 2, 2}, {OpType::write, 0}}};
  const ScopeReport report = explore(checked_sealed_subject({.sectors = 4}), programs,
                                     {.clients = 1,
                                      .schedule_deviations = 0,
                                      .images_max = test::effort(16),
                                      .recovery_images_max = 4});
  CHECK_MESSAGE(report.ok(), report.failure);
  MESSAGE(report.text());
}

TEST_CASE("sealed images over a backing image survive random crashes") {
  survives(checked_sealed_subject({}, true), 60, {});
  survives(checked_sealed_subject({.cluster_bits = 14, .non_volatile = true}, true), 60, {});
}

TEST_CASE("raw and qcow2 images survive failing operations") {
  survives(raw_subject(24), 200, {.fault_runs_one_in = 2});
  survives(qcow2_subject({}), 200, {.fault_runs_one_in = 2});
}

TEST_SUITE_END();
