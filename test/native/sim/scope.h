// Exhaustive small scope: every short program, every schedule up to a bound, crashed at every step,
// with every subset of unflushed writes, and crashed again inside recovery.
//
// Room test/sim. A schedule is enumerated by its deviations from the plain order of events. At
// every step that changed the disk or what the guest knows, all images that a power loss or a kill
// could leave are made (scope options bound their number), and each that was not seen before is
// opened, verified against the model, and itself crashed at every step of its recovery.
//
// On a failure the report names program, schedule, step and image; with PQBLK_SIM_TRACE=1 exactly
// that path is run once more with every event on stderr.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sim/life.h"
#include "sim/subject.h"

namespace pqblk::sim {

struct ScopeOptions {
  std::uint32_t clients = 2;
  std::uint32_t queues = 1;
  std::uint32_t schedule_deviations = 1;
  std::uint32_t mix_deviations = 0;     // reads that meet writes in flight
  std::uint64_t schedules_max = 1'000;  // per program
  std::uint64_t images_max = 128;       // per crash point and kind; beyond it they are sampled
  std::uint32_t recovery_crashes = 1;   // crashes inside recovery, one within the other
  std::uint64_t recovery_images_max = 32;
  bool power_loss = true;
  bool kill = true;
  // Run after a recovery; then everything unflushed is lost and the image is verified once more.
  std::vector<OpSpec> epilogue;
  std::uint64_t recoveries_max = ~std::uint64_t{0};  // of one explore()
  WorldOptions world{.ready_first = true};
};

struct ScopeReport {
  std::string failure;  // empty: none
  std::uint64_t programs = 0, schedules = 0, points = 0, images = 0, repeated = 0, recoveries = 0;
  bool complete = true;  // nothing was cut short or sampled
  bool ok() const { return failure.empty(); }
  std::string text() const;  // the counts, for people
};

ScopeReport explore(const Subject& subject, const std::vector<std::vector<OpSpec>>& programs,
                    const ScopeOptions& options);

// All programs of `length` operations over an alphabet.
struct ProgramSpace {
  std::vector<OpSpec> alphabet;
  std::uint32_t length = 3;
  std::uint64_t size() const;
  std::vector<OpSpec> program(std::uint64_t index) const;  // 0 <= index < size()
  // All of them when there are at most `most`, else that many, spread evenly from `seed`.
  std::vector<std::vector<OpSpec>> some(std::uint64_t most, std::uint64_t seed) const;
};
std::string program_text(const std::vector<OpSpec>& program);

}  // namespace pqblk::sim
