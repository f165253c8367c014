#include "sim/planted.h"

namespace pqblk::sim {

std::vector<Catch> hunt(const Subject& subject, const std::vector<PlantedFault>& faults,
                        std::uint64_t seeds, const CrashOptions& options) {
  std::vector<Catch> catches;
  for (const PlantedFault& fault : faults) {
    const Subject& prey = fault.subject ? *fault.subject : subject;
    Catch result{.name = fault.name};
    fault.set(true);
    if (fault.programs.empty()) {
      CrashReport report = crash_runs(prey, 1, seeds, fault.options.value_or(options));
      result.runs = report.counts.runs;
      result.failure = std::move(report.failure);
    } else {
      ScopeReport report = explore(prey, fault.programs, fault.scope);
      result.runs = report.schedules;
      result.failure = std::move(report.failure);
    }
    fault.set(false);
    result.caught = !result.failure.empty();
    catches.push_back(std::move(result));
  }
  return catches;
}

}  // namespace pqblk::sim
