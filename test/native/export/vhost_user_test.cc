// The vhost-user server against a guest of our own and a flat model of the disk.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <numeric>
#include <thread>

#include "effort.h"
#include "export/vhost_user_lab.h"
#include "export/virtio_blk.h"

namespace pqblk::exports::test {
namespace {

using image::Format;
using pqblk::test::effort;

enum : std::uint32_t { kIn = 0, kOut = 1, kFlush = 4, kGetId = 8, kDiscard = 11, kZeroes = 13 };
constexpr std::uint64_t kDiskBytes = 16 << 20;
constexpr std::uint32_t kBlock = 4096, kBlockSectors = kBlock / 512;

// What the disk must hold. A discarded block may read as before or as zeros.
struct Model {
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(kDiskBytes);
  std::vector<bool> unsure = std::vector<bool>(kDiskBytes / kBlock);
};

struct Pending {
  std::uint32_t type = 0;
  std::uint64_t block = 0;
  std::uint32_t blocks = 0;
};

// Requests on a ring that no other request of the round touches, then all answers.
class Round {
 public:
  Round(FrontEnd& guest, Model& model, Dice& dice, std::uint32_t rings, std::uint32_t depth)
      : guest_(guest), model_(model), dice_(dice), rings_(rings), depth_(depth) {}

  void run() {
    const std::uint64_t blocks = kDiskBytes / kBlock;
    const std::uint64_t share = blocks / (std::uint64_t{rings_} * depth_);
    for (std::uint32_t r = 0; r < rings_; ++r) {
      for (std::uint32_t slot = 0; slot < depth_; ++slot) {
        const std::uint64_t begin = (std::uint64_t{r} * depth_ + slot) * share;
        submit(r, slot, begin, share);
        if (dice_.below(3) == 0) guest_.kick(r);
      }
      guest_.kick(r);
    }
    for (std::uint32_t r = 0; r < rings_; ++r) {
      for (std::uint32_t n = 0; n < depth_; ++n) {
        const auto answer = guest_.wait(r);
        REQUIRE(answer);
        check(r, *answer);
      }
    }
  }

 private:
  void submit(std::uint32_t r, std::uint32_t slot, std::uint64_t begin, std::uint64_t share) {
    Pending& p = pending_[r * depth_ + slot];
    p.blocks = 1 + dice_.below(8);
    p.block = begin + dice_.below(static_cast<std::uint32_t>(share - p.blocks));
    const std::uint32_t bytes = p.blocks * kBlock;
    std::uint8_t* data = guest_.data(r, slot);
    constexpr std::uint32_t kTypes[] = {kIn, kIn, kIn, kOut, kOut, kOut, kFlush, kZeroes, kDiscard};
    p.type = kTypes[dice_.below(9)];
    const std::uint32_t pieces = 1 + dice_.below(4);
    const std::uint64_t sector = p.block * kBlockSectors;
    if (p.type == kFlush) return guest_.add(r, slot, kFlush, 0, 0);
    if (p.type == kZeroes || p.type == kDiscard) {
      const std::uint32_t sectors = bytes / 512, flags = p.type == kZeroes ? dice_.below(2) : 0;
      std::memcpy(data, &sector, 8);
      std::memcpy(data + 8, &sectors, 4);
      std::memcpy(data + 12, &flags, 4);
      return guest_.add(r, slot, p.type, 0, 16, dice_.below(2) + 1);
    }
    for (std::uint32_t i = 0; i < bytes; i += 8) {
      const std::uint64_t word = dice_.next();
      std::memcpy(data + i, &word, 8);
    }
    guest_.add(r, slot, p.type, sector, bytes, pieces);
  }

