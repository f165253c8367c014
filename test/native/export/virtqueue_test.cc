// Rings from both sides, without a server between them; and how long an idle one is looked at.
#include "export/virtqueue.h"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include "export/vhost_user_client.h"
#include "export/vhost_user_vring.h"

namespace pqblk::exports::test {
namespace {

// A driver and the device's view of its ring.
struct Pair {
  explicit Pair(RingOptions options) : driver(DriverRing::make(ram, options)) {
    for (const vu::MemoryRegion& r : ram.regions()) {
      REQUIRE(!memory.add({r.guest, r.user, r.size, r.file_offset}, ram.fd()));
    }
    RingSetup setup;
    setup.size = options.size;
    setup.features = kFeatureVersion1 | (options.packed ? kFeaturePacked : 0) |
                     (options.event_idx ? kFeatureEventIdx : 0);
    setup.base = options.packed ? 0x8000'8000 : 0;
    setup.descriptors = memory.at(driver->descriptors, RingSetup::descriptor_bytes(setup.size));
    setup.driver = memory.at(driver->driver, RingSetup::driver_bytes(setup.features, setup.size));
    setup.device = memory.at(driver->device, RingSetup::device_bytes(setup.features, setup.size));
    auto opened = Virtqueue::open(memory, setup);
    REQUIRE(opened);
    device = std::move(*opened);
  }

  // `n` chains from the driver's hands into the device's.
  void move(std::uint32_t n) {
    for (std::uint32_t i = 0; i < n; ++i) {
      driver->add({{ram.regions()[0].guest, 16, false}, {ram.regions()[1].guest, 16, true}}, i);
      driver->publish();
      Chain chain;
      REQUIRE(device->take(chain) == Take::chain);
      CHECK(chain.fault == nullptr);
      CHECK(chain.iov.size() == 2);
      taken.push_back(std::move(chain));
    }
  }
  void give(std::uint32_t n) {
    for (std::uint32_t i = 0; i < n; ++i) {
      device->put(taken.back(), 16);
      taken.pop_back();
    }
    device->publish();
  }
  std::uint32_t seen() const {
    std::uint32_t n = 0;
    while (driver->pop()) ++n;
    return n;
  }

  GuestRam ram{1U << 20U};
  std::unique_ptr<DriverRing> driver;
  GuestMemory memory;
  std::unique_ptr<Virtqueue> device;
  std::vector<Chain> taken;
};

}  // namespace

TEST_CASE("a driver is shown answers piece by piece, and told of them once") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    Pair pair({.size = 32, .packed = packed, .event_idx = true});
    pair.move(9);
    REQUIRE(!pair.driver->ask_for_calls());
    pair.give(2);
    CHECK(pair.seen() == 2);
    pair.give(2);
    CHECK(pair.device->wants_call());  // for the first of the four
    CHECK(!pair.device->wants_call());
    CHECK(pair.seen() == 2);
    pair.give(2);  // the driver has not asked again: it looks by itself
    CHECK(!pair.device->wants_call());
    CHECK(pair.driver->ask_for_calls());
    CHECK(pair.seen() == 2);
    REQUIRE(!pair.driver->ask_for_calls());
    pair.give(1);
    pair.give(1);
    CHECK(pair.device->wants_call());
    CHECK(pair.seen() == 2);
  }
}

TEST_CASE("a driver without event indices is told of whatever is new") {
  for (const bool packed : {false, true}) {
    CAPTURE(packed);
    Pair pair({.size = 32, .packed = packed, .event_idx = false});
    CHECK(!pair.device->wants_call());
    pair.move(4);
    pair.give(1);
    pair.give(2);
    CHECK(pair.device->wants_call());
    CHECK(!pair.device->wants_call());
    pair.give(1);
    CHECK(pair.device->wants_call());
    CHECK(pair.seen() == 4);
  }
}

TEST_CASE("a dirty log ends where it was said to end, not with its page") {
  constexpr std::size_t kFile = 8192, kOffset = 64, kLog = 16;  // bytes
  const UniqueFd fd(::memfd_create("log", MFD_CLOEXEC));
  REQUIRE(::ftruncate(fd.get(), kFile) == 0);
  const auto log = DirtyLog::map(fd.get(), kOffset, kLog);
  REQUIRE(log);
  (*log)->mark((kLog * 8 - 1) * kLogPage, kLogPage);      // its last page
  (*log)->mark((kLog * 8 - 2) * kLogPage, 4 * kLogPage);  // and beyond
  (*log)->mark(kLog * 8 * kLogPage, 1);
  (*log)->mark(0x100'0000, kLogPage);
  std::vector<std::uint8_t> bytes(kFile), expected(kFile);
  REQUIRE(::pread(fd.get(), bytes.data(), kFile, 0) == kFile);
  expected[kOffset + kLog - 1] = 0xc0;
  CHECK(bytes == expected);
}

TEST_CASE("an idle ring is looked at as long as that pays") {
  constexpr std::uint64_t kSoon = 15'000, kLate = 5'000'000;
  Watch watch;
  for (int i = 0; i < 100; ++i) watch.found(50'000);
  CHECK(watch.limit_ns() == Watch::kMaxNs);

  // Work comes soon, but only when the looking has ended: hardly any of it is spent on looking.
  std::uint32_t long_looks = 0;
  for (int i = 0; i < 10'000; ++i) {
    if (watch.limit_ns() == Watch::kMaxNs) ++long_looks;
    watch.slept(kSoon);
  }
  CHECK(long_looks > 2);
  CHECK(long_looks < 30);

  // Once looking finds work it goes on.
  std::uint32_t sleeps = 0;
  for (; watch.limit_ns() < Watch::kMaxNs; ++sleeps) watch.slept(kSoon);
  CHECK(sleeps <= Watch::kPatienceMax);
  for (int i = 0; i < 100; ++i) watch.found(kSoon);
  CHECK(watch.limit_ns() == Watch::kMaxNs);

  // Nor is an idle disk looked at for long that is asked something now and then.
  for (int i = 0; i < 5; ++i) watch.slept(kLate);
  CHECK(watch.limit_ns() == 0);
  sleeps = 0;
  for (; watch.limit_ns() < Watch::kMaxNs; ++sleeps) watch.slept(kSoon);
  CHECK(sleeps <= Watch::kPatienceMin);
}

}  // namespace pqblk::exports::test
