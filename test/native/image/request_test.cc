// Requests of any alignment and size against a flat model; cache modes; refusals; failed flushes.
#include <doctest/doctest.h>

#include "image/disk_harness.h"

namespace pqblk::image::test {
namespace {

struct Shape {
  std::uint32_t align, memory_align;
  std::uint64_t max_transfer;
  std::uint32_t queues;
};

// Byte ranges that do not overlap but often share blocks, so that read-modify-write of neighbours
// meets in flight.
std::vector<std::pair<std::uint64_t, std::uint64_t>> disjoint_ranges(std::mt19937_64& random,
                                                                     std::uint64_t size) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges;
  std::uint64_t at = random() % (size / 2);
  const std::size_t count = 1 + random() % 24;
  for (std::size_t i = 0; i < count && at < size; ++i) {
    const std::uint64_t kind = random() % 10;
    std::uint64_t length = kind < 6 ? 1 + random() % 700 : 1 + random() % 20000;
    if (kind == 9) length = 1 + random() % (3 * kMiB);
    if (random() % 4 == 0) length = align_up<std::uint64_t>(length, 4096);
    length = std::min(length, size - at);
    ranges.emplace_back(at, length);
    at += length + (random() % 2 == 0 ? 0 : random() % 3000);
    if (random() % 4 == 0) at = align_up<std::uint64_t>(at, 4096);
  }
  return ranges;
}

std::vector<std::uint8_t> random_bytes(std::mt19937_64& random, std::size_t size) {
  std::vector<std::uint8_t> out(size);
  for (auto& b : out) b = static_cast<std::uint8_t>(random());
  return out;
}

void check_against_model(const Shape& shape, std::uint64_t seed) {
  CAPTURE(shape.align);
  CAPTURE(shape.max_transfer);
  CAPTURE(seed);
  constexpr std::uint64_t kSize = 8 * kMiB + 512;
  const TempFile temp(kSize);
  Geometry geometry;
  geometry.request_align = shape.align;
  geometry.memory_align = shape.memory_align;
  geometry.max_transfer = shape.max_transfer;
  Bench bench(temp, geometry, shape.queues);
  std::vector<std::uint8_t> model(align_up<std::uint64_t>(kSize, shape.align), 0);
  std::mt19937_64 random(seed);

  for (int round = 0; round < 40; ++round) {
    Batch batch;
    std::deque<std::vector<std::uint8_t>> data;
    for (const auto& [at, length] : disjoint_ranges(random, kSize)) {
      const auto model_at = model.begin() + static_cast<std::ptrdiff_t>(at);
      switch (random() % 8) {
        case 0:
          batch.add(RequestType::write_zeroes, at, length).zero_flags = random() % 2;
          std::fill_n(model_at, length, std::uint8_t{0});
          break;
        case 1: {  // whole blocks inside are punched by raw, the rest stays
          batch.add(RequestType::discard, at, length);
          const std::uint64_t begin = align_up<std::uint64_t>(at, shape.align);
          const std::uint64_t end = align_down<std::uint64_t>(at + length, shape.align);
          if (begin < end) {
            std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(begin), end - begin,
                        std::uint8_t{0});
          }
          break;
        }
        default: {
          auto& bytes = data.emplace_back(random_bytes(random, length));
          Request& r = batch.add(RequestType::out, at, bytes, 1 + random() % 4);
          r.fua = random() % 8 == 0;
          std::copy(bytes.begin(), bytes.end(), model_at);
        }
      }
    }
    bench.run(batch);
    for (const Request& r : batch.requests())
      REQUIRE_MESSAGE(r.status == Status::ok, r.error.message());

    Batch reads;
    std::vector<std::uint8_t> all(kSize);
    reads.add(RequestType::in, 0, all, 5);
    const std::uint64_t at = random() % kSize;
    std::vector<std::uint8_t> some(1 + random() % (kSize - at));
    reads.add(RequestType::in, at, some, 3);
    bench.run(reads);
    REQUIRE(std::equal(all.begin(), all.end(), model.begin()));
    REQUIRE(std::equal(some.begin(), some.end(), model.begin() + static_cast<std::ptrdiff_t>(at)));
  }
  CHECK(bench.backend->violations == 0);
}

TEST_CASE("requests of any alignment do what a flat array would") {
  const Shape shapes[] = {
      {1, 1, 4 * kMiB, 1},   {512, 512, 64 * kKiB, 2},    {4096, 1, 1 * kMiB, 2},
      {4096, 4096, 4096, 3}, {4096, 4096, 512 * kKiB, 2},
  };
  std::uint64_t seed = 1;
  for (const Shape& shape : shapes) check_against_model(shape, seed++);
}

struct Small {
  TempFile temp{1 * kMiB};
  Geometry geometry{0, 4096, 1, 0, 64 * kKiB};
};

TEST_CASE("what is wrong with a request is told, and nothing runs") {
  Small s;
  Bench bench(s.temp, s.geometry, 1);
  const auto kind_of = [&](RequestType type, std::uint64_t offset, std::uint64_t length,
                           std::size_t memory) {
    Batch batch;
    std::vector<std::uint8_t> data(memory);
    Request& r = batch.add(type, offset, data);
    r.length = length;
    bench.run(batch);
    CHECK((r.status != Status::ok) == static_cast<bool>(r.error));
    return r.error.kind();
  };
  CHECK(kind_of(RequestType::in, 1 * kMiB, 1, 1) == Kind::out_of_range);
  CHECK(kind_of(RequestType::out, 1 * kMiB - 511, 512, 512) == Kind::out_of_range);
  CHECK(kind_of(RequestType::in, ~std::uint64_t{0} - 100, 512, 512) == Kind::out_of_range);
  CHECK(kind_of(RequestType::discard, 0, ~std::uint64_t{0}, 1) == Kind::out_of_range);
  CHECK(kind_of(RequestType::in, 0, 512, 511) == Kind::invalid_argument);
  CHECK(kind_of(RequestType::get_id, 0, 19, 19) == Kind::invalid_argument);
  CHECK(kind_of(static_cast<RequestType>(42), 0, 0, 1) == Kind::unsupported);
  CHECK(kind_of(RequestType::in, 1 * kMiB, 0, 0) == Kind::ok);
  CHECK(kind_of(RequestType::out, 1 * kMiB - 512, 512, 512) == Kind::ok);
  CHECK(bench.queues[0]->counters().snapshot().errors == 7);
}

