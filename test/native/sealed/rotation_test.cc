// Steps of a rotation that fail, on a quiet simulated device.
#include <doctest/doctest.h>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

Error finish(Lab& lab, std::uint32_t epoch) {
  return lab.run(lab.backend().finish_epoch(lab.queue(), epoch), Error(Kind::io_error, "hang"));
}

// Sessions of one sector each, until the table of sessions holds no more.
void fill_session_table(Lab& lab) {
  const auto table = places_of(lab.image().cache()).extension.session_table_length;
  const std::uint64_t sessions = table / sealed::kSessionEntryBytes - 1;
  for (std::uint64_t i = 0; i < sessions; ++i) REQUIRE_FALSE(lab.write(0, i + 1));
}

// Nothing beyond the end of the file can be had, and nothing before it is left.
void fill_file(Lab& lab) {
  lab.world().options().faults.file_size_max = lab.image().cache().size();
  auto& allocator = lab.backend().metadata().allocator();
  Error e;
  while (!e) {
    using Taken = Result<format::qcow2::HostRun>;
    Taken taken = lab.run(allocator.take(lab.queue().io, 1), Taken(Error(Kind::canceled, "hang")));
    if (!taken) e = taken.take_error();
  }
  REQUIRE(e.kind() == Kind::no_space);
}

// The last of the epochs is the one to write under.
image::SealedOptions with_keys(const SealedShape& shape,
                               std::initializer_list<std::uint32_t> epochs) {
  image::SealedOptions options = open_options(shape);
  options.keys.data.clear();
  for (const std::uint32_t epoch : epochs) {
    options.keys.data.push_back(test_data_key(epoch));
    options.keys.current_epoch = epoch;
  }
  return options;
}

// As a power loss would: of what was written since, the places that held nothing hold nothing
// again.
sim::Device without_fresh_places(const sim::Device& before, const sim::Device& after) {
  sim::Device image = after;
  std::vector<std::uint8_t> was(sealed::kPage), is(sealed::kPage);
  const std::vector<std::uint8_t> zeros(sealed::kPage);
  const auto log = places_of(after.cache()).extension;
  for (std::uint64_t at = log.log_offset + log.log_length; at < after.size(); at += sealed::kPage) {
    before.cache().read(at, was.data(), sealed::kPage);
    after.cache().read(at, is.data(), sealed::kPage);
    if (was == zeros && is != zeros) image.overwrite(at, zeros.data(), sealed::kPage);
  }
  return image;
}

}  // namespace

TEST_SUITE_BEGIN("solo");

// The key is known, but the running session is of the old epoch: the table of sessions has no room,
// and nor has the file. Nothing on the disk is of the old epoch, so that only the session shows it.
TEST_CASE("an epoch whose session could not begin is not finished") {
  const SealedShape shape{.cluster_bits = 12, .session_sectors_max = 1, .relocate_bytes_min = kGiB};
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  fill_session_table(lab);
  REQUIRE_FALSE(lab.zero(0));
  const std::uint32_t session = lab.backend().session_id();

  fill_file(lab);
  CHECK(lab.begin_epoch(2).kind() == Kind::no_space);
  CHECK(lab.backend().epoch() == 2);
  CHECK(lab.backend().session_id() == session);
  CHECK(finish(lab, 2).kind() == Kind::canceled);

  // With room for the session the same steps lead to the end, and what is written then stays.
  lab.world().options().faults.file_size_max = ~std::uint64_t{0};
  REQUIRE_FALSE(lab.begin_epoch(2));
  CHECK(lab.backend().session_id() != session);
  REQUIRE_FALSE(finish(lab, 2));
  REQUIRE_FALSE(lab.write(1, 7));
  REQUIRE_FALSE(lab.close());
  image::SealedOptions options = open_options(shape);
  options.keys.data.clear();
  options.keys.data.push_back(test_data_key(2));
  options.keys.current_epoch = 2;
  REQUIRE_FALSE(lab.open(std::move(options)));
  CHECK(lab.look(0) == "zeros");
  CHECK(lab.look(1) == "v7");
}

