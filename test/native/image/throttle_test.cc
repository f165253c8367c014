// Limits of a disk: the buckets against a clock of the test's own, and a disk that holds requests
// back, lets them go, and closes.
#include "image/throttle.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <thread>
#include <vector>

#include "image/disk_harness.h"
#include "image/stats.h"

namespace pqblk::image::test {
namespace {

constexpr std::uint64_t kSecond = 1'000'000'000;
constexpr std::uint64_t kStart = 7'000 * kSecond;  // some time after boot

// Requests that one busy queue starts within `ns`.
std::uint64_t started_within(Throttle& throttle, std::uint64_t from, std::uint64_t ns,
                             std::uint64_t bytes) {
  std::uint64_t now = from, count = 0;
  for (;;) {
    now = std::max(now, throttle.reserve(bytes, now));
    if (now >= from + ns) return count;
    ++count;
  }
}

TEST_CASE("throttle: a rate, exactly, after a burst") {
  Throttle throttle;
  CHECK_FALSE(throttle.on());
  throttle.set({.iops_max = 1000, .iops_burst = 50}, kStart);
  CHECK(throttle.on());
  const std::uint64_t first = started_within(throttle, kStart, 10 * kSecond, 4096);
  CHECK(first >= 10'050);
  CHECK(first <= 10'051);
  // After a rest the burst is there again, and no more than it.
  const std::uint64_t again = started_within(throttle, kStart + 100 * kSecond, kSecond, 4096);
  CHECK(again >= 1050);
  CHECK(again <= 1051);
}

TEST_CASE("throttle: bytes; what is too large for the burst goes and is paid off") {
  Throttle throttle;
  throttle.set({.bps_max = 10 * kMiB, .bps_burst = kMiB}, kStart);
  CHECK(throttle.reserve(8 * kMiB, kStart) == kStart);
  const std::uint64_t next = throttle.reserve(4096, kStart);
  CHECK(next >= kStart + 7 * kSecond / 10 - 1000);
  CHECK(next <= kStart + 7 * kSecond / 10 + 1000);
  const std::uint64_t later = kStart + 100 * kSecond;
  const std::uint64_t count = started_within(throttle, later, 10 * kSecond, 64 * kKiB);
  CHECK(count >= 1600 + 16);
  CHECK(count <= 1600 + 17);
}

TEST_CASE("throttle: no debt is longer than a day, whatever was asked for") {
  Throttle throttle;
  throttle.set({.bps_max = 1}, kStart);
  for (int i = 0; i < 10; ++i) throttle.reserve(~std::uint64_t{0}, kStart);
  CHECK(throttle.reserve(0, kStart) == kStart + 24 * 3600 * kSecond);
}

TEST_CASE("throttle: the stricter of two limits holds, requests without bytes count as requests") {
  Throttle throttle;
  throttle.set({.iops_max = 1000, .bps_max = 4 * kMiB}, kStart);
  const std::uint64_t large = started_within(throttle, kStart, 10 * kSecond, 64 * kKiB);
  CHECK(large >= 640);
  CHECK(large <= 648);
  const std::uint64_t empty = started_within(throttle, kStart + 100 * kSecond, 10 * kSecond, 0);
  CHECK(empty >= 10'100);
  CHECK(empty <= 10'101);
}

TEST_CASE("throttle: busy queues take turns, also with one that was there long before") {
  Throttle throttle;
  throttle.set({.iops_max = 100}, kStart);
  std::array<std::uint64_t, 3> due{}, count{};
  std::uint64_t now = kStart;
  const auto run = [&](std::size_t active, std::uint64_t until) {
    for (std::size_t q = 0; q < active; ++q) {
      if (due[q] == 0) due[q] = throttle.reserve(4096, now);
    }
    for (;;) {
      const auto first = std::min_element(due.begin(), due.begin() + std::ptrdiff_t(active));
      now = std::max(now, *first);
      if (now >= until) return;
      ++count[static_cast<std::size_t>(first - due.begin())];
      *first = throttle.reserve(4096, now);
    }
  };
  run(1, kStart + kSecond);
  count = {};
  run(3, kStart + 31 * kSecond);
  for (const std::uint64_t n : count) {
    CHECK(n >= 999);
    CHECK(n <= 1001);
  }
}

TEST_CASE("throttle: other limits give no second burst and forgive debts") {
  Throttle throttle;
  throttle.set({.iops_max = 100, .iops_burst = 100}, kStart);
  CHECK(started_within(throttle, kStart, 1, 0) >= 100);
  throttle.set({.iops_max = 100, .iops_burst = 100}, kStart + 1);
  CHECK(started_within(throttle, kStart + 1, kSecond / 10, 0) <= 11);
  throttle.set({.iops_max = 1, .iops_burst = 1}, kStart + kSecond);
  for (int i = 0; i < 100; ++i) throttle.reserve(0, kStart + kSecond);  // 100 s of debt
  const std::uint64_t version = throttle.version();
  throttle.set({.iops_max = 1000}, kStart + kSecond);
  CHECK(throttle.version() != version);
  CHECK(throttle.reserve(0, kStart + kSecond) == kStart + kSecond);
  CHECK(throttle.limits() == RateLimits{.iops_max = 1000});
  throttle.lift();
  throttle.lift();
  throttle.restore();
  CHECK_FALSE(throttle.on());
  throttle.restore();
  CHECK(throttle.on());
  throttle.set({}, kStart);
  CHECK_FALSE(throttle.on());
}

TEST_CASE("throttle: a burst without its limit is refused") {
  CHECK(RateLimits{.iops_burst = 1}.check().kind() == Kind::invalid_argument);
  CHECK(RateLimits{.iops_max = 9, .bps_burst = 1}.check().kind() == Kind::invalid_argument);
  CHECK_FALSE(RateLimits{.iops_max = 9, .iops_burst = 1}.check());
}

TEST_CASE("latency buckets: each bound belongs to its own") {
  for (std::uint32_t i = 0; i < kLatencyBuckets; ++i) {
    LatencyCounters counters;
    const std::uint64_t bound = std::uint64_t{1} << (kLatencyFirstBits + i);
    counters.record(bound);
    counters.record(bound + 1);
    counters.record(bound / 2 + 1);
    const LatencyStats stats = counters.snapshot();
    const std::uint32_t last = kLatencyBuckets - 1;
    CHECK(stats.buckets[i] == (i == last ? 3 : 2));
    if (i != last) CHECK(stats.buckets[i + 1] == 1);
    CHECK(stats.sum_ns == 2 * bound + bound / 2 + 2);
  }
  LatencyCounters counters;
  counters.record(0);
  counters.record(~std::uint64_t{0});
  CHECK(counters.snapshot().buckets.front() == 1);
  CHECK(counters.snapshot().buckets.back() == 1);
}

// ---- on a disk ----

struct Held {
  explicit Held(std::uint32_t queues = 1) : temp(4 * kMiB, "/dev/shm") {
    OpenOptions options;
    options.path = temp.path();
    options.format = Format::raw;
    options.queues = queues;
    auto opened = Disk::open(std::move(options));
    REQUIRE_MESSAGE(opened, opened.error().to_string());
    disk = std::move(*opened);
  }
  std::uint64_t in_flight() const { return disk->queue_stats(0).in_flight; }
  // Reads, so many that at one a second they would take for ever.
  void submit_reads(Batch& batch, int count) {
    for (int i = 0; i < count; ++i) batch.add(RequestType::in, 0, data);
    disk->submit(0, batch.list(0, 1));
  }
  bool until_in_flight(std::uint64_t count) const {
    for (int i = 0; i < 20'000 && in_flight() != count; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return in_flight() == count;
  }

  const TempFile temp;
  std::unique_ptr<Disk> disk;
  std::vector<std::uint8_t> data = std::vector<std::uint8_t>(4096);
};

constexpr RateLimits kOneASecond{.iops_max = 1, .iops_burst = 1};

TEST_CASE("a disk's limits hold requests back, but no flush, and not its end") {
  Held held;
  CHECK_FALSE(held.disk->set_rate_limits(kOneASecond));
  Batch reads;
  held.submit_reads(reads, 200);
  Batch flush;
  flush.add(RequestType::flush, 0, 0);
  held.disk->submit(0, flush.list(0, 1));
  flush.wait();
  CHECK(flush.requests().front().status == Status::ok);
  const QueueStats stats = held.disk->queue_stats(0);
  CHECK(stats.in_flight >= 100);
  CHECK(stats.throttled >= 1);
  CHECK(stats.flushes == 1);
  CHECK(held.disk->resize(8 * kMiB).kind() == Kind::ok);  // which pauses the queue
  CHECK_FALSE(held.disk->close());
  reads.wait();
  for (const Request& r : reads.requests()) CHECK(r.status == Status::ok);
  CHECK(held.disk->queue_stats(0).in_flight == 0);
}

TEST_CASE("other limits reach those that wait") {
  Held held;
  CHECK_FALSE(held.disk->set_rate_limits(kOneASecond));
  Batch reads;
  held.submit_reads(reads, 200);
  REQUIRE(held.until_in_flight(198));
  SUBCASE("none") { CHECK_FALSE(held.disk->set_rate_limits({})); }
  SUBCASE("high ones") { CHECK_FALSE(held.disk->set_rate_limits({.iops_max = 100'000})); }
  SUBCASE("lifted for a while") {
    const Disk::Hurry hurry(*held.disk);
    CHECK(held.until_in_flight(0));
  }
  SUBCASE("a contradiction changes nothing") {
    CHECK(held.disk->set_rate_limits({.bps_burst = 1}).kind() == Kind::invalid_argument);
    CHECK(held.disk->rate_limits() == kOneASecond);
    CHECK_FALSE(held.disk->set_rate_limits({}));
  }
  reads.wait();
  for (const Request& r : reads.requests()) CHECK(r.status == Status::ok);
}

// Seconds that 1020 reads take where 20 go at once and 2000 a second after them.
double seconds_under_limits() {
  Held held;
  CHECK_FALSE(held.disk->set_rate_limits({.iops_max = 2000, .iops_burst = 20}));
  const auto begin = std::chrono::steady_clock::now();
  Batch reads;
  held.submit_reads(reads, 1020);
  reads.wait();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

TEST_CASE("a disk under limits is as fast as they say") {
  // A machine that does other things too may wake a sleeper late, now and then; the limits are to
  // blame for what happens every time. docs have the measured figure.
  constexpr int kAttempts = 5;
  double fastest = 0;
  for (int attempt = 0; attempt < kAttempts && (attempt == 0 || fastest > 5.0); ++attempt) {
    const double took = seconds_under_limits();
    CHECK(took >= 0.498);
    fastest = attempt == 0 ? took : std::min(fastest, took);
  }
  CHECK(fastest <= 5.0);
}

}  // namespace
}  // namespace pqblk::image::test
