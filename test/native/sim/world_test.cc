// The simulated machine itself: what survives which crash, what a read may see, what it refuses.
#include "sim/world.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <string>
#include <vector>

using namespace pqblk;
using namespace pqblk::sim;

namespace {

using Bytes = std::string;  // one character for each 512-byte block

struct alignas(4096) Block {
  std::uint8_t bytes[4096];
  explicit Block(std::uint8_t value) { std::memset(bytes, value, sizeof bytes); }
};

char at(const Pages& pages, std::uint64_t offset) {
  char byte = 0;
  pages.read(offset, &byte, 1);
  return byte;
}

// Every image that a crash can leave, as the first bytes of `count` 512-byte blocks.
std::set<Bytes> images(const Device& device, bool kill, std::size_t count) {
  std::set<Bytes> all;
  ExhaustiveChoices choices;
  do {
    const Device left = kill ? device.killed(choices) : device.power_loss(choices);
    Bytes bytes;
    for (std::size_t i = 0; i < count; ++i) bytes.push_back(at(left.cache(), i * 512));
    all.insert(bytes);
  } while (choices.next());
  return all;
}

Device::WriteRef put(Device& device, std::uint64_t offset, std::uint64_t length,
                     std::uint8_t value) {
  return device.begin(
      {.offset = offset, .length = length, .bytes = std::vector<std::uint8_t>(length, value)});
}

}  // namespace

TEST_CASE("an unflushed write survives power loss or not; a flushed one does; order holds") {
  Device device;
  device.complete(put(device, 0, 512, 1));
  CHECK(images(device, false, 1) == std::set<Bytes>{{0}, {1}});
  CHECK(images(device, true, 1) == std::set<Bytes>{{1}});
  device.complete_sync(device.begin_sync());
  CHECK(images(device, false, 1) == std::set<Bytes>{{1}});
  device.complete(put(device, 0, 512, 2));
  device.complete(put(device, 0, 512, 3));  // issued after the other's completion: it wins
  device.complete(put(device, 512, 512, 4));
  CHECK(images(device, false, 2) ==
        std::set<Bytes>{{1, 0}, {2, 0}, {3, 0}, {1, 4}, {2, 4}, {3, 4}});
  CHECK(images(device, true, 2) == std::set<Bytes>{{3, 4}});
}

TEST_CASE("a sync covers what had completed before it was issued") {
  Device device;
  const auto early = put(device, 0, 512, 1);
  const auto late = put(device, 512, 512, 2);
  device.complete(early);
  const std::uint64_t sync = device.begin_sync();
  device.complete(late);
  device.complete_sync(sync);
  CHECK(images(device, false, 2) == std::set<Bytes>{{1, 0}, {1, 2}});
}

TEST_CASE("writes in flight together land in any order, in part, or not at all") {
  Device device;
  const auto a = put(device, 0, 512, 1);
  const auto b = put(device, 0, 512, 2);
  CHECK(images(device, false, 1) == std::set<Bytes>{{0}, {1}, {2}});
  CHECK(images(device, true, 1) == std::set<Bytes>{{0}, {1}, {2}});
  device.complete(b);
  CHECK(images(device, false, 1) == std::set<Bytes>{{0}, {1}, {2}});
  device.complete(a);
  CHECK(images(device, false, 1) == std::set<Bytes>{{0}, {1}, {2}});
  CHECK(images(device, true, 1) == std::set<Bytes>{{1}});
}

TEST_CASE("writes tear at 512 bytes, or at 4096 where the device promises it") {
  Device device;
  device.complete(put(device, 0, 4096, 1));
  const auto torn = images(device, false, 8);
  CHECK(torn.contains(Bytes{1, 1, 1, 1, 0, 0, 0, 0}));
  CHECK(torn.contains(Bytes{0, 0, 0, 0, 1, 1, 1, 1}));
  RandomChoices random(1);
  bool ragged = false;
  for (int i = 0; i < 1000; ++i) {
    const Device left = device.power_loss(random);
    ragged |= at(left.cache(), 0) == 1 && at(left.cache(), 512) == 0 && at(left.cache(), 1024) == 1;
  }
  CHECK(ragged);
  Device whole(DeviceFacts{.atomic_4k = true});
  whole.complete(put(whole, 0, 4096, 1));
  CHECK(images(whole, false, 8) == std::set<Bytes>{Bytes(8, 0), Bytes(8, 1)});
}