  void check(std::uint32_t r, const Answer& answer) {
    REQUIRE(answer.slot < depth_);
    const Pending& p = pending_[r * depth_ + answer.slot];
    REQUIRE(answer.status == 0);
    const std::uint32_t bytes = p.blocks * kBlock;
    CHECK(answer.written == (p.type == kIn ? bytes + 1 : 1));
    std::uint8_t* want = model_.bytes.data() + p.block * kBlock;
    const std::uint8_t* have = guest_.data(r, answer.slot);
    for (std::uint32_t i = 0; i < p.blocks; ++i) {
      std::vector<bool>::reference unsure = model_.unsure[p.block + i];
      std::uint8_t* block = want + std::size_t{i} * kBlock;
      if (p.type == kOut) std::memcpy(block, have + std::size_t{i} * kBlock, kBlock);
      if (p.type == kZeroes) std::memset(block, 0, kBlock);
      if (p.type == kOut || p.type == kZeroes) unsure = false;
      if (p.type == kDiscard) unsure = true;
      if (p.type != kIn) continue;
      const std::vector<std::uint8_t> zeros(kBlock);
      const std::uint8_t* got = have + std::size_t{i} * kBlock;
      const bool as_before = std::memcmp(got, block, kBlock) == 0;
      const bool as_zeros = unsure && std::memcmp(got, zeros.data(), kBlock) == 0;
      REQUIRE((as_before || as_zeros));
    }
  }

  FrontEnd& guest_;
  Model& model_;
  Dice& dice_;
  const std::uint32_t rings_, depth_;
  std::vector<Pending> pending_ = std::vector<Pending>(std::size_t{rings_} * depth_);
};

void against_model(Format format, RingOptions ring, std::uint32_t rings, std::uint64_t rounds) {
  CAPTURE(ring.packed);
  CAPTURE(ring.indirect);
  CAPTURE(ring.event_idx);
  CAPTURE(rings);
  const Place place(format, kDiskBytes);
  Served served(place, rings);
  FrontEndOptions options;
  options.rings = rings;
  options.ring = ring;
  FrontEnd guest(options);
  REQUIRE(guest.connect(place.socket()) == "");
  Model model;
  Dice dice(ring.packed * 4U + ring.indirect * 2U + ring.event_idx + rings * 8U);
  Round round(guest, model, dice, rings, options.depth);
  for (std::uint64_t i = 0; i < rounds; ++i) {
    round.run();
    if (i % 16 == 7) {  // rings stop and start in between, as when a guest is paused
      REQUIRE(guest.stop_rings() == "");
      REQUIRE(guest.start_rings() == "");
    }
  }
  for (std::uint32_t r = 0; r < rings; ++r) CHECK(guest.ring(r).complaints == 0);
  CHECK(served.said().empty());
}

TEST_CASE("every kind of ring reads what was written") {
  for (const bool packed : {false, true}) {
    for (const bool indirect : {false, true}) {
      for (const bool event_idx : {false, true}) {
        RingOptions ring;
        ring.size = packed ? 100 : 128;  // a packed ring's size is any number
        ring.packed = packed;
        ring.indirect = indirect;
        ring.event_idx = event_idx;
        against_model(Format::raw, ring, 1, effort(24));
        against_model(Format::raw, ring, 2, effort(16));
      }
    }
  }
}

TEST_CASE("a sealed disk reads what was written, on two rings") {
  RingOptions ring;
  ring.indirect = true;
  against_model(Format::sealed, ring, 2, effort(120));
}

TEST_CASE("more rings than queues share them") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 2, 5);
  FrontEndOptions options;
  options.rings = 5;
  FrontEnd guest(options);
  REQUIRE(guest.connect(place.socket()) == "");
  Model model;
  Dice dice(5);
  Round round(guest, model, dice, 5, options.depth);
  for (std::uint64_t i = 0; i < effort(40); ++i) round.run();
}

