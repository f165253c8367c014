// A front-end and a driver that break every rule: what can be answered is, a ring that contradicts
// itself stops alone, and the server serves on.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <thread>

#include "effort.h"
#include "export/vhost_user_lab.h"
#include "export/virtqueue.h"

namespace pqblk::exports::test {
namespace {

using image::Format;
using pqblk::test::effort;
constexpr std::uint64_t kDiskBytes = 4 << 20;
constexpr std::uint32_t kIn = 0;
constexpr std::uint16_t kNext = 1, kWrite = 2, kIndirect = 4;

std::string connect(FrontEnd& guest, const Place& place) {
  std::string why = "never tried";
  for (int i = 0; i < 6000 && !why.empty(); ++i) {  // the one before may be on its way out
    why = guest.connect(place.socket());
    if (!why.empty()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return why;
}

bool serves(const Place& place) {
  FrontEnd guest({});
  return connect(guest, place).empty() && guest.run(0, kIn, 0, 4096) == 0;
}

// ---- chains ----

struct BadChain {
  const char* what;
  std::function<std::vector<Buffer>(FrontEnd&)> make;
  bool has_status;
};

std::vector<BadChain> bad_chains() {
  const auto header = [](FrontEnd& g) { return Buffer{g.header_address(0, 0), 16, false}; };
  const auto status = [](FrontEnd& g) { return Buffer{g.status_address(0, 0), 1, true}; };
  const auto data = [](FrontEnd& g) { return g.data_address(0, 0); };
  using V = std::vector<Buffer>;
  return {
      {"data outside",
       [=](FrontEnd& g) {
         return V{header(g), {1, 512, true}, status(g)};
       },
       true},
      {"data behind the end",
       [=](FrontEnd& g) {
         return V{header(g), {g.ram().end() - 8, 512, true}, status(g)};
       },
       true},
      {"data around the end of all addresses",
       [=](FrontEnd& g) {
         return V{header(g), {~std::uint64_t{0} - 99, 512, true}, status(g)};
       },
       true},
      {"4 GiB of data",
       [=](FrontEnd& g) {
         return V{header(g), {data(g), 0xffff'ffff, true}, status(g)};
       },
       true},
      {"no data length",
       [=](FrontEnd& g) {
         return V{header(g), {data(g), 0, true}, status(g)};
       },
       true},
      {"a short header",
       [=](FrontEnd& g) {
         return V{{g.header_address(0, 0), 8, false}, status(g)};
       },
       true},
      {"no header", [=](FrontEnd& g) { return V{status(g)}; }, true},
      {"a header outside",
       [=](FrontEnd& g) {
         return V{{8, 16, false}, status(g)};
       },
       true},
      {"readable behind writable",
       [=](FrontEnd& g) {
         return V{header(g), status(g), {data(g), 512, false}};
       },
       true},
      {"read with data to read",
       [=](FrontEnd& g) {
         return V{header(g), {data(g), 512, false}, status(g)};
       },
       true},
      {"no status",
       [=](FrontEnd& g) {
         return V{header(g), {data(g), 512, false}};
       },
       false},
      {"only a header", [=](FrontEnd& g) { return V{header(g)}; }, false},
      {"a status outside",
       [=](FrontEnd& g) {
         return V{header(g), {data(g), 512, true}, {3, 1, true}};
       },
       false},
  };
}

void offer(const Place& place, Served& served, RingOptions ring) {
  FrontEndOptions options;
  options.ring = ring;
  FrontEnd guest(options);
  REQUIRE(connect(guest, place) == "");
  for (const BadChain& bad : bad_chains()) {
    CAPTURE(bad.what);
    std::memset(guest.ram().at(guest.header_address(0, 0)), 0, 24);
    *guest.ram().at(guest.status_address(0, 0)) = 0xee;
    guest.ring(0).add(bad.make(guest), 5);
    guest.kick(0);
    const auto used = [&]() -> std::optional<DriverRing::Used> {
      for (int i = 0; i < 60'000; ++i) {
        if (const auto u = guest.ring(0).pop()) return u;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      return std::nullopt;
    }();
    REQUIRE(used);
    CHECK(used->token == 5);
    CHECK(used->written <= 1);
    CHECK(*guest.ram().at(guest.status_address(0, 0)) == (bad.has_status ? 1 : 0xee));
    CHECK(guest.run(0, kIn, 0, 512) == 0);
  }
  CHECK(guest.ring(0).complaints == 0);
  CHECK_FALSE(served.was_said("stopped for good"));
}

TEST_CASE("chains that are no requests come back with an error") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  for (const bool packed : {false, true}) {
    for (const bool indirect : {false, true}) {
      RingOptions ring;
      ring.packed = packed;
      ring.indirect = indirect;
      offer(place, served, ring);
    }
  }
}

// ---- rings ----

// Writes descriptors by hand. The first chain of a new ring begins at descriptor 0.
struct Scribe {
  FrontEnd& guest;
  void descriptor(std::uint32_t at, std::uint64_t address, std::uint32_t length,
                  std::uint16_t third, std::uint16_t fourth) const {
    std::uint8_t* place = guest.ram().at(guest.ring(0).descriptors) + std::size_t{16} * at;
    std::memcpy(place, &address, 8);
    std::memcpy(place + 8, &length, 4);
    std::memcpy(place + 12, &third, 2);
    std::memcpy(place + 14, &fourth, 2);
  }
  void available(std::uint16_t head, std::uint16_t index) const {
    std::uint8_t* ring = guest.ram().at(guest.ring(0).driver);
    std::memcpy(ring + 4, &head, 2);
    std::memcpy(ring + 2, &index, 2);
  }
};

struct BadRing {
  const char* what;
  bool packed, indirect;
  std::function<void(const Scribe&)> write;
};

std::vector<BadRing> bad_rings() {
  constexpr std::uint16_t kAvail = 1 << 7;
  const auto data = [](const Scribe& s) { return s.guest.data_address(0, 0); };
  return {
      {"a head beyond the ring", false, false, [](const Scribe& s) { s.available(128, 1); }},
      {"an index that jumps", false, false, [](const Scribe& s) { s.available(0, 129); }},
      {"a chain in a loop", false, false,
       [=](const Scribe& s) {
         s.descriptor(0, data(s), 16, kNext, 1);
         s.descriptor(1, data(s), 16, kNext, 0);
         s.available(0, 1);
       }},
      {"a next one beyond the ring", false, false,
       [=](const Scribe& s) {
         s.descriptor(0, data(s), 16, kNext, 128);
         s.available(0, 1);
       }},
      {"an indirect table that was not agreed upon", false, false,
       [=](const Scribe& s) {
         s.descriptor(0, data(s), 16, kIndirect, 0);
         s.available(0, 1);
       }},
      {"a chain behind an indirect table", false, true,
       [=](const Scribe& s) {
         s.descriptor(0, data(s), 16, kIndirect | kNext, 1);
         s.available(0, 1);
       }},
      {"a packed chain without an end", true, false,
       [=](const Scribe& s) {
         for (std::uint32_t i = 128; i-- > 0;) s.descriptor(i, data(s), 16, 0, kNext | kAvail);
       }},
      {"a packed indirect table that was not agreed upon", true, false,
       [=](const Scribe& s) { s.descriptor(0, data(s), 16, 0, kIndirect | kAvail); }},
      {"a packed chain behind an indirect table", true, true,
       [=](const Scribe& s) {
         s.descriptor(0, data(s), 16, 0, kIndirect | kNext | kAvail);
         s.descriptor(1, data(s), 16, 0, kAvail);
       }},
  };
}

TEST_CASE("a call descriptor that is full and blocks holds up nobody") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(connect(guest, place) == "");
  const int call = guest.call_fd(0);
  std::uint64_t count = 0;
  static_cast<void>(::read(call, &count, sizeof count));  // what the server wrote when it came
  const std::uint64_t full = ~std::uint64_t{0} - 1;
  REQUIRE(::write(call, &full, sizeof full) == sizeof full);
  REQUIRE(::fcntl(call, F_SETFL, ::fcntl(call, F_GETFL) & ~O_NONBLOCK) == 0);
  for (std::uint64_t sector = 0; sector < 4; ++sector) {
    guest.add(0, 0, kIn, sector, 4096);
    guest.kick(0);
    std::optional<Answer> answer;
    for (int i = 0; i < 60'000 && !answer; ++i) {
      answer = guest.poll(0);  // nobody will call
      if (!answer) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    REQUIRE(answer);
    CHECK(answer->status == 0);
  }
  CHECK(guest.stop_rings() == "");
}

TEST_CASE("a ring that contradicts itself stops alone and says so") {
  const Place place(Format::raw, kDiskBytes);
  for (const BadRing& bad : bad_rings()) {
    CAPTURE(bad.what);
    Served served(place, 1, 2);
    FrontEndOptions options;
    options.rings = 2;
    options.ring.packed = bad.packed;
    options.ring.indirect = bad.indirect;
    FrontEnd guest(options);
    REQUIRE(connect(guest, place) == "");
    // The server reads the ring all the time: the guest prepares it while it is stopped.
    REQUIRE(guest.stop_rings() == "");
    bad.write(Scribe{guest});
    REQUIRE(guest.start_rings() == "");
    guest.force_kick(0);
    pollfd error{guest.error_fd(0), POLLIN, 0};
    CHECK(::poll(&error, 1, 60'000) == 1);
    CHECK(served.was_said("ring 0 is stopped for good"));
    CHECK(guest.run(1, kIn, 0, 4096) == 0);
    CHECK(guest.stop_rings() == "");
  }
}

TEST_CASE("bad indirect tables are bad requests, not bad rings") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  struct Table {
    std::uint32_t length;
    std::uint64_t shift;  // of its address
    std::uint16_t flags, next;
  };
  for (const bool packed : {false, true}) {
    for (const Table& t : {Table{0, 0, 0, 0}, Table{24, 0, 0, 0}, Table{16 * 1025, 0, 0, 0},
                           Table{32, std::uint64_t{1} << 50U, 0, 0}, Table{32, 0, kNext, 0},
                           Table{32, 0, kNext, 9}, Table{32, 0, kIndirect, 0}}) {
      CAPTURE(t.length);
      CAPTURE(t.flags);
      FrontEndOptions options;
      options.ring.packed = packed;
      options.ring.indirect = true;
      FrontEnd guest(options);
      REQUIRE(connect(guest, place) == "");
      const std::uint64_t address = guest.data_address(0, 0);
      for (std::uint32_t i = 0; i < 2; ++i) {
        std::uint8_t* entry = guest.data(0, 0) + 16 * i;
        const std::uint64_t buffer = guest.data_address(0, 1);
        const std::uint32_t length = 16;
        std::memcpy(entry, &buffer, 8);
        std::memcpy(entry + 8, &length, 4);
        std::memcpy(entry + (packed ? 14 : 12), &t.flags, 2);
        std::memcpy(entry + (packed ? 12 : 14), &t.next, 2);
      }
      REQUIRE(guest.stop_rings() == "");
      guest.ring(0).add({{address + t.shift, t.length, false}}, 3);
      std::uint8_t* flags = guest.ram().at(guest.ring(0).descriptors) + (packed ? 14 : 12);
      std::uint16_t word = 0;
      std::memcpy(&word, flags, 2);
      word |= kIndirect;
      std::memcpy(flags, &word, 2);
      guest.ring(0).publish();
      REQUIRE(guest.start_rings() == "");
      guest.force_kick(0);
      std::optional<DriverRing::Used> used;
      for (int i = 0; i < 60'000 && !used; ++i) {
        used = guest.ring(0).pop();
        if (!used) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      REQUIRE(used);
      CHECK(used->written == 0);
      CHECK(guest.run(0, kIn, 0, 4096, 3) == 0);
    }
  }
  CHECK_FALSE(served.was_said("stopped"));
}

// ---- messages ----

TEST_CASE("streams that are not the protocol end the connection and nothing else") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  const vu::Header bad[] = {
      {1, 0, 0},                               // no version
      {1, 2, 0},                               // another one
      {1, vu::kVersion | vu::kReply, 0},       // a reply to nothing
      {5, vu::kVersion, vu::kPayloadMax + 1},  // too long
      {5, vu::kVersion, 0xffff'ffff},
  };
  for (const vu::Header& header : bad) {
    Connection c(place.socket());
    REQUIRE(c.connected());
    REQUIRE(c.send_raw(&header, sizeof header));
    CHECK(c.hung_up());
    CHECK(serves(place));
  }
  for (const std::size_t cut : {1U, 11U, 12U, 15U}) {  // gone in the middle of a message
    std::array<std::uint8_t, 20> message{};
    const vu::Header header{2, vu::kVersion, 8};
    std::memcpy(message.data(), &header, sizeof header);
    Connection c(place.socket());
    REQUIRE(c.send_raw(message.data(), cut));
    c.close();
    CHECK(serves(place));
  }
  Dice dice(3);
  for (std::uint64_t i = 0; i < effort(60); ++i) {  // every type, any payload, any flags
    Connection c(place.socket());
    if (!c.connected()) continue;
    for (int n = 0; n < 20; ++n) {
      std::vector<std::uint8_t> payload(dice.below(64));
      for (std::uint8_t& byte : payload) {
        byte = static_cast<std::uint8_t>(dice.below(3) == 0 ? dice.next() : dice.below(2));
      }
      const auto type = static_cast<vu::Type>(dice.below(42));
      if (!c.send(type, payload.data(), payload.size(), {}, dice.below(2) * vu::kNeedReply)) break;
    }
  }
  CHECK(serves(place));
}

TEST_CASE("messages that make no sense are refused, and the connection lives on") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 2);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  Connection& c = guest.connection();
  using vu::Type;
  const std::uint64_t zero = 0;
  CHECK(c.ask(Type::set_features, ~std::uint64_t{0}) == 1);
  CHECK(c.ask(Type::set_features, guest.features() ^ kFeaturePacked) == 1);  // while a ring runs
  CHECK(c.ask(Type::set_protocol_features, ~std::uint64_t{0}) == 1);
  CHECK(c.ask(Type::set_vring_num, vu::VringState{7, 128}) == 1);
  CHECK(c.ask(Type::set_vring_num, vu::VringState{1, 0}) == 1);
  CHECK(c.ask(Type::set_vring_num, vu::VringState{1, 65535}) == 1);
  CHECK(c.ask(Type::set_vring_num, vu::VringState{0, 64}) == 1);  // it runs
  CHECK(c.ask(Type::set_vring_num, vu::VringState{1, 100}) == 0);
  CHECK(c.ask(Type::set_vring_enable, vu::VringState{9, 1}) == 1);
  CHECK(c.ask(Type::set_vring_kick, zero) == 1);                                  // no descriptor
  CHECK(c.ask(Type::set_vring_kick, zero | vu::kNoFd, {guest.call_fd(0)}) == 1);  // and one
  CHECK(c.ask(Type::set_vring_call, std::uint64_t{99}, {guest.call_fd(0)}) == 1);
  CHECK(c.ask(Type::set_vring_num, zero) == 1);  // 0 descriptors
  CHECK(c.ask(Type::set_log_base, vu::Log{~zero, ~zero}, {guest.ram().fd()}) == 1);
  CHECK(c.ask(Type::set_log_base, vu::Log{4096, 0}) == 1);
  CHECK(c.ask(Type::set_inflight_fd, vu::Inflight{4096, 0, 1, 128, 0}) == 1);
  CHECK(c.ask(static_cast<Type>(99), zero) == 1);
  CHECK(c.ask(Type::set_vring_addr, std::uint32_t{0}) == 1);  // too short
  int pipe[2];
  REQUIRE(::pipe2(pipe, O_CLOEXEC) == 0);
  CHECK(c.ask(Type::set_vring_call, zero, {pipe[1]}) == 1);  // could block whoever writes
  CHECK(c.ask(Type::set_vring_kick, zero, {pipe[0]}) == 1);
  ::close(pipe[0]);
  ::close(pipe[1]);
  // A ring outside of the memory, misaligned, of a bad size: it does not start.
  UniqueFd kick(::dup(guest.kick_fd(0)));
  CHECK(c.ask(Type::set_vring_kick, std::uint64_t{1}, {kick.get()}) == 0);
  CHECK(c.ask(Type::set_vring_addr, vu::VringAddress{1, 0, 0x1000, 0x1000, 0x1000, 0}) == 0);
  CHECK(c.ask(Type::set_vring_enable, vu::VringState{1, 1}) == 1);
  const std::uint64_t user = guest.ram().user(guest.data_address(0, 3));
  CHECK(c.ask(Type::set_vring_addr, vu::VringAddress{1, 0, user, user, user, 0}) == 1);  // 100
  CHECK(c.ask(Type::set_vring_num, vu::VringState{1, 128}) == 0);
  CHECK(c.ask(Type::set_vring_addr, vu::VringAddress{1, 0, user + 8, user, user, 0}) == 1);
  CHECK(guest.run(0, kIn, 0, 4096) == 0);
}

TEST_CASE("memory tables that lie are refused, and rings without memory stand still") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  auto memory = make_sealed_memory("table", 1 << 20);
  REQUIRE(memory);
  struct Table {
    vu::MemoryTable head;
    vu::MemoryRegion a, b;
  };
  constexpr std::uint64_t kMiB = 1 << 20, kHigh = ~std::uint64_t{0};
  const vu::MemoryRegion good{0, kMiB, kMiB, 0};
  const struct {
    Table table;
    int fds;
  } bad[] = {
      {{{2, 0}, good, {kMiB / 2, kMiB, 8 * kMiB, 0}}, 2},     // overlap for the guest
      {{{2, 0}, good, {8 * kMiB, kMiB, kMiB + 4096, 0}}, 2},  // and for the front-end
      {{{2, 0}, good, {kHigh - 10, kMiB, 8 * kMiB, 0}}, 2},   // around the end
      {{{2, 0}, good, {8 * kMiB, 0, 8 * kMiB, 0}}, 2},        // nothing
      {{{2, 0}, good, {8 * kMiB, kMiB, 8 * kMiB, 4096}}, 2},  // more than the file has
      {{{2, 0}, good, {8 * kMiB, kMiB, 8 * kMiB, kHigh}}, 2},
      {{{2, 0}, good, {8 * kMiB, kMiB, 8 * kMiB, 0}}, 1},  // too few descriptors
      {{{9, 0}, good, good}, 2},
  };
  for (const auto& [table, fds] : bad) {
    FrontEnd guest({});
    REQUIRE(connect(guest, place) == "");
    Connection& c = guest.connection();
    CHECK(c.ask(vu::Type::set_mem_table, table,
                std::vector<int>(static_cast<std::size_t>(fds), memory->get())) == 1);
    CHECK(c.get(vu::Type::get_queue_num) == 1);
  }
  CHECK(serves(place));
}

TEST_CASE("a region of requests in flight that was tampered with stops the ring, not the server") {
  const Place place(Format::raw, kDiskBytes);
  Served served(place, 1);
  Dice dice(11);
  for (std::uint64_t i = 0; i < effort(60); ++i) {
    FrontEndOptions options;
    options.inflight = true;
    options.ring.packed = i % 2 == 0;
    FrontEnd guest(options);
    REQUIRE(connect(guest, place) == "");
    guest.disconnect();
    // A version that is known, then noise.
    guest.scribble_inflight([&](std::uint8_t* data, std::size_t size) {
      for (std::size_t at = 12; at < size; ++at) {
        if (dice.below(4) == 0) data[at] = static_cast<std::uint8_t>(dice.below(2) * dice.next());
      }
    });
    if (!guest.connect(place.socket()).empty()) continue;
    guest.add(0, 0, kIn, 0, 4096);
    guest.force_kick(0);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(serves(place));
}

}  // namespace
}  // namespace pqblk::exports::test
