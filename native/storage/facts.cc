// Facts about an open file; see facts.h.

#include "storage/facts.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <string>

#include "base/units.h"
#include "storage/file.h"

#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

namespace pqblk::storage {

namespace {

// Where the kernel tells nothing: the strictest alignment that disks and file systems ask for.
constexpr std::uint32_t kSafeAlign = 4096;

std::int64_t file_system_magic(int fd) {
  struct statfs fs {};
  return ::fstatfs(fd, &fs) == 0 ? static_cast<std::int64_t>(fs.f_type) : 0;
}

bool in_memory(std::int64_t magic) { return magic == TMPFS_MAGIC || magic == RAMFS_MAGIC; }

// The file system that writes an allocated block where it is. Any other may copy it elsewhere, log
// it, or be a network: nothing follows from the device then (and there may be none). XFS may share
// a file's blocks with a copy of it, and gives what is written to one a new place.
bool writes_in_place(std::int64_t magic) { return magic == EXT4_SUPER_MAGIC; }

// The block device below the file, as /sys/dev/block/MAJOR:MINOR knows it.
class Device {
 public:
  static std::optional<Device> below(const io::File& file) {
    struct stat status {};
    if (::fstat(file.fd, &status) != 0) return std::nullopt;
    const dev_t device = file.block_device ? status.st_rdev : status.st_dev;
    Device found("/sys/dev/block/" + std::to_string(major(device)) + ":" +
                 std::to_string(minor(device)));
    if (found.text("/queue/logical_block_size").empty()) {
      found.queue_ = "/../queue";  // a partition: the queue is its disk's
      if (found.text("/../queue/logical_block_size").empty()) return std::nullopt;
    }
    return found;
  }

  std::uint64_t queue_number(const char* name) const { return number(queue_ + "/" + name); }
  bool write_through() const { return text(queue_ + "/write_cache") == "write through"; }
  std::uint64_t start_bytes() const { return number("/start") * kVirtioSectorSize; }

 private:
  explicit Device(std::string directory) : directory_(std::move(directory)) {}

  std::string text(const std::string& name) const {
    std::ifstream in(directory_ + name);
    std::string line;
    std::getline(in, line);
    return line;
  }
  std::uint64_t number(const std::string& name) const {
    std::ifstream in(directory_ + name);
    std::uint64_t value = 0;
    return in >> value ? value : 0;
  }

  std::string directory_;
  std::string queue_ = "/queue";
};

// A 4096-byte aligned write is one unit of the device, and lies aligned and whole on it.
bool device_atomic_4k(const io::File& file, const Device& device) {
  const bool one_unit = device.queue_number("logical_block_size") >= kSectorSize ||
                        device.queue_number("atomic_write_unit_max_bytes") >= kSectorSize;
  if (!one_unit || device.start_bytes() % kSectorSize != 0) return false;
  if (file.block_device) return true;
  struct statfs fs {};
  return ::fstatfs(file.fd, &fs) == 0 && fs.f_bsize >= long{kSectorSize};
}

}  // namespace

Error find_kind_and_size(io::File& file) {
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) return Error::from_errno(errno, "stat", file.path);
  if (S_ISREG(status.st_mode)) {
    file.block_device = false;
    file.size = static_cast<std::uint64_t>(status.st_size);
    return {};
  }
  if (!S_ISBLK(status.st_mode)) {
    return Error(Kind::invalid_argument, "neither a regular file nor a block device").in(file.path);
  }
  file.block_device = true;
  if (::ioctl(file.fd, BLKGETSIZE64, &file.size) != 0) {
    return Error::from_errno(errno, "read the device's size", file.path);
  }
  return {};
}

bool find_alignment(io::File& file) {
  // (A device's node lies in memory too; the device does not.)
  if (!file.block_device && in_memory(file_system_magic(file.fd))) {
    file.memory_align = 1;  // there is no device to be aligned for
    file.offset_align = 1;
    return true;
  }
  file.memory_align = kSafeAlign;
  file.offset_align = kSafeAlign;
  struct statx status {};
  if (::statx(file.fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) != 0) {
    if (status.stx_dio_offset_align == 0) return false;
    file.offset_align = status.stx_dio_offset_align;
    file.memory_align = std::max(status.stx_dio_mem_align, 1U);
    return true;
  }
  // Before Linux 6.1, or a file system that does not tell.
  int block = 0;
  if (file.block_device && ::ioctl(file.fd, BLKSSZGET, &block) == 0 && block > 0) {
    file.offset_align = static_cast<std::uint32_t>(block);
    file.memory_align = std::max(file.offset_align, 512U);
  }
  return true;
}

void find_durability(io::File& file, std::optional<bool> assumed) {
  const std::int64_t magic = file_system_magic(file.fd);
  file.non_volatile = false;
  file.atomic_4k = false;
  file.in_memory = !file.block_device && in_memory(magic);
  if (file.in_memory) {
    // Nothing survives power loss; everything survives kill -9, and a page is copied whole.
    file.non_volatile = assumed.value_or(true);
    file.atomic_4k = true;
    return;
  }
  if (!file.direct) return;  // a completed write is in the page cache
  const std::optional<Device> device = Device::below(file);
  const bool in_place = file.block_device || writes_in_place(magic);
  // The operator's word is about the device, and not about what the file system does above it.
  file.non_volatile = in_place && assumed.value_or(device && device->write_through());
  file.atomic_4k = in_place && device && device_atomic_4k(file, *device);
}

std::string durability_class(const io::File& file) {
  if (file.in_memory) {
    return "RAM-backed: survives kill -9, not power loss (O1)";
  }
  if (!file.direct) return "page cache: durable after a flush (O2)";
  if (!file.non_volatile) return "volatile write cache (O2)";
  return file.atomic_4k ? "non-volatile, 4096-byte atomic writes (O1)"
                        : "non-volatile, no 4096-byte atomic writes (O2)";
}

}  // namespace pqblk::storage
