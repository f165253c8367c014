// How often a disk that was just opened goes to the medium for its entries, counted: pages that are
// needed together, or by a stream, come together.
#include <doctest/doctest.h>

#include "base/aligned.h"
#include "sealed/sealed_lab.h"
#include "sealed/sealed_subject.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint64_t kSectors = 4096;  // 32 pages of entries, in two entry clusters
constexpr std::uint64_t kStep = 256;      // 1 MiB

const SealedShape kShape{.sectors = kSectors,
                         .cluster_bits = 16,
                         .log_bytes = 8 << 20,
                         .overlay_sectors_max = 1 << 20,
                         .session_sectors_max = 1 << 20};

// Written once, from its beginning to its end, and closed.
sim::Device written_disk() {
  Lab lab(kShape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  for (std::uint64_t s = 0; s < kSectors; s += kStep) REQUIRE_FALSE(lab.write(s, 1, kStep));
  REQUIRE_FALSE(lab.close());
  return lab.image();
}

// Where the medium has a page of entries; `page` counts from the disk's beginning.
std::uint64_t host_of_page(Lab& lab, std::uint64_t page) {
  const sealed::EntryPlace place = lab.backend().sealed_geometry().entry_place({page * 128});
  const Places places = places_of(lab.image().cache());
  return sealed::l2_host(load64(lab.image().cache(), places.slot(place.slot.value))) + place.offset;
}

Task<void> read_one(Lab& lab, std::uint64_t sector, bool& done, Error& error) {
  AlignedBuffer memory(kSectorSize);
  const iovec all{memory.data(), memory.size()};
  error = co_await lab.backend().read(lab.queue(), {sector << kSectorShift},
                                      {{&all, 1}, 0, memory.size()});
  done = true;
}

// Operations on the medium for one read; 0 when it failed.
std::uint64_t cost_of_read(Lab& lab, std::uint64_t sector, std::uint64_t count) {
  AlignedBuffer memory(count * kSectorSize);
  const iovec all{memory.data(), memory.size()};
  const std::uint64_t before = lab.world().operations();
  const Error e = lab.run(
      lab.backend().read(lab.queue(), {sector << kSectorShift}, {{&all, 1}, 0, memory.size()}),
      Error(Kind::canceled, "hang"));
  CHECK_FALSE(e);
  return e ? 0 : lab.world().operations() - before;
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("a stream of reads finds its entries there, but for the first of each entry cluster") {
  Lab lab(kShape, written_disk());
  REQUIRE_FALSE(lab.open(true));
  REQUIRE(lab.backend().sealed_geometry().entry_offset({kSectors / 2}) == 0);
  cost_of_read(lab, 0, 1);                  // tables, and page 0
  CHECK(cost_of_read(lab, 0, kStep) == 2);  // page 1 begins a stream, which takes the rest
  for (std::uint64_t s = kStep; s < kSectors; s += kStep) {
    CHECK(cost_of_read(lab, s, kStep) == (s == kSectors / 2 ? 2 : 1));
  }
}

TEST_CASE("a read elsewhere loads the pages that it needs, in one piece, and no more") {
  Lab lab(kShape, written_disk());
  REQUIRE_FALSE(lab.open(true));
  cost_of_read(lab, 0, 1);
  CHECK(cost_of_read(lab, 1024, 2 * kStep) == 2);  // pages 8 to 11
  CHECK(cost_of_read(lab, 1024, 2 * kStep) == 1);
  CHECK(cost_of_read(lab, 1024 + 2 * kStep + 64, 1) == 2);  // page 12
}

TEST_CASE("a sector whose page is not there is fetched beside it") {
  sim::Device image = written_disk();
  SUBCASE("so that its reader waits once") {
    Lab lab(kShape, std::move(image));
    REQUIRE_FALSE(lab.open(true));
    cost_of_read(lab, 0, 1);
    bool done = false;
    Error error;
    const std::uint64_t before = lab.world().operations();
    lab.world().spawn(lab.world().queue(0), read_one(lab, 1024, done, error));
    std::string pending;
    lab.world().run_until([&] {
      pending = lab.world().pending();
      return done || pending.find("in flight") != std::string::npos;
    });
    CHECK(pending.find("in flight") != pending.rfind("in flight"));  // two, from the first on
    lab.world().drain();
    CHECK(done);
    CHECK_FALSE(error);
    CHECK(lab.world().operations() == before + 2);
  }
  SUBCASE("and what the entry says counts: zeros here") {
    {
      Lab lab(kShape, std::move(image));
      REQUIRE_FALSE(lab.open());
      REQUIRE_FALSE(lab.zero(1030, 3));
      REQUIRE_FALSE(lab.close());
      image = lab.image();
    }
    Lab lab(kShape, std::move(image));
    REQUIRE_FALSE(lab.open(true));
    CHECK(lab.look(1031) == "zeros");
    CHECK(lab.look(1029) == "v1");
  }
  SUBCASE("and so does what the medium says") {
    Lab lab(kShape, std::move(image));
    REQUIRE_FALSE(lab.open(true));
    const sealed::SealedGeometry& geometry = lab.backend().sealed_geometry();
    const Slot slot = geometry.data_slot(geometry.cluster_of({1024}));
    const Places places = places_of(lab.image().cache());
    const std::uint64_t host =
        sealed::l2_host(load64(lab.image().cache(), places.slot(slot.value)));
    lab.world().options().faults.unreadable_at = host + 100;
    CHECK(lab.look(1024) == "io_error");
    lab.world().options().faults.unreadable_at = ~std::uint64_t{0};
    CHECK(lab.look(1024) == "v1");
  }
}

TEST_CASE("a page that cannot be read is nobody's error but of those who want it") {
  Lab lab(kShape, written_disk());
  REQUIRE_FALSE(lab.open(true));
  cost_of_read(lab, 0, 1);
  lab.world().options().faults.unreadable_at = host_of_page(lab, 7) + 100;
  SUBCASE("though it was to come along, which is tried once") {
    CHECK(cost_of_read(lab, 128, 1) == 3);  // pages 1 to 15, page 1, and the sector
    CHECK(lab.world().injected() == 1);
    CHECK(lab.look(6 * 128) == "v1");
    CHECK(lab.look(7 * 128) == "io_error");
    CHECK(lab.look(8 * 128) == "v1");
  }
  SUBCASE("though others waited for pages of the same load") {
    // All are asked for before anything completes.
    struct Reader {
      std::uint64_t page;
      bool done = false;
      Error error;
    };
    std::vector<Reader> readers(3);
    readers[0].page = 1;
    readers[1].page = 7;
    readers[2].page = 9;
    lab.world().options().ready_first = true;
    for (Reader& r : readers) {
      lab.world().spawn(lab.world().queue(0), read_one(lab, r.page * 128, r.done, r.error));
    }
    REQUIRE(lab.world().drain() != sim::Outcome::too_long);
    for (Reader& r : readers) {
      INFO("page ", r.page);
      REQUIRE(r.done);
      CHECK(bool(r.error) == (r.page == 7));
    }
    // The load of all, of this page for who waits, and by himself, whose error it then is.
    CHECK(lab.world().injected() == 3);
  }
  lab.world().options().faults.unreadable_at = ~std::uint64_t{0};
  CHECK(lab.look(7 * 128) == "v1");
}

TEST_CASE("a checkpoint loads the pages that it changes together") {
  Lab lab(kShape, written_disk());
  REQUIRE_FALSE(lab.open());
  for (std::uint64_t s = 0; s < kSectors; s += kStep) REQUIRE_FALSE(lab.write(s, 2, kStep));
  const std::uint64_t before = lab.world().operations();
  REQUIRE_FALSE(lab.checkpoint());
  // Two reads and two writes of entries; the rest is syncs, the log's header and tables.
  CHECK(lab.world().operations() - before <= 20);
  for (std::uint64_t s = 0; s < kSectors; s += 100) CHECK(lab.look(s) == "v2");
}