TEST_CASE("the configuration says what the device can do, and takes the write-back byte") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 2);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  const auto config = [&] {
    std::vector<std::uint8_t> ask(sizeof(vu::Config) + 72);
    const vu::Config head{0, 72, 0};
    std::memcpy(ask.data(), &head, sizeof head);
    REQUIRE(guest.connection().send(vu::Type::get_config, ask.data(), ask.size()));
    auto reply = guest.connection().receive();
    REQUIRE(reply);
    REQUIRE(reply->header.size == ask.size());
    return std::vector<std::uint8_t>(reply->payload.begin() + sizeof head,
                                     reply->payload.begin() + static_cast<long>(ask.size()));
  };
  const auto number = [](const std::vector<std::uint8_t>& c, std::size_t at, std::size_t bytes) {
    std::uint64_t value = 0;
    std::memcpy(&value, c.data() + at, bytes);
    return value;
  };
  auto c = config();
  CHECK(number(c, 0, 8) == kDiskBytes / 512);
  CHECK(number(c, 12, 4) == kBlkSegmentsMax);
  CHECK(number(c, 20, 4) == 512);
  CHECK(c[24] == 3);  // 4096-byte physical blocks
  CHECK(c[32] == 1);
  CHECK(number(c, 34, 2) == 2);
  CHECK(number(c, 40, 4) == kBlkRangesMax);
  CHECK(number(c, 60, 4) == 0);  // beyond
  std::vector<std::uint8_t> set(sizeof(vu::Config) + 1);
  const vu::Config head{32, 1, 0};
  std::memcpy(set.data(), &head, sizeof head);
  REQUIRE(
      guest.connection().send(vu::Type::set_config, set.data(), set.size(), {}, vu::kNeedReply));
  CHECK(guest.connection().receive()->as<std::uint64_t>() == 0);
  c = config();
  CHECK(c[32] == 0);
  CHECK(guest.run(0, kOut, 0, kBlock) == 0);  // now durable when answered
  const vu::Config capacity{0, 1, 0};
  std::memcpy(set.data(), &capacity, sizeof capacity);
  REQUIRE(
      guest.connection().send(vu::Type::set_config, set.data(), set.size(), {}, vu::kNeedReply));
  CHECK(guest.connection().receive()->as<std::uint64_t>() == 1);
}

TEST_CASE("a server that ends in order answers what it has done, without a region too") {
  const Place place(Format::raw, kDiskBytes);
  FrontEnd guest({});
  Served served(place, 1);
  REQUIRE(guest.connect(place.socket()) == "");
  image::RateLimits slow;
  slow.iops_max = 4;
  slow.iops_burst = 1;
  REQUIRE_FALSE(served.disk().set_rate_limits(slow));
  constexpr std::uint32_t kRequests = 6;
  for (std::uint32_t slot = 0; slot < kRequests; ++slot) {
    guest.add(0, slot, kOut, 8 * slot, kBlock);
  }
  guest.kick(0);
  REQUIRE(guest.wait(0));
  served.server().stop();
  std::uint32_t answers = 1;
  while (const auto answer = guest.poll(0)) {
    CHECK(answer->status == 0);
    ++answers;
  }
  CHECK(answers == kRequests);
}

