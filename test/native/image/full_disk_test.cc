// A file system that fills up below a disk: the guest sees an error, nothing acknowledged is lost,
// nothing leaks, and what the guest gives back can be written again.
#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "image/disk.h"
#include "image/disk_check.h"
#include "image/disk_create.h"
#include "image/disk_harness.h"
#include "sealed/layout.h"
#include "sealed/sealed_subject.h"
#include "small_fs.h"

using namespace pqblk;         // NOLINT
using namespace pqblk::image;  // NOLINT

namespace {

constexpr std::uint64_t kDiskSize = 256 * kMiB;
constexpr std::uint64_t kStep = 256 * kKiB;

class FullDisk {
 public:
  FullDisk(Format format, const std::string& path) : format_(format), path_(path) {
    CreateSpec spec;
    spec.path = path;
    spec.format = format;
    spec.size = kDiskSize;
    if (format == Format::sealed) {
      spec.keys = pqblk::test::test_keys();
      spec.key_area.resize(sealed::kKeyAreaBytes);
      spec.uuid = uuid_;
      spec.log_bytes = 8 * kMiB;
    }
    REQUIRE_FALSE(create_disk(spec));
  }
  void open() {
    OpenOptions options;
    options.path = path_;
    options.format = format_;
    options.cache = Cache::writeback;
    if (format_ == Format::sealed) {
      options.keys = pqblk::test::test_keys();
      options.expected_uuid = uuid_;
    }
    auto opened = Disk::open(std::move(options));
    REQUIRE_MESSAGE(opened, opened.error().to_string());
    disk_ = std::move(*opened);
  }
  Error close() {
    Error e = disk_->close();
    disk_.reset();
    return e;
  }
  Error write(std::uint64_t at, std::uint8_t value) {
    std::vector<std::uint8_t> data(kStep, value);
    return one(RequestType::out, at, data);
  }
  bool holds(std::uint64_t at, std::uint8_t value) {
    std::vector<std::uint8_t> data(kStep);
    if (one(RequestType::in, at, data)) return false;
    return data == std::vector<std::uint8_t>(kStep, value);
  }
  Error discard(std::uint64_t at, std::uint64_t length) {
    image::test::Batch batch;
    Request& request = batch.add(RequestType::discard, at, length);
    disk_->submit(0, batch.list(0, 1));
    batch.wait();
    return request.error;
  }
  // Writes forward from 0 until an error; returns how far it got.
  std::uint64_t fill(Error& e) {
    std::uint64_t at = 0;
    while (at < kDiskSize && !(e = write(at, 1))) at += kStep;
    return at;
  }
  DiskCheck check() {
    CheckSpec spec;
    spec.path = path_;
    spec.format = format_;
    if (format_ == Format::sealed) {
      spec.keys = pqblk::test::test_keys();
      spec.expected_uuid = uuid_;
    }
    auto checked = check_disk(std::move(spec));
    REQUIRE_MESSAGE(checked, checked.error().to_string());
    return std::move(*checked);
  }

 private:
  Error one(RequestType type, std::uint64_t at, std::vector<std::uint8_t>& data) {
    image::test::Batch batch;
    Request& request = batch.add(type, at, data);
    disk_->submit(0, batch.list(0, 1));
    batch.wait();
    return request.error;
  }
  const Format format_;
  const std::string path_;
  const sealed::Uuid uuid_{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  std::unique_ptr<Disk> disk_;
};

}  // namespace

TEST_CASE("a full file system: refused writes leak nothing, discarded space is written again") {
  for (const Format format : {Format::qcow2, Format::sealed}) {
    const pqblk::test::SmallFs fs("40m");
    if (!fs.mounted()) return;
    CAPTURE(static_cast<int>(format));
    FullDisk disk(format, fs.path("disk"));
    disk.open();
    Error e;
    const std::uint64_t filled = disk.fill(e);
    CHECK(e.kind() == Kind::no_space);
    REQUIRE(filled >= 16 * kMiB);
    for (int i = 0; i < 8; ++i) CHECK(disk.write(filled, 2).kind() == Kind::no_space);

    // The guest trims, and goes on elsewhere.
    REQUIRE_FALSE(disk.discard(4 * kMiB, 8 * kMiB));
    for (std::uint64_t i = 0; i < 4 * kMiB; i += kStep) {
      const Error again = disk.write(128 * kMiB + i, 3);
      CHECK_MESSAGE(!again, again.to_string());
    }
    for (std::uint64_t at = 0; at < filled; at += kStep) {
      const bool gone = at >= 4 * kMiB && at < 12 * kMiB;
      REQUIRE(disk.holds(at, gone ? 0 : 1));
    }
    const Error closed = disk.close();
    CHECK_MESSAGE(!closed, closed.to_string());
    const DiskCheck found = disk.check();
    CHECK(found.corruptions == 0);
    CHECK(found.leaks == 0);
    disk.open();
    CHECK(disk.holds(128 * kMiB + 4 * kMiB - kStep, 3));
    CHECK_FALSE(disk.close());
  }
}
