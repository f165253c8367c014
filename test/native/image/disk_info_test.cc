// What a look at a disk's file says while its owner changes it.
#include "image/disk_info.h"

#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <thread>

#include "image/disk.h"
#include "image/disk_create.h"
#include "image/disk_harness.h"

using namespace pqblk;         // NOLINT
using namespace pqblk::image;  // NOLINT

TEST_CASE("a disk that is looked at while it grows") {
  const test::TempFile temp(0, "/dev/shm");
  CreateSpec spec;
  spec.path = temp.path();
  spec.format = Format::qcow2;
  spec.size = 1 * kMiB;
  spec.cluster_size = 512;  // an L2 table maps 32 KiB: L1 moves at nearly every step
  spec.overwrite = true;
  REQUIRE_FALSE(create_disk(spec));
  OpenOptions options;
  options.path = temp.path();
  options.format = Format::qcow2;
  auto disk = Disk::open(std::move(options));
  REQUIRE_MESSAGE(disk, disk.error().to_string());

  std::atomic<bool> stop{false};
  int looks = 0;
  std::thread looker([&] {
    std::uint64_t last = 0;
    while (!stop) {
      const auto info = read_disk_info(temp.path(), std::nullopt);
      CHECK_MESSAGE(info, info.error().to_string());
      if (!info) return;
      CHECK(info->format == Format::qcow2);
      CHECK(info->size >= last);  // it never shrinks
      last = info->size;
      ++looks;
    }
  });
  for (std::uint64_t size = 2; size <= 256; ++size) CHECK_FALSE((*disk)->resize(size * kMiB));
  stop = true;
  looker.join();
  CHECK(looks > 0);
  CHECK_FALSE((*disk)->close());
}
