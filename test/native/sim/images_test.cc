// Raw, qcow2 and sealed images under random crashes: no sector older than its last flush, no mix
// beyond what the device itself does, no nonce twice, and a structure that check finds clean.
#include "sim/images.h"

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

#include "sim/crash_runs.h"

using namespace pqblk::sim;

namespace {

// PQBLK_SIM_RUNS multiplies the seeds; PQBLK_SOAK goes on until its seconds are over.
std::uint64_t times() {
  const char* value = std::getenv("PQBLK_SIM_RUNS");
  return value != nullptr ? std::strtoull(value, nullptr, 0) : 1;
}

void survives(const Subject& subject, std::uint64_t seeds, const CrashOptions& options) {
  const char* soak = std::getenv("PQBLK_SOAK");
  const char* seconds = std::getenv("PQBLK_SOAK_SECONDS");
  const bool long_run = soak != nullptr && *soak == '1' && seconds != nullptr;
  const CrashReport report =
      long_run ? crash_soak(subject, static_cast<std::uint32_t>(std::atoi(seconds)), options)
               : crash_runs(subject, 1, seeds * times(), options);
  CHECK_MESSAGE(report.ok(), report.failure);
  MESSAGE(subject.name << ": runs " << report.counts.runs << ", lives " << report.counts.lives
                       << ", crashes " << report.counts.crashes << ", steps "
                       << report.counts.steps);
}

}  // namespace

TEST_CASE("raw images survive random crashes") { survives(raw_subject(24), 200, {}); }

TEST_CASE("qcow2 images survive random crashes") {
  survives(qcow2_subject({}), 200, {});
  survives(qcow2_subject({.cluster_bits = 14, .refcount_bits = 1}), 100, {});
  survives(qcow2_subject({.cluster_bits = 16, .extended_l2 = true}), 100, {});
}

TEST_CASE("sealed images survive random crashes, data through the log (O2)") {
  survives(sealed_subject({}), 100, {});
}

TEST_CASE("sealed images survive random crashes, overwritten in place (O1)") {
  survives(sealed_subject({.file = kSafeDevice}), 100, {});
}

TEST_CASE("sealed images survive in other shapes") {
  survives(sealed_subject({.cluster_bits = 12, .sectors = 24}), 50, {});
  survives(sealed_subject({.cluster_bits = 16, .suite = pqblk::crypto::Suite::chacha20_poly1305}),
           50, {});
  survives(sealed_subject({.overlay_sectors = 16}), 50, {});
  survives(sealed_subject({.session_sectors = 20}), 50, {});
  survives(sealed_subject({.backed = true}), 50, {});
  survives(sealed_subject({.cluster_bits = 13, .file = kSafeDevice, .overlay_sectors = 16}), 50,
           {});
}

TEST_CASE("sealed images survive failing operations") {
  survives(sealed_subject({}), 100, {.fault_runs_one_in = 2});
  survives(sealed_subject({.file = kSafeDevice}), 50, {.fault_runs_one_in = 2});
}
