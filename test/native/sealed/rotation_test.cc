// Steps of a rotation that fail, on a quiet simulated device.
#include <doctest/doctest.h>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

Error begin(Lab& lab, std::uint32_t epoch) {
  return lab.run(lab.backend().begin_epoch(lab.queue(), test_data_key(epoch)),
                 Error(Kind::canceled, "hang"));
}

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
  CHECK(begin(lab, 2).kind() == Kind::no_space);
  CHECK(lab.backend().epoch() == 2);
  CHECK(lab.backend().session_id() == session);
  CHECK(finish(lab, 2).kind() == Kind::canceled);

  // With room for the session the same steps lead to the end, and what is written then stays.
  lab.world().options().faults.file_size_max = ~std::uint64_t{0};
  REQUIRE_FALSE(begin(lab, 2));
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
  const auto with_key = [&](std::uint32_t epoch) {
    image::SealedOptions options = open_options(shape);
    options.keys.data.clear();
    options.keys.data.push_back(test_data_key(epoch));
    options.keys.current_epoch = epoch;
    return options;
  };
  Lab before(shape);
  REQUIRE_FALSE(before.create());
  REQUIRE_FALSE(before.open(with_key(1)));
  REQUIRE_FALSE(begin(before, 2));
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

TEST_SUITE_END();
