// A guest that chose write-through no longer flushes, and its front-end says so once: no
// reconnection and no crash of the server may forget it.
#include <doctest/doctest.h>

#include <cstring>

#include "export/vhost_user_lab.h"
#include "export/virtio_blk.h"

namespace pqblk::exports::test {
namespace {

constexpr std::uint64_t kDiskBytes = 1 << 20;
constexpr std::uint32_t kCacheAt = 32;  // the write-back byte in the configuration

std::vector<std::uint8_t> config_message(std::uint8_t value) {
  std::vector<std::uint8_t> bytes(sizeof(vu::Config) + 1, value);
  const vu::Config head{kCacheAt, 1, 0};
  std::memcpy(bytes.data(), &head, sizeof head);
  return bytes;
}

// What the server does now: 1 write-back, 0 write-through; 9 when it does not answer.
int cache_of(Connection& front_end) {
  const auto ask = config_message(0);
  if (!front_end.send(vu::Type::get_config, ask.data(), ask.size())) return 9;
  const auto reply = front_end.receive();
  return reply && reply->header.size == ask.size() ? reply->payload[sizeof(vu::Config)] : 9;
}

int cache_of(FrontEnd& guest) { return cache_of(guest.connection()); }

void choose(FrontEnd& guest, bool writeback) {
  const auto set = config_message(writeback ? 1 : 0);
  REQUIRE(
      guest.connection().send(vu::Type::set_config, set.data(), set.size(), {}, vu::kNeedReply));
  REQUIRE(guest.connection().receive()->as<std::uint64_t>() == 0);
}

// Asks for a new region, as after a reset of the guest.
vu::Message new_region(Connection& front_end) {
  const vu::Inflight wanted{0, 0, 1, 128, 0};
  REQUIRE(front_end.send(vu::Type::get_inflight_fd, wanted));
  auto region = front_end.receive();
  REQUIRE(region);
  REQUIRE(region->fds.size() == 1);
  return std::move(*region);
}

}  // namespace

TEST_CASE("write-through outlives the server that was told of it") {
  const Place place(image::Format::raw, kDiskBytes);
  FrontEndOptions options;
  options.inflight = true;
  FrontEnd guest(options);
  auto served = std::make_unique<Served>(place, 1);
  const auto next_server = [&] {
    served.reset();
    served = std::make_unique<Served>(place, 1);
    guest.disconnect();
    REQUIRE(guest.connect(place.socket()) == "");
  };
  REQUIRE(guest.connect(place.socket()) == "");
  CHECK(cache_of(guest) == 1);
  choose(guest, false);
  next_server();
  CHECK(cache_of(guest) == 0);
  next_server();
  CHECK(cache_of(guest) == 0);
  choose(guest, true);
  next_server();
  CHECK(cache_of(guest) == 1);

  // A region that says nothing of it is from a server that may have been told.
  guest.scribble_inflight([](std::uint8_t* data, std::size_t size) { data[size - 64] ^= 1; });
  next_server();
  CHECK(cache_of(guest) == 0);
}

TEST_CASE("write-through outlives the connection without an in-flight region too") {
  const Place place(image::Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  choose(guest, false);
  REQUIRE(guest.connection().ask(vu::Type::reset_device, std::uint64_t{0}) == 0);
  CHECK(cache_of(guest) == 0);
  guest.disconnect();
  REQUIRE(guest.connect(place.socket()) == "");
  CHECK(cache_of(guest) == 0);
  choose(guest, true);
  guest.disconnect();
  REQUIRE(guest.connect(place.socket()) == "");
  CHECK(cache_of(guest) == 1);
}

// As QEMU does when its guest was reset while there was no server: what either knew is unknown
// here.
TEST_CASE("who asks for a region and never for the configuration gets write-through") {
  const Place place(image::Format::raw, kDiskBytes);
  FrontEndOptions options;
  options.inflight = true;
  options.read_config = false;
  Served served(place, 1);
  FrontEnd guest(options);
  REQUIRE(guest.connect(place.socket()) == "");
  CHECK(cache_of(guest) == 0);
  guest.disconnect();
  options.read_config = true;
  FrontEnd other(options);
  REQUIRE(other.connect(place.socket()) == "");
  CHECK(cache_of(other) == 1);
}

TEST_CASE("a driver that can choose finds write-back after one that could not flush") {
  const Place place(image::Format::raw, kDiskBytes);
  Served served(place, 1);
  FrontEnd guest({});
  REQUIRE(guest.connect(place.socket()) == "");
  REQUIRE(guest.stop_rings() == "");
  const std::uint64_t plain = guest.features() & ~(kBlkFlush | kBlkConfigWce);
  CHECK(guest.connection().ask(vu::Type::set_features, plain) == 0);
  CHECK(cache_of(guest) == 0);
  CHECK(guest.connection().ask(vu::Type::set_features, guest.features()) == 0);
  CHECK(cache_of(guest) == 1);
}

// Also one that acknowledges nothing, and whatever comes first: QEMU says the features, hands the
// region over, and says the same features again.
TEST_CASE("the cache is what the driver can deal with, whenever the region comes") {
  const Place place(image::Format::raw, kDiskBytes);
  Served served(place, 1);
  struct Case {
    std::uint64_t features;
    int cache;
  };
  for (const Case& c : {Case{0, 0},
                        {vu::kFeatureProtocol, 0},
                        {kFeatureVersion1, 0},
                        {kFeatureVersion1 | kBlkFlush, 1},
                        {kFeatureVersion1 | kBlkConfigWce, 1},
                        {kFeatureVersion1 | kBlkFlush | kBlkConfigWce, 1}}) {
    for (const char* const order : {"f", "rf", "fr", "frf"}) {
      CAPTURE(c.features);
      CAPTURE(std::string(order));
      Connection front_end(place.socket());
      REQUIRE(front_end.connected());
      const auto protocol = front_end.get(vu::Type::get_protocol_features);
      REQUIRE(front_end.send(vu::Type::set_protocol_features, *protocol));
      CHECK(cache_of(front_end) == 1);
      for (const char* step = order; *step != 0; ++step) {
        if (*step == 'f') {
          REQUIRE(front_end.ask(vu::Type::set_features, c.features) == 0);
          continue;
        }
        vu::Message region = new_region(front_end);
        REQUIRE(front_end.ask(vu::Type::set_inflight_fd, *region.as<vu::Inflight>(),
                              {region.fds[0].get()}) == 0);
      }
      CHECK(cache_of(front_end) == c.cache);
    }
  }
}

TEST_CASE("a guest that restarts after its server did keeps write-back") {
  const Place place(image::Format::raw, kDiskBytes);
  FrontEndOptions options;
  options.inflight = true;
  FrontEnd guest(options);
  auto served = std::make_unique<Served>(place, 1);
  REQUIRE(guest.connect(place.socket()) == "");
  for (const bool writeback : {true, false}) {
    choose(guest, writeback);
    served.reset();
    served = std::make_unique<Served>(place, 1);
    guest.disconnect();
    REQUIRE(guest.connect(place.socket()) == "");  // with the region of the server before
    new_region(guest.connection());
    CHECK(cache_of(guest) == (writeback ? 1 : 0));
  }
}

}  // namespace pqblk::exports::test
