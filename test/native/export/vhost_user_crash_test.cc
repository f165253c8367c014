// A server that is killed in mid-load and started again: every request is answered exactly once and
// nothing that was acknowledged is lost. The guest's memory and its rings live on meanwhile.
#include <doctest/doctest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "effort.h"
#include "export/vhost_user_lab.h"
#include "export/virtqueue_inflight.h"

namespace pqblk::exports::test {
namespace {

using image::Format;
using pqblk::test::effort;
using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kBlock = 4096;
constexpr std::uint32_t kRings = 2, kDepth = 16, kBlocksOfSlot = 16;
constexpr std::uint64_t kDiskBytes = std::uint64_t{kRings} * kDepth * kBlocksOfSlot * kBlock;

// A server in a process of its own, which dies at any moment.
class Victim {
 public:
  explicit Victim(const Place& place) : child_(::fork()) {
    REQUIRE(child_ >= 0);
    if (child_ == 0) serve(place);
  }
  ~Victim() { kill(); }
  void kill() {
    if (child_ <= 0) return;
    ::kill(child_, SIGKILL);
    ::waitpid(child_, nullptr, 0);
    child_ = 0;
  }

 private:
  [[noreturn]] static void serve(const Place& place) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    auto disk = place.open(kRings);
    if (!disk) {
      std::fprintf(stderr, "child: %s\n", disk.error().to_string().c_str());
      ::_exit(2);
    }
    VhostUserOptions options;
    options.path = place.socket();
    options.log = [](const std::string& line) {
      std::fprintf(stderr, "child: %s\n", line.c_str());
    };
    auto server = VhostUserServer::start(**disk, std::move(options));
    if (!server) {
      std::fprintf(stderr, "child: %s\n", server.error().to_string().c_str());
      ::_exit(3);
    }
    for (;;) ::pause();
  }
  pid_t child_;
};

// Each slot of the guest writes and reads blocks that nobody else touches, one request at a time:
// what a read must give is known, whatever dies in between.
class Load {
 public:
  explicit Load(FrontEnd& guest) : guest_(guest), dice_(7) {}