TEST_CASE("a read-only disk reads, and refuses to change anything") {
  Small s;
  RequestServer::Settings settings;
  settings.read_only = true;
  Bench bench(s.temp, s.geometry, 1, settings);
  std::vector<std::uint8_t> data(4096);
  for (const auto type : {RequestType::out, RequestType::discard, RequestType::write_zeroes}) {
    Batch batch;
    CHECK(bench.run_one(batch.add(type, 0, data), batch).kind() == Kind::read_only);
  }
  Batch batch;
  batch.add(RequestType::in, 0, data);
  CHECK_FALSE(bench.run_one(batch.add(RequestType::flush, 0, 0), batch));
}

TEST_CASE("the id fills 20 bytes, and zeros follow") {
  Small s;
  RequestServer::Settings settings;
  settings.id = "a-serial";
  Bench bench(s.temp, s.geometry, 1, settings);
  Batch batch;
  std::vector<std::uint8_t> data(24, 0xEE);
  CHECK_FALSE(bench.run_one(batch.add(RequestType::get_id, 0, data, 2), batch));
  CHECK(std::string(reinterpret_cast<const char*>(data.data())) == "a-serial");
  CHECK(std::all_of(data.begin() + 8, data.end(), [](std::uint8_t b) { return b == 0; }));
}

TEST_CASE("cache modes decide about FUA and flush") {
  struct Expected {
    Cache cache;
    int fua_writes, flushes;  // of one plain write, one FUA write, one flush
  };
  for (const Expected& e : {Expected{Cache::none, 1, 1}, Expected{Cache::writeback, 1, 1},
                            Expected{Cache::writethrough, 2, 1}, Expected{Cache::unsafe, 0, 0}}) {
    Small s;
    RequestServer::Settings settings;
    settings.cache = e.cache;
    Bench bench(s.temp, s.geometry, 1, settings);
    std::vector<std::uint8_t> data(4096, 1);
    Batch batch;
    batch.add(RequestType::out, 0, data);
    batch.add(RequestType::out, 4096, data).fua = true;
    batch.add(RequestType::flush, 0, 0);
    bench.run(batch);
    CHECK(bench.backend->writes == 2);
    CHECK(bench.backend->fua_writes == e.fua_writes);
    CHECK(bench.backend->flushes == e.flushes);
  }
}

TEST_CASE("a large FUA write flushes once, not with every piece") {
  Small s;
  Bench bench(s.temp, s.geometry, 1);
  std::vector<std::uint8_t> data(1 * kMiB, 1);
  Batch batch;
  Request& r = batch.add(RequestType::out, 0, data);
  r.fua = true;
  CHECK_FALSE(bench.run_one(r, batch));
  CHECK(bench.backend->writes == 16);
  CHECK(bench.backend->fua_writes == 0);
  CHECK(bench.backend->flushes == 1);
}

TEST_CASE("after a failed flush nothing is written any more") {
  Small s;
  Bench bench(s.temp, s.geometry, 2);
  std::vector<std::uint8_t> data(4096, 1);
  bench.backend->fail_flush = true;
  Batch failing;
  CHECK(bench.run_one(failing.add(RequestType::flush, 0, 0), failing).kind() == Kind::io_error);
  bench.backend->fail_flush = false;
  for (const auto type :
       {RequestType::out, RequestType::discard, RequestType::write_zeroes, RequestType::flush}) {
    Batch batch;
    CHECK(bench.run_one(batch.add(type, 0, data), batch).kind() == Kind::io_error);
  }
  Batch batch;
  CHECK_FALSE(bench.run_one(batch.add(RequestType::in, 0, data), batch));
  CHECK(bench.backend->writes == 0);
}

TEST_CASE("more requests than may run at once wait, and all complete") {
  Small s;
  Bench bench(s.temp, s.geometry, 2);
  Batch batch;
  std::vector<std::vector<std::uint8_t>> buffers(3 * kRunningMax, std::vector<std::uint8_t>(512));
  for (std::uint32_t i = 0; i < buffers.size(); ++i) {
    batch.add(i % 2 == 0 ? RequestType::out : RequestType::in, i % 2048 * 512, buffers[i]);
  }
  bench.run(batch);
  for (const Request& r : batch.requests()) CHECK(r.status == Status::ok);
  CHECK(bench.backend->violations == 0);
}

TEST_CASE("paused queues keep requests, and go on where they stood") {
  Small s;
  Bench bench(s.temp, s.geometry, 1);
  bench.queues[0]->pause();
  Batch batch;
  std::vector<std::uint8_t> data(512);
  batch.add(RequestType::in, 0, data);
  REQUIRE(bench.queues[0]->submit(batch.list(0, 1)));
  bench.queues[0]->pause();  // a turn of the loop has passed: it was picked up, not run
  CHECK(batch.completed_count() == 0);
  bench.queues[0]->resume();
  batch.wait();
}

}  // namespace
}  // namespace pqblk::image::test
