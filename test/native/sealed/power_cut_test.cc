// A power cut under a real file system: ext4 on a loop device, whose backing file is copied the
// moment a write was acknowledged. The device has lost nothing; what the file system had only in
// memory is lost.
#include <doctest/doctest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "image/disk_harness.h"
#include "io/stage.h"
#include "sealed/sealed_file.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint64_t kPlace = kMiB;

int shell(const std::string& command) { return std::system(command.c_str()); }

// ext4 in a file of its own, mounted when it can be.
class FileSystem {
 public:
  FileSystem() {
    std::string name = io::test::scratch_directory() + "/pqblk-cut-XXXXXX";
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    directory_ = name;
    REQUIRE(shell("mkdir " + mount_point() + " && truncate -s 64M " + image() +
                  " && mkfs.ext4 -q -F " + image()) == 0);
    mounted_ = mount();
    if (!mounted_) std::printf("SKIP: mounting ext4 on a loop device needs CAP_SYS_ADMIN\n");
  }
  ~FileSystem() {
    if (mounted_) shell("umount " + mount_point());
    shell("rm -r " + directory_);
  }
  FileSystem(const FileSystem&) = delete;

  bool mounted() const { return mounted_; }
  std::string disk() const { return mount_point() + "/disk"; }

  void cut_power() { REQUIRE(shell("cp " + image() + " " + image() + ".cut") == 0); }
  // As the next boot does. e2fsck: 1 says that it has mended something.
  void start_again() {
    REQUIRE(shell("umount " + mount_point() + " && mv " + image() + ".cut " + image()) == 0);
    mounted_ = false;
    REQUIRE(WEXITSTATUS(shell("e2fsck -fy " + image() + " > /dev/null 2>&1")) <= 1);
    mounted_ = mount();
    REQUIRE(mounted_);
  }

 private:
  std::string image() const { return directory_ + "/image"; }
  std::string mount_point() const { return directory_ + "/mounted"; }
  bool mount() const {
    return shell("mount -o loop " + image() + " " + mount_point() + " 2> /dev/null") == 0;
  }

  std::string directory_;
  bool mounted_ = false;
};

std::unique_ptr<image::Disk> open_disk(const std::string& path) {
  return open_sealed_file(sealed_file_options(path, true));
}

void request(image::Disk& disk, image::RequestType type, std::vector<std::uint8_t>& data) {
  image::test::Batch batch;
  batch.add(type, kPlace, data).fua = type == image::RequestType::out;
  disk.submit(0, batch.list(0, 1));
  batch.wait();
  CHECK(batch.requests()[0].status == image::Status::ok);
}

}  // namespace

// The first write to a block of a file changes its extent in the file system's journal.
TEST_CASE("FUA on a device with a non-volatile cache outlives a power cut") {
  FileSystem fs;
  if (!fs.mounted()) return;
  make_sealed_file(sealed_file_spec(fs.disk(), 8 * kMiB, kMiB));
  std::vector<std::uint8_t> written(kSectorSize, 0xab);
  {
    const auto disk = open_disk(fs.disk());
    request(*disk, image::RequestType::out, written);
    fs.cut_power();
    CHECK_FALSE(disk->close());
  }
  fs.start_again();
  std::vector<std::uint8_t> read(kSectorSize);
  const auto disk = open_disk(fs.disk());
  request(*disk, image::RequestType::in, read);
  CHECK(read == written);
  CHECK_FALSE(disk->close());
}
