// Queues: batches against a model, every way a request can be wrong, depth, the descriptor, several
// threads, and closing with requests in flight.

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "cabi/cabi_lab.h"
#include "effort.h"

using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint64_t kMiB = 1024 * 1024;
constexpr std::uint64_t kDiskBytes = 4 * kMiB;

struct Planned {
  pqblk_request request;
  std::vector<std::uint8_t> data;
  std::vector<iovec> pieces;
};

// One round: requests that do not overlap, each in a stripe of its own, so that their order is
// free.
std::vector<Planned> plan(std::mt19937_64& random, std::uint64_t size, std::uint32_t stripes) {
  static constexpr std::uint32_t kTypes[] = {PQBLK_READ, PQBLK_WRITE, PQBLK_WRITE,
                                             PQBLK_WRITE_ZEROES, PQBLK_FLUSH};
  std::vector<Planned> out(stripes);
  const std::uint64_t stripe = size / stripes;
  for (std::uint32_t i = 0; i < stripes; ++i) {
    Planned& p = out[i];
    const std::uint64_t length = 1 + random() % (stripe / 2);
    const std::uint64_t offset = i * stripe + random() % (stripe - length);
    p.request = request(kTypes[random() % std::size(kTypes)], nullptr, offset, i);
    if (p.request.type == PQBLK_READ || p.request.type == PQBLK_WRITE) {
      p.data = noise(length, random());
      const std::size_t count = 1 + random() % 9;  // more and fewer than a slot holds itself
      std::size_t at = 0;
      for (std::size_t n = 0; n < count; ++n) {
        const std::size_t take = n + 1 == count ? length - at : (length - at) / 3;
        p.pieces.push_back({p.data.data() + at, take});
        at += take;
      }
      p.request.iov = p.pieces.data();
      p.request.iov_count = static_cast<std::uint32_t>(count);
      if (p.request.type == PQBLK_WRITE && random() % 4 == 0) p.request.flags = PQBLK_FUA;
    } else if (p.request.type == PQBLK_WRITE_ZEROES) {
      p.request.length = length;
      p.request.flags = static_cast<std::uint32_t>(random() % 4);
    } else {
      p.request.offset = 0;
    }
  }
  return out;
}

void apply(const Planned& p, std::vector<std::uint8_t>& model) {
  const std::uint64_t at = p.request.offset;
  if (p.request.type == PQBLK_WRITE) std::copy(p.data.begin(), p.data.end(), model.begin() + at);
  if (p.request.type == PQBLK_WRITE_ZEROES) {
    std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(at), p.request.length, 0);
  }
  if (p.request.type == PQBLK_READ) {
    CHECK(std::memcmp(p.data.data(), model.data() + at, p.data.size()) == 0);
  }
}

}  // namespace

TEST_CASE("batches of every kind leave what a plain buffer holds") {
  for (const std::uint32_t format : {PQBLK_RAW, PQBLK_QCOW2, PQBLK_SEALED}) {
    INFO(format_name(format));
    const DiskFile file(format, kDiskBytes);
    std::vector<std::uint8_t> model(kDiskBytes);
    pqblk_disk* disk = file.open(2);
    pqblk_queue* queues[2] = {};
    for (std::uint32_t i = 0; i < 2; ++i) {
      REQUIRE(pqblk_queue_new(disk, i, 16, &queues[i], nullptr) == PQBLK_OK);
    }
    std::mt19937_64 random(format);
    for (std::uint64_t round = 0; round < effort(40) + 4; ++round) {
      auto planned = plan(random, kDiskBytes, 16);
      std::vector<pqblk_request> batch;
      for (const Planned& p : planned) batch.push_back(p.request);
      pqblk_queue* queue = queues[round % 2];
      REQUIRE(pqblk_submit(queue, batch.data(), 16) == 16);
      std::set<std::uint64_t> seen;
      for (const pqblk_completion& c : fetch(queue, 16)) {
        CHECK(c.kind == PQBLK_OK);
        CHECK(seen.insert(c.cookie).second);
      }
      for (const Planned& p : planned) apply(p, model);
    }
    for (pqblk_queue* queue : queues) pqblk_queue_free(queue);
    REQUIRE(pqblk_close(disk, nullptr) == PQBLK_OK);
    CHECK(file.content() == model);
  }
}