// A file on it whose first block was written and synced.
Device settled_device() {
  Device device(DeviceFacts{.non_volatile = true, .atomic_4k = true});
  device.complete(put(device, 0, 4096, 1));
  device.complete_sync(device.begin_sync());
  return device;
}

TEST_CASE("a non-volatile device keeps completed writes, and tears only those in flight") {
  Device device = settled_device();
  device.complete(put(device, 0, 4096, 2));
  CHECK(images(device, false, 1) == std::set<Bytes>{{2}});
  put(device, 0, 4096, 3);
  CHECK(images(device, false, 1) == std::set<Bytes>{{2}, {3}});
}

TEST_CASE("a file on a non-volatile device loses what went to a new block until a sync") {
  Device device = settled_device();
  device.complete(put(device, 0, 8192, 2));  // half of it is new
  CHECK(images(device, false, 1) == std::set<Bytes>{{2}});
  const auto second = [&] {
    std::set<std::uint8_t> seen;
    for (std::uint64_t seed = 0; seed < 64; ++seed) {
      RandomChoices random(seed);
      seen.insert(at(device.power_loss(random).cache(), 4096));
    }
    return seen;
  };
  CHECK(second() == std::set<std::uint8_t>{0, 2});
  device.complete(put(device, 4096, 4096, 3));  // nor does a second write help
  CHECK(second() == std::set<std::uint8_t>{0, 2, 3});
  device.complete_sync(device.begin_sync());
  device.complete(put(device, 4096, 4096, 4));
  CHECK(second() == std::set<std::uint8_t>{4});
  device.complete(device.begin({.type = Write::Type::zero, .offset = 4096, .length = 4096}));
  device.complete(put(device, 4096, 4096, 5));  // a new block again
  CHECK(second() == std::set<std::uint8_t>{0, 4, 5});
  device.complete_sync(device.begin_sync());
  CHECK(second() == std::set<std::uint8_t>{5});
}

TEST_CASE("a failed sync may lose writes for good") {
  RandomChoices random(3);
  bool lost = false;
  bool kept = false;
  for (int i = 0; i < 200; ++i) {
    Device device;
    device.complete(put(device, 0, 512, 1));
    device.fail_sync(device.begin_sync(), random);
    device.complete_sync(device.begin_sync());  // succeeds, and says nothing of the write
    CHECK(at(device.cache(), 0) == 1);
    const bool there = images(device, false, 1) == std::set<Bytes>{{1}};
    CHECK((there || images(device, false, 1) == std::set<Bytes>{{0}}));
    (there ? kept : lost) = true;
  }
  CHECK((lost && kept));
}

TEST_CASE("sizes, punches and zeroed ranges are writes too") {
  Device device;
  device.complete(put(device, 0, 8192, 1));
  device.complete_sync(device.begin_sync());
  device.complete(device.begin({.type = Write::Type::zero, .offset = 0, .length = 4096}));
  CHECK(images(device, false, 1) == std::set<Bytes>{{0}, {1}});
  device.complete(device.begin({.type = Write::Type::resize, .offset = 512}));
  CHECK(device.size() == 512);
  std::set<std::uint64_t> sizes;
  ExhaustiveChoices choices;
  do {
    sizes.insert(device.power_loss(choices).size());
  } while (choices.next());
  CHECK(sizes == std::set<std::uint64_t>{512, 8192});
  Device grown;
  grown.complete(grown.begin({.type = Write::Type::zero_range, .offset = 0, .length = 4096}));
  CHECK(grown.size() == 4096);
}

TEST_CASE("a read beside a write sees old, new or a mix; a late one may be served early") {
  std::set<Bytes> seen;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    RandomChoices choices(seed);
    World world(choices);
    SimQueue& queue = world.add_queue();
    io::File& file = world.add_file("f", Device());
    world.device(file).set_size(4096);
    Block data(1);
    Block out(9);
    bool wrote = false;
    world.spawn(queue, [](io::Queue& q, io::File& f, Block& d, bool& done) -> Task<void> {
      CHECK(!co_await q.write(f, 0, d.bytes, 4096));
      done = true;
    }(queue, file, data, wrote));
    bool late = false;
    world.spawn(queue, [](io::Queue& q, io::File& f, Block& d, bool& w, bool& l) -> Task<void> {
      CHECK(!co_await q.read(f, 0, d.bytes, 4096));
      l = w;
    }(queue, file, out, wrote, late));
    CHECK(world.run_until([] { return false; }) == Outcome::idle);
    Bytes blocks;
    for (int i = 0; i < 4096; i += 512) blocks.push_back(static_cast<char>(out.bytes[i]));
    seen.insert(blocks);
  }
  CHECK(seen.contains(Bytes(8, 0)));
  CHECK(seen.contains(Bytes(8, 1)));
  CHECK(seen.size() > 10);  // and mixtures
}