TEST_CASE("a front-end with a channel learns that the disk has grown, and is not waited for") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  served.server().config_changed();  // to nobody
  int pair[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  const UniqueFd mine(pair[0]), theirs(pair[1]);
  const auto offer = [&](const std::vector<int>& fds) {
    REQUIRE(guest.connection().send(vu::Type::set_backend_fd, nullptr, 0, fds, vu::kNeedReply));
    return guest.connection().receive()->as<std::uint64_t>();
  };
  CHECK(offer({}) == 1);
  CHECK(offer({guest.kick_fd(0)}) == 1);
  CHECK(offer({theirs.get()}) == 0);
  CHECK(guest.run(0, kIn, kDiskBytes / 512, kBlock) == 1);
  REQUIRE_FALSE(served.disk().resize(2 * kDiskBytes));
  served.server().config_changed();
  pollfd readable{mine.get(), POLLIN, 0};
  REQUIRE(::poll(&readable, 1, 60'000) == 1);
  std::uint32_t header[3] = {};
  REQUIRE(::recv(mine.get(), header, sizeof header, MSG_WAITALL) == sizeof header);
  CHECK(header[0] == 2);
  CHECK(header[1] == vu::kVersion);
  CHECK(header[2] == 0);
  CHECK(guest.run(0, kIn, kDiskBytes / 512, kBlock) == 0);
  for (int i = 0; i < 100'000; ++i) served.server().config_changed();  // nobody reads
  CHECK(guest.run(0, kOut, kDiskBytes / 512, kBlock) == 0);
  guest.disconnect();
}

TEST_CASE("GET_ID gives the serial; a read-only disk says so and refuses writes") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1, 1, true);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  CHECK((guest.features() & kBlkReadOnly) != 0);
  CHECK((guest.features() & kBlkDiscard) == 0);
  CHECK(guest.run(0, kGetId, 0, 20) == 0);
  const std::string id(reinterpret_cast<const char*>(guest.data(0, 0)),
                       ::strnlen(reinterpret_cast<const char*>(guest.data(0, 0)), 20));
  CHECK(id == served.disk().facts().id);
  CHECK(guest.run(0, kIn, 0, kBlock) == 0);
  CHECK(guest.run(0, kOut, 0, kBlock) == 1);
  CHECK(guest.run(0, kZeroes, 0, 16) == 1);
}

TEST_CASE("requests that cannot be are answered with an error, and the ring goes on") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  const std::uint64_t last = kDiskBytes / 512;
  CHECK(guest.run(0, 77, 0, 0) == 2);
  CHECK(guest.run(0, kIn, last, 512) == 1);
  CHECK(guest.run(0, kIn, last - 1, 1024) == 1);
  CHECK(guest.run(0, kIn, ~std::uint64_t{0}, 512) == 1);
  CHECK(guest.run(0, kOut, std::uint64_t{1} << 55U, 512) == 1);
  CHECK(guest.run(0, kIn, 0, 511) == 1);
  CHECK(guest.run(0, kIn, 0, 0) == 1);
  CHECK(guest.run(0, kOut, 0, 0) == 1);
  CHECK(guest.run(0, kGetId, 0, 19) == 1);
  CHECK(guest.run(0, kZeroes, 0, 15) == 1);
  CHECK(guest.run(0, kZeroes, 0, 16 * (kBlkRangesMax + 1)) == 1);
  std::memset(guest.data(0, 0), 0, 16);
  guest.data(0, 0)[12] = 2;  // a flag nobody knows
  guest.data(0, 0)[8] = 1;
  CHECK(guest.run(0, kZeroes, 0, 16) == 2);
  guest.data(0, 0)[12] = 1;  // unmap, which a discard has anyway
  CHECK(guest.run(0, kDiscard, 0, 16) == 2);
  guest.data(0, 0)[12] = 0;
  std::memset(guest.data(0, 0) + 8, 0xff, 4);
  CHECK(guest.run(0, kDiscard, 0, 16) == 1);
  CHECK(guest.run(0, kIn, last - 1, 512) == 0);
}

TEST_CASE("several ranges in one request") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  std::memset(guest.data(0, 0), 0x5a, 16 * kBlock);
  REQUIRE(guest.run(0, kOut, 0, 16 * kBlock) == 0);
  for (std::uint32_t i = 0; i < 4; ++i) {
    const std::uint64_t sector = std::uint64_t{4} * i * kBlockSectors;
    const std::uint32_t sectors = i == 2 ? 0 : kBlockSectors, flags = 1;
    std::memcpy(guest.data(0, 0) + 16 * i, &sector, 8);
    std::memcpy(guest.data(0, 0) + 16 * i + 8, &sectors, 4);
    std::memcpy(guest.data(0, 0) + 16 * i + 12, &flags, 4);
  }
  REQUIRE(guest.run(0, kZeroes, 0, 64, 3) == 0);
  REQUIRE(guest.run(0, kIn, 0, 16 * kBlock) == 0);
  for (std::uint32_t block = 0; block < 16; ++block) {
    const bool zeroed = block % 4 == 0 && block != 8;
    CHECK(guest.data(0, 0)[block * kBlock] == (zeroed ? 0 : 0x5a));
  }
}