// Recovery leaves a log without a session, so that only the table of sessions shows what the keys
// lack.
TEST_CASE(
    "keys of an epoch that is past open nothing, also after a recovery that nobody followed") {
  const SealedShape shape;
  const auto with_key = [&](std::uint32_t epoch) { return with_keys(shape, {epoch}); };
  Lab before(shape);
  REQUIRE_FALSE(before.create());
  REQUIRE_FALSE(before.open(with_key(1)));
  REQUIRE_FALSE(before.begin_epoch(2));
  REQUIRE_FALSE(before.write(0, 7));
  REQUIRE_FALSE(finish(before, 2));
  REQUIRE_FALSE(before.write(1, 8));
  REQUIRE_FALSE(before.flush());

  Lab lab(shape, killed(before.image()));
  REQUIRE_FALSE(lab.open(with_key(2)));
  REQUIRE(lab.backend().recovery().records > 0);
  REQUIRE_FALSE(lab.close());
  CHECK(lab.open(with_key(1)).kind() == Kind::wrong_key);
  REQUIRE_FALSE(lab.open(with_key(2)));
  CHECK(lab.look(0) == "v7");
  CHECK(lab.look(1) == "v8");
}

// One copy of the key area was of the end of a rotation, the other one of before, and an opener
// that could read only the latter lends its current epoch.
TEST_CASE("who opens a disk goes on in the epoch of its newest session") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open(with_keys(shape, {1})));
  REQUIRE_FALSE(lab.begin_epoch(2));
  REQUIRE_FALSE(lab.write(0, 7));
  REQUIRE_FALSE(lab.close());
  REQUIRE_FALSE(lab.open(with_keys(shape, {2, 1})));
  CHECK(lab.backend().epoch() == 2);
  REQUIRE_FALSE(lab.write(1, 8));
  REQUIRE_FALSE(lab.close());
  REQUIRE_FALSE(lab.open(with_keys(shape, {2})));
  CHECK(lab.look(0) == "v7");
  CHECK(lab.look(1) == "v8");
}

// Going back had come half the way: the newest session is of the old epoch, a sector's last whole
// version of the one that was given up.
TEST_CASE("a log is not folded with keys that lack one of the versions to choose from") {
  const SealedShape shape;
  Lab before(shape);
  REQUIRE_FALSE(before.create());
  REQUIRE_FALSE(before.open(with_keys(shape, {1})));
  REQUIRE_FALSE(before.write(0, 1, 2));
  REQUIRE_FALSE(before.begin_epoch(2));
  REQUIRE_FALSE(before.write(0, 2, 2));
  REQUIRE_FALSE(before.write(2, 2, 2));
  REQUIRE_FALSE(before.checkpoint());
  REQUIRE_FALSE(before.begin_epoch(1));
  REQUIRE_FALSE(before.write(4, 3));
  REQUIRE_FALSE(before.flush());
  const sim::Device early = killed(before.image());
  REQUIRE_FALSE(before.write(0, 4, 2));
  REQUIRE_FALSE(before.flush());

  Lab lab(shape, without_fresh_places(early, killed(before.image())));
  CHECK(lab.open(with_keys(shape, {1})).kind() == Kind::wrong_key);
  REQUIRE_FALSE(lab.open(with_keys(shape, {2, 1})));
  CHECK(lab.backend().recovery().damaged == 0);
  CHECK(lab.look(0) == "v2");
  CHECK(lab.look(1) == "v2");
  CHECK(lab.look(4) == "v3");
}

// Of the log's header two copies are kept, so that one can go: neither may name a session that the
// table has lost, though the disk holds nothing else that a checkpoint would write.
TEST_CASE("a disk without data opens with either log header after a rotation") {
  const SealedShape shape;
  Lab lab(shape);
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  REQUIRE_FALSE(lab.write(0, 1));
  REQUIRE_FALSE(lab.checkpoint());
  REQUIRE_FALSE(lab.zero(0));
  REQUIRE_FALSE(lab.checkpoint());
  REQUIRE_FALSE(lab.begin_epoch(2));
  REQUIRE_FALSE(finish(lab, 2));
  const sim::Device running = killed(lab.image());
  REQUIRE_FALSE(lab.close());
  for (const sim::Device& image : {running, lab.image()}) {
    const std::uint64_t log = places_of(image.cache()).extension.log_offset;
    for (const std::uint64_t copy : {log, log + sealed::kPage}) {
      sim::Device damaged = image;
      const std::vector<std::uint8_t> zeros(sealed::kPage);
      damaged.overwrite(copy, zeros.data(), zeros.size());
      Lab after(shape, damaged);
      REQUIRE_FALSE(after.open(with_keys(shape, {2})));
      CHECK(after.look(0) == "zeros");
      REQUIRE_FALSE(after.close());
    }
  }
}

TEST_SUITE_END();