TEST_CASE("what is wrong with a request is told by its completion, and why by its error") {
  const DiskFile file(PQBLK_RAW, kMiB);
  pqblk_disk* disk = file.open();
  pqblk_queue* queue = nullptr;
  REQUIRE(pqblk_queue_new(disk, 0, 32, &queue, nullptr) == PQBLK_OK);
  std::uint8_t byte = 0;
  const iovec one{&byte, 1};
  std::vector<pqblk_request> batch;
  std::map<std::uint64_t, int> expected;
  const auto add = [&](int kind, pqblk_request r) {
    r.cookie = batch.size();
    expected[r.cookie] = kind;
    batch.push_back(r);
  };
  const auto changed = [&](std::uint32_t type, auto change) {
    pqblk_request r = request(type, type <= PQBLK_WRITE ? &one : nullptr, 0, 0);
    change(r);
    return r;
  };
  add(PQBLK_OK, changed(PQBLK_READ, [](auto&) {}));
  add(PQBLK_OUT_OF_RANGE, changed(PQBLK_READ, [](auto& r) { r.offset = kMiB; }));
  add(PQBLK_OUT_OF_RANGE, changed(PQBLK_DISCARD, [](auto& r) { r.length = UINT64_MAX; }));
  add(PQBLK_UNSUPPORTED, changed(8, [](auto&) {}));  // virtio's GET_ID
  add(PQBLK_UNSUPPORTED, changed(77, [](auto&) {}));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_READ, [](auto& r) { r.flags = PQBLK_FUA; }));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_WRITE, [](auto& r) { r.flags = PQBLK_UNMAP; }));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_WRITE_ZEROES, [](auto& r) { r.flags = 8; }));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_READ, [](auto& r) { r.length = 2; }));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_READ, [](auto& r) { r.iov_count = 1025; }));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_READ, [](auto& r) { r.iov = nullptr; }));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_FLUSH, [&](auto& r) {
        r.iov = &one;
        r.iov_count = 1;
      }));
  add(PQBLK_INVALID_ARGUMENT, changed(PQBLK_FLUSH, [](auto& r) { r.size += 8; }));
  add(PQBLK_OK, changed(PQBLK_FLUSH, [](auto&) {}));

  std::vector<pqblk_error> errors(batch.size(), pqblk_error PQBLK_ERROR_INIT);
  for (std::size_t i = 0; i < batch.size(); ++i) batch[i].error = &errors[i];
  const auto count = static_cast<std::uint32_t>(batch.size());
  REQUIRE(pqblk_submit(queue, batch.data(), count) == static_cast<int>(count));
  for (const pqblk_completion& c : fetch(queue, count)) {
    INFO(c.cookie);
    CHECK(c.kind == expected[c.cookie]);
    CHECK(errors[c.cookie].kind == c.kind);
    CHECK((errors[c.cookie].message[0] != '\0') == (c.kind != PQBLK_OK));
  }
  pqblk_queue_free(queue);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
}