TEST_CASE("a guest that sleeps is woken once for what happened, and an idle server sleeps too") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 2);
  FrontEndOptions options;
  options.rings = 2;
  FrontEnd guest(options);
  REQUIRE(guest.connect(place.socket()) == "");
  for (int i = 0; i < 20; ++i) {  // each wakes a server that has gone to sleep
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    REQUIRE(guest.run(static_cast<std::uint32_t>(i) % 2, kIn, 0, kBlock) == 0);
  }
  const auto cpu_ms = [] {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    const auto ms = [](const timeval& t) { return t.tv_sec * 1000 + t.tv_usec / 1000; };
    return ms(usage.ru_utime) + ms(usage.ru_stime);
  };
  const auto before = cpu_ms();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  CHECK(cpu_ms() - before <= 50);  // a thread that spins would take hundreds
}

TEST_CASE("a front-end without kick descriptors, and one that changes its own") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  Connection& c = guest.connection();
  CHECK(c.ask(vu::Type::set_vring_kick, std::uint64_t{0} | vu::kNoFd) == 0);
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    CHECK(guest.run(0, kIn, 0, kBlock) == 0);
  }
  for (int i = 0; i < 5; ++i) {
    CHECK(c.ask(vu::Type::set_vring_kick, std::uint64_t{0}, {guest.kick_fd(0)}) == 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    CHECK(guest.run(0, kIn, 0, kBlock) == 0);
  }
}

TEST_CASE("the dirty log has the pages that were written, and no others") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  const std::uint64_t pages = guest.ram().end() / 4096;
  auto memory = make_sealed_memory("log", (pages / 8 + 4096) / 4096 * 4096);
  REQUIRE(memory);
  const SharedMapping log = std::move(*SharedMapping::map(memory->get(), pages / 8 + 1));
  const auto is_dirty = [&](std::uint64_t guest_address) {
    const std::uint64_t page = guest_address / 4096;
    return ((log.data()[page / 8] >> (page % 8)) & 1) != 0;
  };
  REQUIRE(guest.run(0, kIn, 0, 2 * kBlock) == 0);
  Connection& c = guest.connection();
  REQUIRE(c.send(vu::Type::set_log_base, vu::Log{pages / 8 + 1, 0}, {memory->get()}));
  REQUIRE(c.receive());
  REQUIRE(guest.run(0, kIn, 0, 2 * kBlock) == 0);
  CHECK_FALSE(is_dirty(guest.data_address(0, 0)));  // the feature is not on yet
  CHECK(c.ask(vu::Type::set_features, guest.features() | vu::kFeatureLogAll) == 0);
  const DriverRing& ring = guest.ring(0);
  const vu::VringAddress address{0,
                                 vu::kVringLog,
                                 guest.ram().user(ring.descriptors),
                                 guest.ram().user(ring.device),
                                 guest.ram().user(ring.driver),
                                 ring.device};
  CHECK(c.ask(vu::Type::set_vring_addr, address) == 0);
  REQUIRE(guest.run(0, kOut, 0, 2 * kBlock) == 0);
  CHECK_FALSE(is_dirty(guest.data_address(0, 0)));
  CHECK(is_dirty(guest.status_address(0, 0)));
  CHECK(is_dirty(ring.device));
  REQUIRE(guest.run(0, kIn, 0, 2 * kBlock) == 0);
  CHECK(is_dirty(guest.data_address(0, 0)));
  CHECK(is_dirty(guest.data_address(0, 0) + kBlock));
  CHECK_FALSE(is_dirty(guest.data_address(0, 0) + 2 * kBlock));
}

