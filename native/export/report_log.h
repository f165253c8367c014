// Lines for people about what went wrong, bounded in number: a guest or a client that fails as fast
// as it can ask must neither fill a journal nor hide behind its own noise a sector that does not
// open.
//
// Room export/. Damage (Kind::integrity, Kind::corrupt) has a budget of its own.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include "base/error.h"

namespace pqblk::exports {

// Of each budget: lines at once, and what comes back with time.
inline constexpr std::uint64_t kReportsAtOnce = 100;
inline constexpr std::uint64_t kReportEveryNs = 1'000'000'000;

class ReportLog {
 public:
  using Sink = std::function<void(const std::string&)>;
  using Clock = std::function<std::uint64_t()>;  // nanoseconds, never back
  // `sink` may be empty; it is called on any thread, perhaps on several at once.
  explicit ReportLog(Sink sink, Clock clock = {});

  void say(const std::string& text) { line(Kind::invalid_argument, text); }  // any thread
  void failed(const Error& error, const std::string& what) {                 // any thread
    line(error.kind(), what + ": " + error.to_string());
  }

 private:
  struct Budget {
    std::uint64_t lines = kReportsAtOnce, since_ns = 0, dropped = 0;
  };
  void line(Kind kind, const std::string& text);

  const Sink sink_;
  const Clock clock_;
  std::mutex mutex_;
  std::array<Budget, 2> budgets_;
};

}  // namespace pqblk::exports
