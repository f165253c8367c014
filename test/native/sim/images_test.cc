// Raw and qcow2 images under random crashes: no sector older than its last flush, no mix beyond
// what the device itself does, and a structure that check finds clean.
#include "sim/images.h"

#include <doctest/doctest.h>

#include "sim/crash_runs.h"

using namespace pqblk::sim;

namespace {

void survives(const Subject& subject, std::uint64_t seeds, const CrashOptions& options) {
  const CrashReport report = crash_runs(subject, 1, seeds, options);
  CHECK_MESSAGE(report.ok(), report.failure);
  MESSAGE(subject.name << ": lives " << report.counts.lives << ", crashes " << report.counts.crashes
                       << ", steps " << report.counts.steps);
}

}  // namespace

TEST_CASE("raw images survive random crashes") { survives(raw_subject(24), 200, {}); }

TEST_CASE("qcow2 images survive random crashes") {
  survives(qcow2_subject({}), 200, {});
  survives(qcow2_subject({.cluster_bits = 14, .refcount_bits = 1}), 100, {});
}

TEST_CASE("sealed images survive random crashes") { survives(sealed_subject({}), 100, {}); }