  // Goes on for so long, then (when `finish`) until every answer is there.
  void run(milliseconds time, bool finish) {
    const auto end = Clock::now() + time;
    const auto limit = end + std::chrono::seconds(120);
    while (Clock::now() < end || (finish && out_ != 0)) {
      REQUIRE(Clock::now() < limit);
      bool any = false;
      for (std::uint32_t r = 0; r < kRings; ++r) {
        while (const auto answer = guest_.poll(r)) {
          any = true;
          finished(r, *answer);
        }
        if (Clock::now() < end) any = start(r) || any;
        guest_.kick(r);
      }
      if (!any) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
  std::uint64_t answered() const { return answered_; }

 private:
  struct Slot {
    bool busy = false, writes = false;
    std::uint32_t block = 0;  // of its own
    std::uint64_t version[kBlocksOfSlot] = {};
  };
  Slot& slot(std::uint32_t r, std::uint32_t s) { return slots_[r * kDepth + s]; }
  std::uint64_t first_block(std::uint32_t r, std::uint32_t s) const {
    return (std::uint64_t{r} * kDepth + s) * kBlocksOfSlot;
  }
  static void fill(std::uint8_t* data, std::uint64_t block, std::uint64_t version) {
    for (std::uint32_t i = 0; i < kBlock; i += 16) {
      std::memcpy(data + i, &block, 8);
      std::memcpy(data + i + 8, &version, 8);
    }
  }
  bool start(std::uint32_t r) {
    bool any = false;
    for (std::uint32_t s = 0; s < kDepth; ++s) {
      Slot& it = slot(r, s);
      if (it.busy) continue;
      any = it.busy = true;
      ++out_;
      it.block = dice_.below(kBlocksOfSlot);
      it.writes = dice_.below(2) == 0;
      const std::uint64_t block = first_block(r, s) + it.block;
      if (it.writes) fill(guest_.data(r, s), block, it.version[it.block] + 1);
      guest_.add(r, s, it.writes ? 1 : 0, block * (kBlock / 512), kBlock, 1 + dice_.below(3));
    }
    return any;
  }
  void finished(std::uint32_t r, const Answer& answer) {
    REQUIRE(answer.slot < kDepth);
    Slot& it = slot(r, answer.slot);
    REQUIRE(it.busy);
    REQUIRE(answer.status == 0);
    it.busy = false;
    --out_;
    ++answered_;
    if (it.writes) {
      ++it.version[it.block];
      return;
    }
    std::vector<std::uint8_t> want(kBlock);
    const std::uint64_t version = it.version[it.block];
    if (version != 0) fill(want.data(), first_block(r, answer.slot) + it.block, version);
    REQUIRE(std::memcmp(want.data(), guest_.data(r, answer.slot), kBlock) == 0);
  }

  FrontEnd& guest_;
  Dice dice_;
  std::vector<Slot> slots_ = std::vector<Slot>(std::size_t{kRings} * kDepth);
  std::uint64_t out_ = 0, answered_ = 0;
};

std::string connect(FrontEnd& guest, const Place& place) {
  std::string why;
  const auto limit = Clock::now() + std::chrono::seconds(60);
  do {  // the child is on its way
    why = guest.connect(place.socket());
    if (why.empty()) return why;
    std::this_thread::sleep_for(milliseconds(2));
  } while (Clock::now() < limit);
  return why;
}

void kill_and_go_on(Format format, bool packed, bool indirect) {
  CAPTURE(packed);
  CAPTURE(indirect);
  const Place place(format, kDiskBytes);
  FrontEndOptions options;
  options.rings = kRings;
  options.depth = kDepth;
  options.slot_bytes = kBlock;
  options.inflight = true;
  options.ring.size = packed ? 90 : 128;
  options.ring.packed = packed;
  options.ring.indirect = indirect;
  FrontEnd guest(options);
  Load load(guest);
  const auto lives = static_cast<std::uint32_t>(effort(8)) + 2;
  for (std::uint32_t life = 0; life < lives; ++life) {
    Victim victim(place);
    REQUIRE(connect(guest, place) == "");
    const bool last = life + 1 == lives;
    load.run(milliseconds(15 + 9 * life), last);
    victim.kill();
  }
  for (std::uint32_t r = 0; r < kRings; ++r) CHECK(guest.ring(r).complaints == 0);
  CHECK(load.answered() > 0);
}

TEST_CASE("a killed server's requests are answered once by the next one") {
  for (const bool packed : {false, true}) {
    for (const bool indirect : {false, true}) kill_and_go_on(Format::raw, packed, indirect);
  }
}

TEST_CASE("a killed server of a sealed disk loses nothing that was acknowledged") {
  kill_and_go_on(Format::sealed, false, true);
  kill_and_go_on(Format::sealed, true, false);
}

// No kill can be aimed at the few instructions between two stores: here the region is left as such
// a kill would leave it.
TEST_CASE("the region of requests in flight is right after a death at any store") {
  constexpr std::uint32_t kSize = 4;
  std::vector<std::uint8_t> bytes(InflightRegion::bytes(kSize) + 64);
  auto* data = bytes.data();
  data += 64 - reinterpret_cast<std::uintptr_t>(data) % 64;
  InflightSplit split({data}, kSize);
  std::vector<std::uint16_t> heads;
  CHECK_FALSE(split.recover(10, heads));
  split.taken(3);
  split.taken(1);
  split.taken(2);
  split.giving(1);
  split.giving(3);
  InflightSplit before({data}, kSize);  // dead before the used index grew
  CHECK(before.recover(10, heads));
  CHECK(heads == std::vector<std::uint16_t>{3, 1, 2});
  heads.clear();
  InflightSplit after({data}, kSize);  // dead right after
  CHECK(after.recover(12, heads));
  CHECK(heads == std::vector<std::uint16_t>{2});
  heads.clear();
  CHECK_FALSE(InflightSplit({data}, kSize).recover(100, heads));  // the ring was reset
  CHECK(heads.empty());

  std::fill(bytes.begin(), bytes.end(), std::uint8_t{0});
  std::uint8_t ring[16 * kSize] = {};
  const auto set_flags = [&](std::uint32_t at, std::uint16_t flags) {
    std::memcpy(ring + 16 * at + 14, &flags, 2);
  };
  constexpr std::uint16_t kAvail = 1 << 7, kUsed = 1 << 15;
  using Recovered = std::vector<InflightPacked::Recovered>;
  InflightPacked packed({data}, kSize);
  InflightPacked::Place used{0, true};
  Recovered found;
  CHECK(packed.recover(ring, used, found));
  std::uint16_t first = 9, second = 9;
  CHECK(packed.taken({{1, 2, 3, 0}, {4, 5, 3, 0}}, first));
  CHECK(packed.taken({{6, 7, 8, 0}, {9, 9, 8, 0}}, second));
  std::uint16_t none = 9;
  CHECK_FALSE(packed.taken({{1, 1, 1, 0}}, none));  // it is full
  for (std::uint32_t i = 0; i < kSize; ++i) set_flags(i, kAvail);
  CHECK(packed.giving(second, {2, true}));
  const std::vector<std::uint8_t> then = bytes;
  const auto recover = [&](Recovered& out) {
    InflightPacked::Place place{0, true};
    CHECK(InflightPacked({data}, kSize).recover(ring, place, out));
    return place;
  };
  found.clear();
  auto place = recover(found);  // dead before the flags changed
  CHECK(place.index == 0);
  REQUIRE(found.size() == 2);
  CHECK(found[0].track == first);
  CHECK(found[1].descriptors.at(0).address == 6);
  bytes = then;
  set_flags(0, kAvail | kUsed);
  found.clear();
  place = recover(found);  // dead right after
  CHECK(place.index == 2);
  REQUIRE(found.size() == 1);
  CHECK(found[0].descriptors.at(1).address == 4);

  // One chain as long as the ring: the index comes back to where it was.
  std::fill(bytes.begin(), bytes.end(), std::uint8_t{0});
  InflightPacked whole({data}, kSize);
  used = {0, true};
  found.clear();
  CHECK(whole.recover(ring, used, found));
  CHECK(whole.taken({{1, 1, 1, 0}, {2, 1, 1, 0}, {3, 1, 1, 0}, {4, 1, 1, 0}}, first));
  CHECK(whole.giving(first, {0, false}));
  set_flags(0, kAvail | kUsed);
  place = recover(found);
  CHECK(found.empty());
  CHECK_FALSE(place.wrap);
}

}  // namespace
}  // namespace pqblk::exports::test
