// What a server says of failures: bounded, and damage is never hidden behind other noise.
#include "export/report_log.h"

#include <doctest/doctest.h>

#include <vector>

namespace pqblk::exports::test {

TEST_CASE("reports are bounded, come back with time, and damage has its own") {
  std::vector<std::string> lines;
  std::uint64_t now = 7;
  ReportLog log([&](const std::string& line) { lines.push_back(line); }, [&] { return now; });
  const Error noise(Kind::out_of_range, "beyond the end");
  const Error damage(Kind::integrity, "the tag does not hold");
  for (int i = 0; i < 5000; ++i) log.failed(noise, "read");
  CHECK(lines.size() == kReportsAtOnce);
  log.say("a second front-end was turned away");
  CHECK(lines.size() == kReportsAtOnce);

  log.failed(damage, "read");
  REQUIRE(lines.size() == kReportsAtOnce + 1);
  CHECK(lines.back() == "read: " + damage.to_string());

  now += 3 * kReportEveryNs;
  for (int i = 0; i < 10; ++i) log.failed(noise, "read");
  REQUIRE(lines.size() == kReportsAtOnce + 4);
  CHECK(lines[kReportsAtOnce + 1] ==
        "read: " + noise.to_string() + " (4901 more were not reported)");
  now += 1000 * kReportEveryNs;  // no more than at first
  lines.clear();
  for (int i = 0; i < 5000; ++i) log.failed(noise, "read");
  CHECK(lines.size() == kReportsAtOnce);
  ReportLog silent({});
  silent.failed(damage, "read");
}

}  // namespace pqblk::exports::test
