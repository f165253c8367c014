// Random crash runs: many seeds, each a chain of lives of one image.
//
// Room test/sim. A run creates an image and lives several lives: open (perhaps crashed in the
// middle of recovery), verify against the model, a random workload on several queues, then a power
// loss, a kill or a clean close. Further crash images are taken on the way; each gets a life of its
// own, which is verified, written to and crashed once more. The same seed gives the same run.
//
//   PQBLK_SIM_SEED=n    run that seed only
//   PQBLK_SIM_TRACE=1   print every event to stderr
#pragma once

#include <cstdint>
#include <string>

#include "sim/life.h"
#include "sim/subject.h"

namespace pqblk::sim {

struct CrashOptions {
  std::uint32_t generations = 4;        // lives in a row
  std::uint32_t branches = 2;           // further crash images per life, at most
  std::uint32_t operations = 40;        // at most, in a life
  std::uint32_t clients = 4;            // at most, at once
  std::uint32_t queues = 2;             // at most
  std::uint32_t fault_runs_one_in = 0;  // runs with EIO and ENOSPC (0: none)
  bool power_loss = true;
  bool kill = true;
  WorldOptions world;
};

struct RunCounts {
  std::uint64_t runs = 0, lives = 0, crashes = 0, steps = 0;
};

// One seed on a copy of `fresh` (fresh_image()). Empty when all was well, else what went wrong and
// how it came to it.
std::string crash_run(const Subject& subject, const Device& fresh, std::uint64_t seed,
                      const CrashOptions& options, RunCounts& counts);

struct CrashReport {
  std::string failure;     // of the first seed that failed, with the seed; empty: none did
  std::uint64_t seed = 0;  // that one
  std::uint64_t first = 0;
  RunCounts counts;
  bool ok() const { return failure.empty(); }
};

// Seeds first, first + 1, ... until one fails. PQBLK_SIM_SEED overrides them.
CrashReport crash_runs(const Subject& subject, std::uint64_t first, std::uint64_t count,
                       const CrashOptions& options);
// The same for at most `seconds`, beginning at a seed taken from the clock (for soak).
CrashReport crash_soak(const Subject& subject, std::uint32_t seconds, const CrashOptions& options);
// Says which seeds were run, in a line that the summary of all tests repeats.
void note_seeds(const std::string& name, const CrashReport& report);

}  // namespace pqblk::sim
