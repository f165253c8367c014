// A log header of which one copy is gone: a medium does not give it out, or what took its place
// does not hold. Whatever was flushed is found, or the disk stays shut.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "sealed/sealed_lab.h"
#include "sealed/sealed_subject.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

using sealed::kLogHeadBytes;
using sealed::kPage;

std::uint64_t log_of(const sim::Device& image) {
  return places_of(image.cache()).extension.log_offset;
}

std::uint64_t newer_copy(const sim::Device& image) {
  constexpr std::uint64_t kSerialAt = 8;
  const std::uint64_t log = log_of(image);
  const std::uint64_t a = load64(image.cache(), log + kSerialAt);
  const std::uint64_t b = load64(image.cache(), log + kPage + kSerialAt);
  return a > b ? log : log + kPage;
}

std::uint64_t older_copy(const sim::Device& image) {
  return 2 * log_of(image) + kPage - newer_copy(image);
}

void put(sim::Device& image, std::uint64_t at, const sim::Device& from, std::uint64_t source,
         std::size_t length = kPage) {
  std::vector<std::uint8_t> bytes(length);
  from.cache().read(source, bytes.data(), length);
  image.overwrite(at, bytes.data(), length);
}

sim::Device zeroed(sim::Device image, std::uint64_t at) {
  const std::vector<std::uint8_t> zeros(kPage);
  image.overwrite(at, zeros.data(), zeros.size());
  return image;
}

std::string look(Lab& lab) {
  std::string all;
  for (std::uint64_t s = 0; s < 4; ++s) all += lab.look(s) + " ";
  return all;
}

// What the first sectors hold, or why the disk does not open. A writer closes it, and what it left
// must be the same, with either copy of the header.
std::string found(const SealedShape& shape, const sim::Device& image, bool writes,
                  std::uint64_t unreadable = ~std::uint64_t{0}) {
  Lab lab(shape, image);
  lab.world().options().faults.unreadable_at = unreadable;
  if (Error e = lab.open(!writes)) return std::string(kind_name(e.kind()));
  const std::string all = look(lab);
  if (!writes) return all;
  REQUIRE_FALSE(lab.close());
  const sim::Device left = lab.image();
  // A writer who wrote nothing had nothing to mend.
  if (load64(left.cache(), newer_copy(left)) == 0 || load64(left.cache(), older_copy(left)) == 0) {
    return all;
  }
  for (const std::uint64_t copy : {newer_copy(left), older_copy(left)}) {
    CHECK(found(shape, zeroed(left, copy), false) == all);
  }
  return all;
}

// The same for every way in which a copy can be gone, and for readers and writers.
std::string found_without(const SealedShape& shape, const sim::Device& image, std::uint64_t copy) {
  const std::string damaged = found(shape, zeroed(image, copy), false);
  const std::string unread = found(shape, image, false, copy);
  CHECK(found(shape, zeroed(image, copy), true) == damaged);
  CHECK(found(shape, image, true, copy) == unread);
  return damaged == unread ? damaged : damaged + "/ " + unread;
}

constexpr auto kFound = "v1 v2 v3 v3 ";

// Two lives, of which the second one is killed; the header of the first is still there.
sim::Device two_lives(Lab& lab) {
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1, 3));
  REQUIRE_FALSE(lab.checkpoint());
  REQUIRE_FALSE(lab.write(1, 2, 2));
  REQUIRE_FALSE(lab.close());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(2, 3, 2));
  REQUIRE_FALSE(lab.flush());
  return killed(lab.image());
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("the log's first block stands in for the copy of the header that named it") {
  const SealedShape shape;
  Lab lab(shape);
  const sim::Device image = two_lives(lab);
  CHECK(found_without(shape, image, newer_copy(image)) == kFound);
  CHECK(found_without(shape, image, older_copy(image)) == kFound);
}

TEST_CASE("nothing is missing of a disk that was recovered and not written since") {
  const SealedShape shape;
  Lab first(shape);
  Lab lab(shape, two_lives(first));
  REQUIRE_FALSE(lab.open());
  const sim::Device image = killed(lab.image());
  CHECK(found_without(shape, image, newer_copy(image)) == kFound);
  CHECK(found_without(shape, image, older_copy(image)) == kFound);
}

