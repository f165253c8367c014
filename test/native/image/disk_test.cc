// The disk as a whole: threads, closing, resizing, extents, the bench inside.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <thread>
#include <vector>

#include "image/bench.h"
#include "image/disk_harness.h"

namespace pqblk::image::test {
namespace {

OpenOptions raw_options(const TempFile& temp, std::uint32_t queues = 1) {
  OpenOptions options;
  options.path = temp.path();
  options.format = Format::raw;
  options.queues = queues;
  return options;
}

std::unique_ptr<Disk> open_raw_disk(const TempFile& temp, std::uint32_t queues = 1) {
  auto disk = Disk::open(raw_options(temp, queues));
  REQUIRE_MESSAGE(disk, disk.error().to_string());
  return std::move(*disk);
}

TEST_CASE("every request completes exactly once while several threads submit and one closes") {
  for (int round = 0; round < 20; ++round) {
    const TempFile temp(4 * kMiB);
    auto disk = open_raw_disk(temp, 2);
    std::deque<Batch> batches(3);
    std::vector<std::thread> threads;
    std::vector<std::uint8_t> data(4096);
    std::atomic<int> ready{0};
    for (std::size_t t = 0; t < batches.size(); ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < 200; ++i) batches[t].add(RequestType::in, 4096, data);
        ++ready;
        for (Request& r : batches[t].requests()) disk->submit(t % 2, &r);
        batches[t].wait();
      });
    }
    while (ready != 3) std::this_thread::yield();
    if (round % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(round * 20));
    CHECK_FALSE(disk->close());
    for (auto& thread : threads) thread.join();
    for (Batch& batch : batches) {
      for (const Request& r : batch.requests()) {
        CHECK((r.status == Status::ok || r.error.kind() == Kind::closed));
      }
    }
    CHECK_FALSE(disk->close());  // again: the same answer
    CHECK(disk->resize(8 * kMiB).kind() == Kind::closed);
    CHECK_FALSE(disk->extent(0, 512));
  }
}

TEST_CASE("a refused list comes back whole and in order") {
  const TempFile temp(1 * kMiB);
  auto disk = open_raw_disk(temp);
  CHECK_FALSE(disk->close());
  Batch batch;
  std::vector<std::uint8_t> data(512);
  for (int i = 0; i < 5; ++i) batch.add(RequestType::in, 0, data);
  disk->submit(0, batch.list(0, 1));
  batch.wait();
  for (const Request& r : batch.requests()) CHECK(r.error.kind() == Kind::closed);
}

TEST_CASE("a second opener is told who holds the disk; readers share") {
  const TempFile temp(1 * kMiB);
  {
    auto disk = open_raw_disk(temp);
    OpenOptions second = raw_options(temp);
    auto refused = Disk::open(std::move(second));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind() == Kind::locked);
  }
  OpenOptions reader = raw_options(temp);
  reader.read_only = true;
  auto one = Disk::open(reader.path.empty() ? OpenOptions{} : raw_options(temp));
  REQUIRE(one);
  CHECK_FALSE((*one)->close());
  OpenOptions a = raw_options(temp), b = raw_options(temp);
  a.read_only = b.read_only = true;
  auto first = Disk::open(std::move(a));
  auto second = Disk::open(std::move(b));
  CHECK(first);
  CHECK(second);
}

TEST_CASE("bad options are refused by name") {
  const TempFile temp(1 * kMiB);
  for (const std::uint32_t queues : {0U, kMaxQueues + 1}) {
    auto disk = Disk::open(raw_options(temp, queues));
    REQUIRE_FALSE(disk);
    CHECK(disk.error().kind() == Kind::invalid_argument);
  }
  OpenOptions missing = raw_options(temp);
  missing.path += ".not-there";
  auto disk = Disk::open(std::move(missing));
  REQUIRE_FALSE(disk);
  CHECK(disk.error().kind() == Kind::not_found);
}

