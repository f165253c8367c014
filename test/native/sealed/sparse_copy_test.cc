// A sealed disk whose file was copied with holes, as cp and backup programs do with zeros.
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "image/disk.h"
#include "image/disk_create.h"
#include "image/sealed_backend.h"
#include "io/stage.h"
#include "sealed/sealed_lab.h"
#include "storage/file.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint64_t kDiskBytes = 16 * kMiB;
constexpr std::uint64_t kLogBytes = 4 * kMiB;

void make_disk(const std::string& path) {
  image::CreateSpec spec;
  spec.path = path;
  spec.size = kDiskBytes;
  spec.overwrite = true;
  spec.uuid = test_uuid();
  spec.log_bytes = kLogBytes;
  spec.key_area.resize(sealed::kKeyAreaBytes);
  spec.keys = test_keys();
  const Error e = image::create_disk(spec);
  REQUIRE_MESSAGE(!e, e.to_string());
}

std::uint64_t log = 0;  // where the log's area begins

// Bytes of the log's area that are in holes, once it was opened so.
std::uint64_t holes_after_open(const std::string& path, bool read_only) {
  image::OpenOptions options;
  options.path = path;
  options.format = image::Format::sealed;
  options.keys = test_keys();
  options.expected_uuid = test_uuid();
  options.read_only = read_only;
  options.assume_non_volatile = true;
  auto disk = image::Disk::open(std::move(options));
  REQUIRE_MESSAGE(disk, disk.error().to_string());
  auto& backend = static_cast<image::SealedBackend&>((*disk)->backend());
  log = backend.extension().log_offset;
  const std::uint64_t end = backend.extension().log_offset + backend.extension().log_length;
  std::uint64_t bytes = 0;
  for (std::uint64_t at = backend.extension().log_offset; at < end;) {
    const storage::Hole hole = storage::next_hole(backend.file(), at, end);
    if (hole.begin == hole.end) break;
    bytes += hole.end - hole.begin;
    at = hole.end;
  }
  CHECK_FALSE((*disk)->close());
  return bytes;
}

}  // namespace

TEST_CASE("a log that was copied with holes is whole again when the disk is opened to be written") {
  const std::filesystem::path place = io::test::scratch_directory();
  const std::string name = "pqblk-sparse." + std::to_string(::getpid());
  const std::string first = place / name, copy = place / (name + ".copy");
  make_disk(first);
  CHECK(holes_after_open(first, true) == 0);
  REQUIRE(std::system(("cp --sparse=always " + first + " " + copy).c_str()) == 0);
  {
    auto file = storage::open_file(
        copy, {.direct = storage::Direct::optional, .assume_non_volatile = true});
    REQUIRE(file);
    const bool trusted = file->non_volatile && !file->in_memory;
    storage::close_file(*file);
    if (!trusted) {
      std::printf("SKIP: %s: no ext4 with O_DIRECT\n", place.c_str());
      return;
    }
  }
  const std::uint64_t left = holes_after_open(copy, true);
  CHECK(left > kLogBytes / 2);
  CHECK(holes_after_open(copy, false) == 0);
  // Two of them, near each other, and none of a whole number of the fill's writes.
  for (const auto& [at, bytes] : {std::pair{64 * kKiB, 1536 * kKiB}, {1728 * kKiB, 128 * kKiB}}) {
    const std::string where = " -o " + std::to_string(log + at) + " -l " + std::to_string(bytes);
    REQUIRE(std::system(("fallocate --punch-hole" + where + " " + copy).c_str()) == 0);
  }
  CHECK(holes_after_open(copy, true) == (1536 + 128) * kKiB);
  CHECK(holes_after_open(copy, false) == 0);
  std::filesystem::remove(first);
  std::filesystem::remove(copy);
}