TEST_CASE("queues interleave in every order, and exhaustively in each exactly once") {
  std::set<std::string> orders;
  ExhaustiveChoices choices;
  do {
    World world(choices);
    std::string order;
    for (int i = 0; i < 3; ++i) {
      world.spawn(world.add_queue(), [](std::string& out, char name) -> Task<void> {
        out += name;
        co_return;
      }(order, static_cast<char>('a' + i)));
    }
    world.run_until([&] { return order.size() == 3; });
    orders.insert(order);
  } while (choices.next());
  CHECK(orders.size() == 6);
  CHECK_FALSE(choices.diverged());
}

TEST_CASE("the clock jumps over sleeps, and hooks run before a queue would block") {
  QuietChoices choices;
  World world(choices);
  SimQueue& queue = world.add_queue();
  int turns = 0;
  queue.before_wait = [&] { ++turns; };
  std::uint64_t woke = 0;
  world.spawn(queue, [](io::Queue& q, std::uint64_t& out) -> Task<void> {
    co_await q.sleep(5'000'000'000);
    out = q.now_ns();
  }(queue, woke));
  CHECK(world.run_until([] { return false; }) == Outcome::idle);
  CHECK(woke >= 5'000'000'000);
  CHECK(turns >= 2);
  CHECK(world.steps() < 20);
}

TEST_CASE("direct I/O is refused when misaligned, as the kernel does, and a read-only file too") {
  QuietChoices choices;
  World world(choices);
  SimQueue& queue = world.add_queue();
  io::File& file = world.add_file("f", Device());
  io::File& sealed = world.add_file("g", Device(), {.read_only = true});
  Block data(1);
  const auto result = [&](std::uint64_t offset, const void* from, std::size_t size, io::File& f) {
    return world
        .run(
            [](io::Queue& q, io::File& to, std::uint64_t o, const void* d,
               std::size_t n) -> Task<Error> {
              co_return co_await q.write(to, o, d, n);
            }(queue, f, offset, from, size),
            Error(Kind::canceled, "hang"))
        .os_errno();
  };
  CHECK(result(0, data.bytes, 512, file) == 0);
  CHECK(result(100, data.bytes, 512, file) == EINVAL);
  CHECK(result(0, data.bytes + 1, 512, file) == EINVAL);
  CHECK(result(0, data.bytes, 100, file) == EINVAL);
  CHECK(result(0, data.bytes, 512, sealed) == EBADF);
}

TEST_CASE("a buffer that changes while it is written is reported") {
  QuietChoices choices;
  World world(choices);
  SimQueue& queue = world.add_queue();
  io::File& file = world.add_file("f", Device());
  Block data(1);
  world.spawn(queue, [](io::Queue& q, io::File& f, Block& d) -> Task<void> {
    CHECK(!co_await q.write(f, 0, d.bytes, 4096));
  }(queue, file, data));
  while (world.device(file).in_flight().empty()) CHECK(world.step());
  data.bytes[7] = 0;
  world.drain();
  CHECK_FALSE(world.violation().empty());
}

TEST_CASE("injected faults arrive: EIO, ENOSPC; a dead end is seen as one") {
  QuietChoices choices;
  World world(choices, {.faults = {.file_size_max = 4096, .fail_operation = 0}});
  SimQueue& queue = world.add_queue();
  io::File& file = world.add_file("f", Device());
  Block data(1);
  const auto write = [&](std::uint64_t offset) {
    return world
        .run(
            [](io::Queue& q, io::File& f, Block& d, std::uint64_t o) -> Task<Error> {
              co_return co_await q.write(f, o, d.bytes, 4096);
            }(queue, file, data, offset),
            Error(Kind::canceled, "hang"))
        .kind();
  };
  CHECK(write(0) == Kind::io_error);
  CHECK(write(0) == Kind::ok);
  CHECK(write(4096) == Kind::no_space);
  CHECK(write(2048) == Kind::no_space);  // in part
  CHECK(world.injected() == 3);
  CHECK(world.run_until([] { return false; }) == Outcome::idle);
}