TEST_CASE("a queue takes what its depth allows, and has room again once it is fetched") {
  const DiskFile file(PQBLK_RAW, kMiB);
  pqblk_disk* disk = file.open();
  pqblk_queue* queue = nullptr;
  REQUIRE(pqblk_queue_new(disk, 0, 4, &queue, nullptr) == PQBLK_OK);
  std::array<std::uint8_t, 512> memory;
  const iovec iov{memory.data(), memory.size()};
  const std::vector<pqblk_request> batch(6, request(PQBLK_READ, &iov, 0, 5));
  CHECK(pqblk_submit(queue, batch.data(), 6) == 4);
  CHECK(pqblk_submit(queue, batch.data(), 6) == 0);
  REQUIRE(readable(pqblk_queue_fd(queue), 60'000));
  pqblk_completion one = PQBLK_COMPLETION_INIT;
  for (int i = 0; i < 4; ++i) {  // one at a time: the descriptor tells of the rest
    REQUIRE(readable(pqblk_queue_fd(queue), 60'000));
    CHECK(pqblk_poll(queue, &one, 1) == 1);
    CHECK(one.cookie == 5);
    CHECK(one.size == sizeof one);
  }
  CHECK(pqblk_poll(queue, &one, 1) == 0);
  CHECK_FALSE(readable(pqblk_queue_fd(queue), 0));
  CHECK(pqblk_submit(queue, batch.data(), 1) == 1);
  CHECK(fetch(queue, 1)[0].kind == PQBLK_OK);
  CHECK(pqblk_submit(queue, nullptr, 0) == 0);
  CHECK(pqblk_submit(queue, nullptr, 1) == -PQBLK_INVALID_ARGUMENT);
  CHECK(pqblk_poll(queue, nullptr, 1) == -PQBLK_INVALID_ARGUMENT);
  CHECK(pqblk_poll(queue, nullptr, 0) == 0);
  pqblk_queue_free(queue);
  pqblk_queue_free(nullptr);
  CHECK(pqblk_queue_new(disk, 1, 4, &queue, nullptr) == PQBLK_NOT_FOUND);
  CHECK(pqblk_queue_new(disk, 0, 0, &queue, nullptr) == PQBLK_INVALID_ARGUMENT);
  CHECK(pqblk_queue_new(disk, 0, 65537, &queue, nullptr) == PQBLK_INVALID_ARGUMENT);
  CHECK(queue == nullptr);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
}

TEST_CASE("threads with queues of their own, on shared engine queues, do not meet") {
  const DiskFile file(PQBLK_RAW, kDiskBytes);
  pqblk_disk* disk = file.open(2);
  constexpr std::uint32_t kThreads = 4, kDepth = 8, kBlock = 4096;
  constexpr std::uint64_t kShare = kDiskBytes / kThreads;
  const std::uint64_t rounds = effort(400) + 20;
  std::vector<std::uint8_t> model(kDiskBytes);
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([=, &model] {
      pqblk_queue* queue = nullptr;
      REQUIRE(pqblk_queue_new(disk, t % 2, kDepth, &queue, nullptr) == PQBLK_OK);
      std::mt19937_64 random(t);
      for (std::uint64_t round = 0; round < rounds; ++round) {
        std::vector<std::vector<std::uint8_t>> data;
        std::vector<iovec> iov(kDepth);
        std::vector<pqblk_request> batch;
        const std::uint64_t first = random() % (kShare / kBlock - kDepth);
        for (std::uint32_t i = 0; i < kDepth; ++i) {
          data.push_back(noise(kBlock, random()));
          iov[i] = {data[i].data(), kBlock};
          const std::uint64_t at = t * kShare + (first + i) * kBlock;
          batch.push_back(request(PQBLK_WRITE, &iov[i], at, i));
          std::copy(data[i].begin(), data[i].end(), model.begin() + static_cast<long>(at));
        }
        REQUIRE(pqblk_submit(queue, batch.data(), kDepth) == kDepth);
        for (const auto& c : fetch(queue, kDepth)) CHECK(c.kind == PQBLK_OK);
      }
      pqblk_queue_free(queue);
    });
  }
  for (std::thread& thread : threads) thread.join();
  REQUIRE(pqblk_close(disk, nullptr) == PQBLK_OK);
  CHECK(file.content() == model);
}

TEST_CASE("a queue that is freed with requests in flight waits for them and writes nothing later") {
  const DiskFile file(PQBLK_SEALED, kDiskBytes);
  pqblk_disk* disk = file.open();
  for (std::uint64_t round = 0; round < effort(100) + 10; ++round) {
    pqblk_queue* queue = nullptr;
    REQUIRE(pqblk_queue_new(disk, 0, 64, &queue, nullptr) == PQBLK_OK);
    auto memory = std::make_unique<std::array<std::uint8_t, 8192>>();
    auto why = std::make_unique<pqblk_error>(pqblk_error PQBLK_ERROR_INIT);
    const iovec iov{memory->data(), memory->size()};
    std::vector<pqblk_request> batch(64, request(PQBLK_READ, &iov, 0, 0));
    for (pqblk_request& r : batch) r.error = why.get();
    const std::uint32_t count = 1 + round % 64;
    CHECK(pqblk_submit(queue, batch.data(), count) == static_cast<int>(count));
    why.reset();  // nobody will fetch
    pqblk_queue_free(queue);
    memory.reset();
  }
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
}

TEST_CASE("closing a disk completes what was submitted and refuses what comes later") {
  const DiskFile file(PQBLK_SEALED, kDiskBytes);
  pqblk_disk* disk = file.open();
  pqblk_queue* queue = nullptr;
  REQUIRE(pqblk_queue_new(disk, 0, 256, &queue, nullptr) == PQBLK_OK);
  std::vector<std::uint8_t> data = noise(65536, 3);
  const iovec iov{data.data(), data.size()};
  std::vector<pqblk_request> batch;
  for (std::uint64_t i = 0; i < 64; ++i) {
    batch.push_back(request(PQBLK_WRITE, &iov, i * data.size(), i));
  }
  REQUIRE(pqblk_submit(queue, batch.data(), 64) == 64);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
  for (const auto& c : fetch(queue, 64)) CHECK(c.kind == PQBLK_OK);
  pqblk_error why = PQBLK_ERROR_INIT;
  batch[0].error = &why;
  CHECK(pqblk_submit(queue, batch.data(), 1) == 1);
  CHECK(fetch(queue, 1)[0].kind == PQBLK_CLOSED);
  CHECK(std::string(why.message) == "the disk is closed");
  CHECK(pqblk_submit(queue, batch.data(), 64) == 64);  // and never fetched
  pqblk_queue_free(queue);
  const std::vector<std::uint8_t> content = file.content();
  for (std::size_t i = 0; i < content.size(); i += data.size()) {
    CHECK(std::equal(data.begin(), data.end(), content.begin() + static_cast<long>(i)));
  }
}

TEST_CASE("a disk that is closed while another thread submits gives every request an end") {
  for (std::uint64_t round = 0; round < effort(30) + 5; ++round) {
    const DiskFile file(PQBLK_RAW, kMiB);
    pqblk_disk* disk = file.open();
    pqblk_queue* queue = nullptr;
    REQUIRE(pqblk_queue_new(disk, 0, 32, &queue, nullptr) == PQBLK_OK);
    std::thread user([queue] {
      std::array<std::uint8_t, 512> memory;
      const iovec iov{memory.data(), memory.size()};
      const std::vector<pqblk_request> batch(8, request(PQBLK_READ, &iov, 0, 1));
      for (bool open = true; open;) {
        const int taken = pqblk_submit(queue, batch.data(), 8);
        REQUIRE(taken == 8);
        for (const auto& c : fetch(queue, 8)) {
          CHECK((c.kind == PQBLK_OK || c.kind == PQBLK_CLOSED));
          open = open && c.kind == PQBLK_OK;
        }
      }
      pqblk_queue_free(queue);
    });
    std::this_thread::sleep_for(std::chrono::microseconds(round * 37));
    CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
    user.join();
  }
}
