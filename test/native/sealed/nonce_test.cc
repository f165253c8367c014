// No (key, nonce) pair repeats: lanes by themselves, copies of one image that both live on, queues
// that come and go.
#include "sealed/nonce.h"

#include <doctest/doctest.h>

#include <set>
#include <string>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

std::string text(const crypto::Nonce& n) { return std::string(n.begin(), n.end()); }

void must(const Error& e) { REQUIRE_MESSAGE(!e, e.to_string()); }

// Every (session, salt, nonce, key) that the engine consumed while this lives.
struct Trace {
  Trace() {
    seen().clear();
    repeated() = false;
    sealed::nonce_tracer.store(&consume);
  }
  ~Trace() { sealed::nonce_tracer.store(nullptr); }
  static std::set<std::string>& seen() {
    static std::set<std::string> all;
    return all;
  }
  static bool& repeated() {
    static bool value = false;
    return value;
  }
  static void consume(std::uint32_t session, const std::uint8_t* salt, const crypto::Nonce& nonce,
                      bool log) {
    std::string key(salt, salt + 32);
    key += std::to_string(session) + (log ? "log" : "sector") + text(nonce);
    if (!seen().insert(key).second) repeated() = true;
  }
};

}  // namespace

TEST_CASE("a lane counts, and no two lanes meet") {
  std::set<std::string> seen;
  sealed::NonceLane lanes[3];
  for (std::uint16_t i = 0; i < 3; ++i) must(lanes[i].begin(i));
  for (int n = 0; n < 1000; ++n) {
    for (auto& lane : lanes) {
      crypto::Nonce nonce;
      REQUIRE(lane.claim(1));
      must(lane.next(nonce));
      // Lane and counter alone must differ: the random part is no more than a second net.
      CHECK(seen.insert(text(nonce).substr(0, 8)).second);
    }
  }
}

TEST_CASE("a lane is spent after what it may serve") {
  sealed::NonceLane lane;
  CHECK(!lane.claim(1));  // not begun
  must(lane.begin(7, 10));
  CHECK(lane.claim(6));
  CHECK(!lane.claim(5));  // although none was taken yet
  CHECK(lane.claim(4));
  CHECK(!lane.has(1));
  crypto::Nonce nonce;
  for (int i = 0; i < 10; ++i) must(lane.next(nonce));
  CHECK(nonce[0] == 0);
  CHECK(nonce[1] == 7);
  CHECK(nonce[7] == 9);
}

// The nonce is consumed before the ciphertext is made and stays so when the write fails (I4).
TEST_CASE("a failed write has consumed its nonces") {
  const Trace trace;
  const SealedShape shape{.session_sectors_max = 1 << 20};
  Lab lab(shape);
  must(lab.create());
  must(lab.open());
  must(lab.write(0, 1));
  lab.world().options().faults.file_size_max = 0;  // every write fails
  const std::size_t before = Trace::seen().size();
  CHECK(!lab.write(0, 2).ok());
  CHECK(Trace::seen().size() > before);
  lab.world().options().faults = {};
  CHECK(!lab.write(0, 3).ok());  // nothing is written any more
  static_cast<void>(lab.close().ok());
  Lab again(shape, killed(lab.image()));
  must(again.open());
  must(again.write(0, 4));
  CHECK(again.look(0) == "v4");
  CHECK(!Trace::repeated());
}

TEST_CASE("copies of one image that are both written share no nonce") {
  const SealedShape shape;
  Lab origin(shape);
  must(origin.create());
  must(origin.open());
  must(origin.write(0, 1, 8));
  const sim::Device midway = killed(origin.image());  // not closed: the log is live
  const Trace trace;
  std::set<std::string> salts;
  for (int copy = 0; copy < 4; ++copy) {
    Lab life(shape, midway);
    must(life.open());
    for (std::uint64_t i = 0; i < 100; ++i) must(life.write(i % 16, 2 + i));
    CHECK(life.look(3) == "v101");  // the last write of sector 3 was number 99
    must(life.close());
    // Equal session numbers, other salts.
    const Places at = places_of(life.image().cache());
    std::uint8_t salt[32];
    life.image().cache().read(at.extension.session_table[0] + 2 * 128 + 16, salt, 32);
    CHECK(salts.insert(std::string(salt, salt + 32)).second);
  }
  CHECK(Trace::seen().size() > 400);
  CHECK(!Trace::repeated());
}

TEST_CASE("an image that is opened again and again never repeats a nonce") {
  const Trace trace;
  const SealedShape shape;
  Lab origin(shape);
  must(origin.create());
  sim::Device image = killed(origin.image());
  for (std::uint64_t life = 0; life < 30; ++life) {
    Lab lab(shape, image);
    must(lab.open());
    for (std::uint64_t i = 0; i < 5; ++i) must(lab.write(i, 1 + life));
    CHECK(lab.backend().session_id() >= life + 1);
    if (life % 2 == 0) must(lab.close());
    image = killed(lab.image());  // every other one is killed
  }
  CHECK(!Trace::repeated());
}

// 511 sessions fit into the table that a new image has.
TEST_CASE("the session table grows, and older sessions stay readable") {
  const SealedShape shape{.session_sectors_max = 2};
  Lab lab(shape);
  must(lab.create());
  must(lab.open());
  must(lab.write(30, 7));
  for (std::uint64_t i = 0; i < 1100; ++i) must(lab.write(i % 4, 1 + i));
  CHECK(lab.backend().session_id() > 520);
  CHECK(lab.backend().extension().session_table_length > 64 * kKiB);
  must(lab.close());
  Lab again(shape, killed(lab.image()));
  must(again.open());
  CHECK(again.look(30) == "v7");
  CHECK(again.look(3) == "v1100");
  CHECK(again.look(0) == "v1097");
}
