// A sealed disk whose file was copied with holes, as cp and backup programs do with zeros.
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "image/sealed_backend.h"
#include "io/stage.h"
#include "sealed/sealed_file.h"
#include "storage/file.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint64_t kLogBytes = 4 * kMiB;

// Goes with all that is in it, however the test ends.
struct Directory {
  Directory() { REQUIRE(::mkdtemp(path.data()) != nullptr); }
  ~Directory() { std::filesystem::remove_all(path); }
  Directory(const Directory&) = delete;
  std::string path = io::test::scratch_directory() + "/pqblk-sparse-XXXXXX";
};

// Whether an overwrite in place may be trusted there at all.
bool trusted(const std::string& path) {
  auto file = storage::open_file(path, {.direct = storage::Direct::optional,  //
                                        .assume_non_volatile = true});
  REQUIRE(file);
  const bool is = file->non_volatile && !file->in_memory;
  storage::close_file(*file);
  return is;
}

struct LogArea {
  std::uint64_t offset = 0;
  std::uint64_t holes = 0;  // bytes
};

// Of a disk that was opened so.
LogArea log_after_open(const std::string& path, bool read_only) {
  image::OpenOptions options = sealed_file_options(path, true);
  options.read_only = read_only;
  const auto disk = open_sealed_file(std::move(options));
  const auto& backend = static_cast<image::SealedBackend&>(disk->backend());
  LogArea log{backend.extension().log_offset, 0};
  const std::uint64_t end = log.offset + backend.extension().log_length;
  for (std::uint64_t at = log.offset; at < end;) {
    const storage::Hole hole = storage::next_hole(backend.file(), at, end);
    if (hole.begin == hole.end) break;
    log.holes += hole.end - hole.begin;
    at = hole.end;
  }
  CHECK_FALSE(disk->close());
  return log;
}

}  // namespace

TEST_CASE("a log that was copied with holes is whole again when the disk is opened to be written") {
  const Directory directory;
  const std::string first = directory.path + "/disk", copy = directory.path + "/copy";
  make_sealed_file(sealed_file_spec(first, 16 * kMiB, kLogBytes));
  CHECK(log_after_open(first, true).holes == 0);
  REQUIRE(std::system(("cp --sparse=always " + first + " " + copy).c_str()) == 0);
  if (!trusted(copy)) {
    std::printf("SKIP: %s: no ext4 with O_DIRECT\n", directory.path.c_str());
    return;
  }
  const LogArea left = log_after_open(copy, true);
  CHECK(left.holes > kLogBytes / 2);
  CHECK(log_after_open(copy, false).holes == 0);
  // Two of them, near each other, and none of a whole number of the fill's writes.
  for (const auto& [at, bytes] : {std::pair{64 * kKiB, 1536 * kKiB}, {1728 * kKiB, 128 * kKiB}}) {
    const std::string where =
        " -o " + std::to_string(left.offset + at) + " -l " + std::to_string(bytes);
    REQUIRE(std::system(("fallocate --punch-hole" + where + " " + copy).c_str()) == 0);
  }
  CHECK(log_after_open(copy, true).holes == (1536 + 128) * kKiB);
  CHECK(log_after_open(copy, false).holes == 0);
}