TEST_CASE("memory that can be sealed does not shrink under the server") {
  const UniqueFd fd(::memfd_create("guest", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  REQUIRE(::ftruncate(fd.get(), 65536) == 0);
  CHECK_FALSE(SharedMapping::map(fd.get(), 65537));
  auto mapping = SharedMapping::map(fd.get(), 65536);
  REQUIRE(mapping);
  CHECK(::ftruncate(fd.get(), 4096) != 0);
  mapping->data()[65535] = 1;  // SIGBUS otherwise
  CHECK(::ftruncate(fd.get(), 131072) == 0);
}

TEST_CASE("memory comes and goes by slots while the ring runs") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  Connection& c = guest.connection();
  CHECK(*c.get(vu::Type::get_max_mem_slots) >= 32);
  auto more = make_sealed_memory("more", 1 << 20);
  REQUIRE(more);
  const vu::SingleRegion region{0, {std::uint64_t{1} << 40U, 1 << 20, std::uint64_t{1} << 41U, 0}};
  const auto read_into_it = [&] {
    guest.add(0, 1, kIn, 0, kBlock);  // only its header and status are used
    guest.kick(0);
    REQUIRE(guest.wait(0));
    guest.ring(0).add({{guest.header_address(0, 1), 16, false},
                       {region.region.guest, kBlock, true},
                       {guest.status_address(0, 1), 1, true}},
                      1);
    guest.kick(0);
    const auto answer = guest.wait(0);
    REQUIRE(answer);
    return answer->status;
  };
  CHECK(read_into_it() == 1);
  CHECK(c.ask(vu::Type::add_mem_reg, region, {more->get()}) == 0);
  CHECK(c.ask(vu::Type::add_mem_reg, region, {more->get()}) == 1);  // overlaps itself
  CHECK(read_into_it() == 0);
  CHECK(c.ask(vu::Type::rem_mem_reg, region) == 0);
  CHECK(c.ask(vu::Type::rem_mem_reg, region) == 1);
  CHECK(read_into_it() == 1);
}

// A buffer that lies over many adjacent slots is as many pieces.
TEST_CASE("a request of too many pieces is answered with an error in its own status byte") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  constexpr std::uint64_t kSlots = 200, kSlot = 4096, kAt = std::uint64_t{1} << 40U;
  auto memory = make_sealed_memory("more", kSlots * kSlot);
  REQUIRE(memory);
  for (std::uint64_t i = 0; i < kSlots; ++i) {
    const vu::SingleRegion region{0, {kAt + i * kSlot, kSlot, 2 * kAt + i * kSlot, i * kSlot}};
    REQUIRE(guest.connection().ask(vu::Type::add_mem_reg, region, {memory->get()}) == 0);
  }
  for (const std::uint32_t type : {kOut, kIn}) {
    guest.add(0, 1, type, 0, kBlock);  // only its header and status are used
    guest.kick(0);
    REQUIRE(guest.wait(0));
    std::vector<Buffer> buffers{{guest.header_address(0, 1), 16, false}};
    for (int i = 0; i < 6; ++i) buffers.push_back({kAt, kSlots * kSlot, type == kIn});
    buffers.push_back({guest.status_address(0, 1), 1, true});
    *guest.ram().at(guest.status_address(0, 1)) = 0;  // as the request before left it
    guest.ring(0).add(buffers, 1);
    guest.kick(0);
    const auto answer = guest.wait(0);
    REQUIRE(answer);
    CHECK(answer->status == 1);
  }
  CHECK(guest.run(0, kIn, 0, kBlock) == 0);
}

