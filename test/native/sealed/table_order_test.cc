// A table whose pointer is on its way to the medium is not relied on by others: what they had
// acknowledged could not be opened after a power loss.
//
// Room test/sealed.
#include <doctest/doctest.h>

#include "image/sealed_backend.h"
#include "sim/images.h"

namespace pqblk::sim {
namespace {

constexpr std::uint64_t kImages = 64;

iovec one_sector(std::uint8_t* memory) { return {memory, kSectorSize}; }

Task<void> open_into(const Subject& subject, image::QueueContext& q, io::File& file,
                     std::unique_ptr<image::Backend>& out, bool& done) {
  auto opened = co_await subject.open(q, file);
  if (opened) out = std::move(*opened);
  done = true;
}

Task<void> close_it(image::Backend& disk, image::QueueContext& q, bool& done) {
  CHECK_FALSE(co_await disk.close(q));
  done = true;
}

Task<void> zero_first(image::Backend& disk, image::QueueContext& q, bool& done) {
  CHECK_FALSE(co_await disk.write_zeroes(q, {0}, kSectorSize, 0));
  done = true;
}

Task<void> write_durably(image::Backend& disk, image::QueueContext& q, Sector s,
                         std::uint8_t* memory, bool& done) {
  const iovec v = one_sector(memory);
  CHECK_FALSE(co_await disk.write(q, {s.value * kSectorSize}, {{&v, 1}, 0, kSectorSize}, true));
  done = true;
}

Task<void> read_it(image::Backend& disk, image::QueueContext& q, Sector s, std::uint8_t* memory,
                   bool& done) {
  const iovec v = one_sector(memory);
  CHECK_FALSE(co_await disk.read(q, {s.value * kSectorSize}, {{&v, 1}, 0, kSectorSize}));
  done = true;
}

// Whether a disk that lost power like this opens, and has the sector.
bool survives(const Subject& subject, Device image, Sector s) {
  QuietChoices quiet;
  World world(quiet);
  image::QueueContext q(world.add_queue(), 0);
  io::File& file = world.add_file("sealed", std::move(image), subject.file);
  std::unique_ptr<image::Backend> disk;
  bool opened = false, read = false, closed = false;
  world.spawn(world.queue(0), open_into(subject, q, file, disk, opened));
  world.run_until([&] { return opened; });
  if (!disk) return false;
  AlignedBuffer found(kSectorSize);
  world.spawn(world.queue(0), read_it(*disk, q, s, found.data(), read));
  world.run_until([&] { return read; });
  world.spawn(world.queue(0), close_it(*disk, q, closed));
  world.run_until([&] { return closed; });
  return look_at_block(found.data()).version == 1;
}

TEST_CASE("what is acknowledged while another makes the table survives power loss") {
  constexpr Sector kWritten{5};
  const Subject subject = checked_sealed_subject({.sectors = 16}, true);
  std::string error;
  const Device fresh = fresh_image(subject, error);
  REQUIRE(error.empty());
  QuietChoices quiet;
  World world(quiet, {.newest_first = true});
  image::QueueContext zeroer(world.add_queue(), 0), writer(world.add_queue(), 1),
      service(world.add_queue(), 2);
  io::File& file = world.add_file("sealed", fresh, subject.file);
  std::unique_ptr<image::Backend> disk;
  bool opened = false, zeroed = false, written = false, closed = false;
  world.spawn(world.queue(2), open_into(subject, service, file, disk, opened));
  world.run_until([&] { return opened; });
  REQUIRE(disk);
  auto& tables = static_cast<image::SealedBackend&>(*disk).metadata().tables();
  world.spawn(world.queue(0), zero_first(*disk, zeroer, zeroed));
  world.run_until([&] { return zeroed || tables.l1_entry(0) != 0; });
  REQUIRE_FALSE(zeroed);  // the pointer is in memory only
  AlignedBuffer block(kSectorSize);
  fill_sector(block.data(), kWritten.value, 1);
  world.spawn(world.queue(1), write_durably(*disk, writer, kWritten, block.data(), written));
  world.run_until([&] { return written; });
  std::uint64_t lost = 0;
  for (std::uint64_t seed = 1; seed <= kImages; ++seed) {
    RandomChoices random(seed);
    if (!survives(subject, world.device(file).power_loss(random), kWritten)) ++lost;
  }
  CHECK(lost == 0);
  world.run_until([&] { return zeroed; });
  world.spawn(world.queue(2), close_it(*disk, service, closed));
  world.run_until([&] { return closed; });
  world.drain();
}

}  // namespace
}  // namespace pqblk::sim
