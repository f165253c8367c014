// The oracle: patterns say what they are, and the allowed versions follow flushes and crashes.
#include "sim/model.h"

#include <doctest/doctest.h>

#include <vector>

#include "sim/nonce_trace.h"

using namespace pqblk;
using namespace pqblk::sim;

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes content(std::uint64_t sector, std::uint64_t version) {
  Bytes bytes(kSectorSize);
  fill_sector(bytes.data(), sector, version);
  return bytes;
}
const Bytes kZeros(kSectorSize);

bool may_read(const Model& model, std::uint64_t sector, const Bytes& bytes) {
  return model.end_read(model.begin_read(sector, 1), sector, 1, bytes.data()).empty();
}

// Writes and acknowledges one version of sector 0.
std::uint64_t written(Model& model, bool zeros = false, bool fua = false) {
  const std::uint64_t v = model.begin(0, 1, zeros);
  model.acknowledge(v, 0, 1, fua);
  return v;
}

}  // namespace

TEST_CASE("a block says which sector and version it is; one changed bit makes it garbage") {
  Bytes bytes = content(7, 3);
  CHECK(look_at_block(bytes.data() + 512) == Seen{Seen::What::data, 7, 1, 3});
  bytes[512 + 500] ^= 1;
  CHECK(look_at_block(bytes.data() + 512).what == Seen::What::garbage);
  CHECK(look_at_block(kZeros.data()).what == Seen::What::zeros);
}

TEST_CASE("reads see what was acknowledged before they began, or newer") {
  Model model({.sectors = 2});
  CHECK(may_read(model, 0, kZeros));
  const std::uint64_t a = written(model);
  CHECK(may_read(model, 0, content(0, a)));
  CHECK_FALSE(may_read(model, 0, kZeros));
  CHECK_FALSE(may_read(model, 0, content(1, a)));
  CHECK_FALSE(may_read(model, 0, content(0, a + 1)));
  const Model::Ticket before = model.begin_read(0, 1);
  const std::uint64_t b = model.begin(0, 1, false);
  CHECK(may_read(model, 0, content(0, a)));
  CHECK(may_read(model, 0, content(0, b)));
  model.acknowledge(b, 0, 1, false);
  CHECK_FALSE(may_read(model, 0, content(0, a)));
  CHECK(model.end_read(before, 0, 1, content(0, a).data()).empty());
}

TEST_CASE("power loss falls back to the flushed version, kill -9 to the acknowledged one") {
  Model model({.sectors = 1});
  const std::uint64_t a = written(model);
  const Model::Ticket flush = model.begin_flush();
  const std::uint64_t b = written(model);  // not covered by that flush
  model.end_flush(flush);
  const std::uint64_t c = model.begin(0, 1, false);  // in flight
  Model killed = model;
  killed.crash(Crash::kill);
  CHECK_FALSE(may_read(killed, 0, content(0, a)));
  CHECK(may_read(killed, 0, content(0, b)));
  CHECK(may_read(killed, 0, content(0, c)));
  Model lost = model;
  lost.crash(Crash::power_loss);
  CHECK(may_read(lost, 0, content(0, a)));
  CHECK(may_read(lost, 0, content(0, b)));
  CHECK(may_read(lost, 0, content(0, c)));
  CHECK_FALSE(may_read(lost, 0, kZeros));
}

TEST_CASE("FUA is durable at once, and so is what was acknowledged before a clean close") {
  Model model({.sectors = 1});
  const std::uint64_t a = written(model, false, true);
  model.crash(Crash::power_loss);
  CHECK(may_read(model, 0, content(0, a)));
  CHECK_FALSE(may_read(model, 0, kZeros));
  const std::uint64_t b = written(model);
  model.closed();
  model.crash(Crash::power_loss);
  CHECK_FALSE(may_read(model, 0, content(0, a)));
  CHECK(may_read(model, 0, content(0, b)));
}

TEST_CASE("zeros are a version like others") {
  Model model({.sectors = 1});
  const std::uint64_t a = written(model, false, true);
  written(model, true);
  CHECK(may_read(model, 0, kZeros));
  CHECK_FALSE(may_read(model, 0, content(0, a)));
  const std::uint64_t c = written(model);
  CHECK_FALSE(may_read(model, 0, kZeros));
  model.crash(Crash::power_loss);
  CHECK(may_read(model, 0, kZeros));
  CHECK(may_read(model, 0, content(0, a)));
  CHECK(may_read(model, 0, content(0, c)));
}

TEST_CASE("settling leaves only what was seen, durable where an open makes it so") {
  for (const bool durable : {true, false}) {
    Model model({.sectors = 1, .open_is_durable = durable});
    const std::uint64_t a = written(model, false, true);
    const std::uint64_t b = written(model);
    const std::uint64_t c = written(model);
    model.crash(Crash::kill);
    CHECK_FALSE(model.settle(0, 1, content(0, b).data()).empty());
    CHECK(model.settle(0, 1, content(0, c).data()).empty());
    CHECK_FALSE(may_read(model, 0, content(0, b)));
    model.crash(Crash::power_loss);
    CHECK(may_read(model, 0, content(0, c)));
    CHECK(may_read(model, 0, content(0, b)) == !durable);
    CHECK(may_read(model, 0, content(0, a)) == !durable);
  }
}

TEST_CASE("a mixed sector is wrong for a sealed image and right for a raw one") {
  for (const std::uint32_t unit : {4096U, 512U}) {
    Model model({.sectors = 1, .unit = unit});
    const std::uint64_t a = written(model, false, true);
    const std::uint64_t b = written(model);
    model.crash(Crash::power_loss);
    Bytes mix = content(0, a);
    const Bytes newer = content(0, b);
    std::copy(newer.begin() + 1024, newer.begin() + 2048, mix.begin() + 1024);
    CHECK(may_read(model, 0, mix) == (unit == 512));
  }
}

TEST_CASE("the nonce trace finds a pair that comes twice, and only that") {
  NonceTrace trace;
  const std::uint8_t key[2][2] = {{1, 2}, {1, 3}};
  const std::uint8_t nonce[2][3] = {{0, 0, 1}, {0, 0, 2}};
  for (const auto& k : key) {
    for (const auto& n : nonce) trace.consume(k, n);
  }
  CHECK(trace.duplicate().empty());
  CHECK(trace.count() == 4);
  trace.consume(key[1], nonce[0]);
  CHECK(trace.duplicate() == "nonce 000001 was used twice under key 0103");
}