TEST_CASE("growing a disk while requests come") {
  const TempFile temp(1 * kMiB);
  auto disk = open_raw_disk(temp, 2);
  std::atomic<bool> stop{false};
  std::thread reader([&] {
    std::vector<std::uint8_t> data(4096);
    while (!stop) {
      Batch batch;
      for (int i = 0; i < 16; ++i) batch.add(RequestType::in, 0, data);
      for (std::size_t q = 0; q < 2; ++q) {
        disk->submit(static_cast<std::uint32_t>(q), batch.list(q, 2));
      }
      batch.wait();
      for (const Request& r : batch.requests()) CHECK(r.status == Status::ok);
    }
  });
  for (std::uint64_t size = 2; size <= 16; ++size) CHECK_FALSE(disk->resize(size * kMiB));
  stop = true;
  reader.join();
  CHECK(disk->size() == 16 * kMiB);
  CHECK(disk->resize(1 * kMiB).kind() == Kind::invalid_argument);
  CHECK(disk->resize(16 * kMiB + 100).kind() == Kind::invalid_argument);
  std::vector<std::uint8_t> data(512, 7);
  Batch batch;
  batch.add(RequestType::out, 16 * kMiB - 512, data);
  disk->submit(0, batch.list(0, 1));
  batch.wait();
  CHECK(batch.requests()[0].status == Status::ok);
}

TEST_CASE("extents tell holes from data, at any offset") {
  const TempFile temp(8 * kMiB);
  auto disk = open_raw_disk(temp);
  std::vector<std::uint8_t> data(64 * kKiB, 1);
  Batch batch;
  batch.add(RequestType::out, 4 * kMiB, data);
  disk->submit(0, batch.list(0, 1));
  batch.wait();
  auto hole = disk->extent(100, 8 * kMiB - 100);
  REQUIRE(hole);
  CHECK(hole->kind == ExtentKind::hole);
  CHECK(hole->length == 4 * kMiB - 100);
  auto found = disk->extent(4 * kMiB + 1000, 1 * kMiB);
  REQUIRE(found);
  CHECK(found->kind == ExtentKind::data);
  CHECK(found->length == 64 * kKiB - 1000);
  CHECK(disk->extent(8 * kMiB - 1, 2).error().kind() == Kind::out_of_range);
}

TEST_CASE("what was deferred runs once for a batch, on the queue's thread") {
  const TempFile temp(1 * kMiB);
  auto disk = open_raw_disk(temp);
  struct Consumer {
    Disk* disk;
    Deferred deferred;
    std::atomic<int> completions{0}, runs{0};
  } consumer{disk.get(), {}};
  consumer.deferred.context = &consumer;
  consumer.deferred.run = [](Deferred& d) { ++static_cast<Consumer*>(d.context)->runs; };
  std::vector<std::uint8_t> data(512);
  const iovec v{data.data(), data.size()};
  std::vector<Request> requests(64);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Request& r = requests[i];
    r.length = 512;
    r.iov = &v;
    r.iov_count = 1;
    r.context = &consumer;
    r.next = i + 1 < requests.size() ? &requests[i + 1] : nullptr;
    r.complete = [](Request& done) {
      auto& c = *static_cast<Consumer*>(done.context);
      c.disk->defer(0, c.deferred);
      ++c.completions;
    };
  }
  disk->submit(0, requests.data());
  while (consumer.completions != 64 || consumer.runs == 0) std::this_thread::yield();
  CHECK_FALSE(disk->close());
  CHECK(consumer.runs <= 64);
}

