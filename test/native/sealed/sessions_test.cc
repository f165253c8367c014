// More sessions than a process keeps keys of, and no room for a key at all: what cannot be opened
// for want of memory is not taken for damage.
#include <doctest/doctest.h>

#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint64_t kSectors = 64;  // four clusters
const SealedShape kShape{.sectors = kSectors,
                         .cluster_bits = 16,
                         .log_bytes = kMiB,
                         .overlay_sectors_max = 1024,
                         .session_sectors_max = 1,
                         .relocate_bytes_min = kGiB};

// Keys of somebody else in this process.
class Others {
 public:
  void take_until_scarce() {
    while (!crypto::aead_keys_scarce()) REQUIRE(take());
  }
  void take_all_but(std::size_t left) {
    while (take()) {
    }
    keys_.resize(keys_.size() - left);
  }
  void release() { keys_.clear(); }

 private:
  bool take() {
    const std::array<std::uint8_t, crypto::kKeyBytes> bytes{};
    auto key = crypto::AeadKey::create(crypto::Suite::aes_256_gcm, bytes);
    if (key) keys_.push_back(std::make_unique<crypto::AeadKey>(std::move(*key)));
    return static_cast<bool>(key);
  }
  std::vector<std::unique_ptr<crypto::AeadKey>> keys_;
};

// Each sector is of a session of its own.
void write_under_many(Lab& lab) {
  REQUIRE_FALSE(lab.create());
  REQUIRE_FALSE(lab.open());
  for (std::uint64_t s = 0; s < kSectors; ++s) REQUIRE_FALSE(lab.write(s, s + 1));
  REQUIRE_FALSE(lab.close());
}

std::uint64_t count_wrong(Lab& lab) {
  std::uint64_t wrong = 0;
  for (std::uint64_t s = 0; s < kSectors; ++s) {
    if (lab.look(s) != "v" + std::to_string(s + 1)) ++wrong;
  }
  return wrong;
}

Error verify(Lab& lab, std::uint64_t& bad) {
  const auto count = [&bad](Sector) { ++bad; };
  auto looked = lab.run(lab.backend().verify(lab.queue(), {0}, kSectors, count, count),
                        Result<std::uint64_t>(Error(Kind::canceled, "hang")));
  return looked ? Error() : looked.take_error();
}

// Whole clusters are overwritten, and a power loss keeps the log and nothing of the new clusters.
sim::Device without_new_clusters(Lab& lab) {
  image::SealedOptions options = open_options(kShape);
  options.session_sectors_max = 1 << 20;
  options.relocate_bytes_min = kSectorSize;
  REQUIRE_FALSE(lab.open(std::move(options)));
  for (std::uint64_t s = 0; s < kSectors; s += 16) REQUIRE_FALSE(lab.write(s, 1000, 16));
  sim::Pages bytes = killed(lab.image()).cache();
  for (std::uint64_t c = 0; c < kSectors / 16; ++c) {
    sealed::SlotVersion moved;
    const Slot slot = lab.backend().sealed_geometry().data_slot({c});
    REQUIRE(lab.backend().overlay().find_slot(slot, moved));
    REQUIRE(sealed::l2_host(moved.entry) != sealed::l2_host(moved.old));
    bytes.zero(sealed::l2_host(moved.entry), 16 * kSectorSize);
  }
  REQUIRE_FALSE(lab.close());  // and gives its keys back
  return sim::Device(sim::DeviceFacts{}, bytes);
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("sectors of any number of sessions can be read, verified and written") {
  Lab lab(kShape);
  write_under_many(lab);
  Others others;
  others.take_until_scarce();
  REQUIRE_FALSE(lab.open());
  CHECK(count_wrong(lab) == 0);
  others.take_all_but(3);  // two for the session to write under, one to read with
  CHECK(count_wrong(lab) == 0);
  std::uint64_t bad = 0;
  CHECK_FALSE(verify(lab, bad));
  CHECK(bad == 0);
  CHECK_FALSE(lab.write(0, 1));
  CHECK(count_wrong(lab) == 0);
}

TEST_CASE("no room for a key is no damage, and ends with the need") {
  Lab lab(kShape);
  write_under_many(lab);
  REQUIRE_FALSE(lab.open());
  Others others;
  others.take_all_but(0);
  CHECK(lab.look(0) == "no_memory");
  CHECK(lab.write(0, 7).kind() == Kind::no_memory);
  std::uint64_t bad = 0;
  CHECK(verify(lab, bad).kind() == Kind::no_memory);
  CHECK(bad == 0);
  others.release();
  CHECK(count_wrong(lab) == 0);
  CHECK_FALSE(lab.write(0, 1));
}

TEST_CASE("recovery loses nothing for want of a key") {
  Lab before(kShape);
  write_under_many(before);
  Lab lab(kShape, without_new_clusters(before));
  Others others;
  others.take_all_but(0);
  CHECK(lab.open().kind() == Kind::no_memory);
  others.take_all_but(2);  // what the log is read with
  REQUIRE_FALSE(lab.open());
  CHECK(lab.backend().recovery().damaged == 0);
  CHECK(count_wrong(lab) == 0);
}

TEST_SUITE_END();