TEST_CASE("one front-end at a time; the next one is served when it has gone, even amid requests") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd first({});
  REQUIRE(first.connect(place.socket()) == "");
  Connection second(place.socket());
  REQUIRE(second.connected());
  CHECK(second.hung_up());
  CHECK(served.was_said("second front-end"));
  CHECK(served.server().stats().refused == 1);
  CHECK_FALSE(VhostUserServer::start(served.disk(), {.path = place.socket()}));  // only looks
  Connection(place.socket()).close();
  CHECK(Connection(place.socket()).hung_up());
  CHECK(served.server().stats().refused == 2);
  CHECK(first.run(0, kIn, 0, kBlock) == 0);
  for (int i = 0; i < 10; ++i) {
    FrontEnd guest({});
    std::string why = "never tried";
    if (i == 0) first.disconnect();
    for (int tries = 0; tries < 2000 && why != ""; ++tries) {  // the one before is on its way out
      why = guest.connect(place.socket());
      if (why != "") std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    REQUIRE(why == "");
    CHECK(guest.run(0, kIn, 8, kBlock) == 0);
    for (std::uint32_t slot = 0; slot < 16; ++slot) guest.add(0, slot, i % 2, 0, 65536);
    guest.kick(0);
    if (i % 3 == 0) REQUIRE(guest.wait(0));
  }  // it vanishes with its requests under way
  CHECK_FALSE(served.was_said("stopped"));
}

TEST_CASE("a stale socket is replaced; a live one and other files are left alone") {
  const Place place(Format::raw, kDiskBytes);
  {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    place.socket().copy(address.sun_path, sizeof address.sun_path - 1);
    const UniqueFd stale(::socket(AF_UNIX, SOCK_STREAM, 0));
    REQUIRE(::bind(stale.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  }
  Served served(place, 1);
  auto other = VhostUserServer::start(served.disk(), {.path = place.socket()});
  REQUIRE_FALSE(other);
  CHECK(other.error().kind() == Kind::exists);
  other = VhostUserServer::start(served.disk(), {.path = place.image()});
  REQUIRE_FALSE(other);
  CHECK(other.error().kind() == Kind::exists);
  other = VhostUserServer::start(served.disk(), {.path = std::string(200, 'x')});
  REQUIRE_FALSE(other);
  CHECK(other.error().kind() == Kind::invalid_argument);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  CHECK(served.server().serving());
  served.server().stop();
  CHECK_FALSE(served.server().serving());
  struct stat status {};
  CHECK(::stat(place.socket().c_str(), &status) != 0);
}

TEST_CASE("a descriptor that is no Unix stream socket is refused and left alone") {
  const Place place(Format::raw, kDiskBytes);
  auto disk = place.open(1);
  REQUIRE(disk);
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  const UniqueFd reading(ends[0]), writing(ends[1]);
  const UniqueFd datagrams(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const UniqueFd internet(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  for (const UniqueFd* other : {&reading, &datagrams, &internet}) {
    const int flags = ::fcntl(other->get(), F_GETFL);
    const auto server = VhostUserServer::start(**disk, {.fd = other->get()});
    REQUIRE_FALSE(server);
    CHECK(server.error().kind() == Kind::invalid_argument);
    CHECK(::fcntl(other->get(), F_GETFL) == flags);  // open, and as it was
  }
  const auto none = VhostUserServer::start(**disk, {.fd = 1 << 20});
  REQUIRE_FALSE(none);
  CHECK(none.error().kind() == Kind::invalid_argument);
  CHECK_FALSE((*disk)->close());
}

TEST_CASE("an inherited connection is served until it ends") {
  const Place place(Format::raw, kDiskBytes);
  auto disk = place.open(1);
  REQUIRE(disk);
  int pair[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  auto server = VhostUserServer::start(**disk, {.fd = pair[0]});
  REQUIRE(server);
  FrontEnd guest({});
  REQUIRE(guest.set_up(Connection(UniqueFd(pair[1]))) == "");
  CHECK(guest.run(0, kIn, 0, kBlock) == 0);
  guest.disconnect();
  for (int i = 0; i < 6000 && (*server)->serving(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  CHECK_FALSE((*server)->serving());
  server->reset();
  CHECK_FALSE((*disk)->close());
}

}  // namespace
}  // namespace pqblk::exports::test