TEST_CASE("the bench counts what the queues count, and stops when told") {
  const TempFile temp(4 * kMiB, "/dev/shm");
  auto disk = open_raw_disk(temp, 2);
  BenchSpec spec;
  spec.pattern = Pattern::randrw;
  spec.iodepth = 8;
  spec.size = 0;
  auto result = run_bench(*disk, spec);
  REQUIRE(result);
  CHECK(result->read.ops + result->write.ops == 1024);
  CHECK(result->read.latency.count() == result->read.ops);
  std::uint64_t reads = 0, writes = 0;
  for (std::uint32_t q = 0; q < 2; ++q) {
    reads += disk->queue_stats(q).reads;
    writes += disk->queue_stats(q).writes;
  }
  CHECK(reads == result->read.ops);
  CHECK(writes == result->write.ops);

  spec.runtime_ms = 60'000;
  spec.progress = [](std::uint64_t, std::uint64_t) { return false; };
  CHECK(run_bench(*disk, spec));
  spec.block_size = 8 * kMiB;
  CHECK(run_bench(*disk, spec).error().kind() == Kind::invalid_argument);
}

TEST_CASE("the bench flushes after each write, when asked to") {
  const TempFile temp(4 * kMiB, "/dev/shm");
  auto disk = open_raw_disk(temp, 1);
  BenchSpec spec;
  spec.pattern = Pattern::randwrite;
  spec.iodepth = 1;
  spec.flush_every = 1;
  auto result = run_bench(*disk, spec);
  REQUIRE(result);
  CHECK(result->write.ops == 1024);
  CHECK(result->flush.ops == 1023);  // none after the last
  CHECK(result->flush.bytes == 0);
  CHECK(disk->queue_stats(0).flushes == 1023);
  spec.flush_every = 4;
  result = run_bench(*disk, spec);
  REQUIRE(result);
  CHECK(result->flush.ops == 255);
}

TEST_CASE("the bench with a stride touches one block of each place, on every queue") {
  const TempFile temp(4 * kMiB, "/dev/shm");
  auto disk = open_raw_disk(temp, 2);
  BenchSpec spec;
  spec.pattern = Pattern::write;
  spec.stride = 64 * kKiB;
  auto result = run_bench(*disk, spec);
  REQUIRE(result);
  CHECK(result->write.ops == 64);
  spec.stride = 2048;
  CHECK(run_bench(*disk, spec).error().kind() == Kind::invalid_argument);
  spec.stride = 4 * kMiB;  // one place for two queues
  CHECK(run_bench(*disk, spec).error().kind() == Kind::invalid_argument);
  CHECK_FALSE(disk->close());
  std::ifstream file(temp.path(), std::ios::binary);
  const std::vector<char> content{std::istreambuf_iterator<char>(file), {}};
  REQUIRE(content.size() == 4 * kMiB);
  for (std::size_t at = 0; at < content.size(); at += 4096) {
    const bool zero = std::all_of(content.begin() + static_cast<std::ptrdiff_t>(at),
                                  content.begin() + static_cast<std::ptrdiff_t>(at + 4096),
                                  [](char byte) { return byte == 0; });
    CHECK(zero == (at % (64 * kKiB) != 0));
  }
}

TEST_CASE("latency percentiles are within two percent of the sorted list") {
  LatencyHistogram histogram;
  std::mt19937_64 random(7);
  std::vector<std::uint64_t> values;
  for (int i = 0; i < 100'000; ++i) {
    values.push_back(random() % (std::uint64_t{1} << (random() % 34)));
    histogram.record(values.back());
  }
  std::sort(values.begin(), values.end());
  for (const double p : {1.0, 50.0, 90.0, 99.0, 99.9, 100.0}) {
    const auto rank = static_cast<std::size_t>(p / 100.0 * 100'000 + 0.5);
    const auto exact = static_cast<double>(values[std::max<std::size_t>(rank, 1) - 1]);
    const auto found = static_cast<double>(histogram.percentile_ns(p));
    CHECK(found >= exact);
    CHECK(found <= exact * 1.02 + 1);
  }
  CHECK(histogram.min_ns() == values.front());
  CHECK(histogram.max_ns() == values.back());
}

}  // namespace
}  // namespace pqblk::image::test
