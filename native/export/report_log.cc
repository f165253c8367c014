#include "export/report_log.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace pqblk::exports {
namespace {

std::uint64_t steady_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

}  // namespace

ReportLog::ReportLog(Sink sink, Clock clock)
    : sink_(std::move(sink)), clock_(clock ? std::move(clock) : Clock(steady_ns)) {
  for (Budget& budget : budgets_) budget.since_ns = clock_();
}

void ReportLog::line(Kind kind, const std::string& text) {
  if (!sink_) return;
  const bool damage = kind == Kind::integrity || kind == Kind::corrupt;
  std::uint64_t dropped = 0;
  {
    const std::lock_guard guard(mutex_);
    Budget& budget = budgets_[damage ? 1 : 0];
    const std::uint64_t earned = (clock_() - budget.since_ns) / kReportEveryNs;
    budget.since_ns += earned * kReportEveryNs;
    budget.lines = std::min(kReportsAtOnce, budget.lines + earned);
    if (budget.lines == 0) {
      ++budget.dropped;
      return;
    }
    --budget.lines;
    dropped = std::exchange(budget.dropped, 0);
  }
  sink_(dropped == 0 ? text : text + " (" + std::to_string(dropped) + " more were not reported)");
}

}  // namespace pqblk::exports
