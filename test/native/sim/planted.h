// Planted faults: each is switched on, and some seed must catch it.
//
// Room test/sim. A harness that lets a planted fault pass proves nothing about the code without it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "sim/crash_runs.h"
#include "sim/scope.h"

namespace pqblk::sim {

struct PlantedFault {
  std::string name;
  std::function<void(bool on)> set;
  // Where the fault shows only under special conditions: another device, image or load. It replaces
  // the hunt's own.
  std::optional<Subject> subject;
  std::optional<CrashOptions> options;
  // When given, a small scope to be explored instead of random seeds.
  std::vector<std::vector<OpSpec>> programs;
  ScopeOptions scope;
};

struct Catch {
  std::string name;
  bool caught = false;
  std::uint64_t runs = 0;  // seeds or schedules it took
  std::string failure;     // what gave it away
};

// Every fault is set, hunted for at most `seeds` seeds, and cleared.
std::vector<Catch> hunt(const Subject& subject, const std::vector<PlantedFault>& faults,
                        std::uint64_t seeds, const CrashOptions& options);

}  // namespace pqblk::sim