TEST_CASE("a writer is killed once more before the header is whole again") {
  const SealedShape shape;
  Lab first(shape);
  const sim::Device image = two_lives(first);
  Lab lab(shape, zeroed(image, newer_copy(image)));
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 4));
  REQUIRE_FALSE(lab.flush());
  const sim::Device again = killed(lab.image());
  CHECK(found_without(shape, again, newer_copy(again)) == "v4 v2 v3 v3 ");
  CHECK(found_without(shape, again, older_copy(again)) == "v4 v2 v3 v3 ");
}

TEST_CASE("a header that was torn before its first block leaves the disk as it was") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1, 3));
  REQUIRE_FALSE(lab.close());
  const sim::Device before = lab.image();
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(3, 2));
  sim::Device image = killed(lab.image());
  const std::uint64_t ring = log_of(image) + kLogHeadBytes;
  put(image, ring, before, ring);
  CHECK(found_without(shape, image, newer_copy(image)) == "v1 v1 v1 zeros ");
}

TEST_CASE("the first block of a log may be torn, whatever became of the older header") {
  const SealedShape shape;
  Lab lab(shape);
  sim::Device image = two_lives(lab);
  const std::uint64_t ring = log_of(image) + kLogHeadBytes;
  const std::uint8_t torn = 0x5a;
  for (std::uint64_t at = ring + kPage; at < ring + 4 * kPage; at += 8)
    image.overwrite(at, &torn, 1);
  const std::string seen = found(shape, image, false);
  CHECK(found_without(shape, image, older_copy(image)) == seen);
  CHECK(found_without(shape, image, newer_copy(image)) == seen);
}

// The ring has gone round since the header that is left: where the log begins nobody knows.
TEST_CASE("a disk stays shut whose log is there, and cannot be found") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1, 3));
  const sim::Device begun = lab.image();
  for (std::uint64_t v = 2; v < 60; ++v) REQUIRE_FALSE(lab.write(v % 4, v, 2));
  REQUIRE_FALSE(lab.flush());
  sim::Device image = killed(lab.image());
  REQUIRE_FALSE(lab.close());
  put(image, older_copy(image), begun, newer_copy(begun));
  const std::uint64_t newer = newer_copy(image);
  CHECK(found_without(shape, image, newer) == "integrity/ io_error");
}

// Between the tails of both headers one block is damaged, which is dead by the newer one: the older
// one does not lead past it, and what comes after says that it was durable.
TEST_CASE("a disk stays shut whose log is found in part, and was durable beyond that") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1, 3));
  REQUIRE_FALSE(lab.flush());
  for (std::uint64_t v = 2; v < 6; ++v) {
    REQUIRE_FALSE(lab.write(v % 4, v));
    REQUIRE_FALSE(lab.flush());
  }
  const sim::Device image = killed(lab.image());
  const std::uint64_t ring = log_of(image) + kLogHeadBytes;
  for (const std::uint64_t page : {1, 2}) {
    // The first block is the only one that both have, or there is none.
    const sim::Device holed = zeroed(image, ring + page * kPage);
    CAPTURE(page);
    CHECK(found_without(shape, holed, newer_copy(holed)) == "integrity/ io_error");
  }
}

// Whoever holds an old header and an old block could begin a log anew that is past.
TEST_CASE("no block is believed that is not of the last writer") {
  const SealedShape shape;
  Lab lab(shape);
  const sim::Device old = two_lives(lab);
  REQUIRE_FALSE(lab.close());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 9, 4));
  REQUIRE_FALSE(lab.close());
  sim::Device image = lab.image();
  CHECK(found(shape, image, false) == "v9 v9 v9 v9 ");
  const std::uint64_t ring = log_of(image) + kLogHeadBytes;
  put(image, ring, old, ring, 4 * kPage);
  put(image, older_copy(old), old, older_copy(old));
  CHECK(found_without(shape, image, newer_copy(old)) == "integrity/ io_error");
}

TEST_SUITE_END();
