// Opening and closing files and block devices; see file.h.

#include "storage/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <utility>

#include "storage/facts.h"
#include "storage/lock.h"

namespace pqblk::storage {

namespace {

constexpr mode_t kCreateMode = 0600;  // guests' data is its owner's
constexpr int kReopenMax = 8;         // times a path may be replaced while its lock is awaited

std::atomic<std::uint64_t> last_id{0};

bool is_block_device(const std::string& path) {
  struct stat status {};
  return ::stat(path.c_str(), &status) == 0 && S_ISBLK(status.st_mode);
}

int open_retrying(const std::string& path, int flags) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, kCreateMode);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

// Opens the descriptor. `created` tells whether the file is new.
Error open_descriptor(io::File& file, const OpenOptions& options, bool& created) {
  const int access = options.read_only ? O_RDONLY : O_RDWR;
  created = false;
  if (options.create) {
    file.fd = open_retrying(file.path, access | O_CREAT | O_EXCL);
    created = file.fd >= 0;
    if (created) return {};
    if (errno != EEXIST || !options.overwrite) return Error::from_errno(errno, "create", file.path);
  }
  // Only a stat before the open keeps a fifo from blocking here.
  struct stat status {};
  if (::stat(file.path.c_str(), &status) == 0 && !S_ISREG(status.st_mode) &&
      !S_ISBLK(status.st_mode)) {
    return Error(Kind::invalid_argument, S_ISDIR(status.st_mode)
                                             ? "this is a directory"
                                             : "neither a regular file nor a block device")
        .in(file.path);
  }
  // O_EXCL on a device: nobody has it mounted or claimed. File locks alone do not tell that.
  const bool claim =
      !options.read_only && options.lock == Lock::exclusive && is_block_device(file.path);
  file.fd = open_retrying(file.path, access | (claim ? O_EXCL : 0));
  if (file.fd >= 0) return {};
  if (claim && errno == EBUSY) {
    return Error(Kind::locked, "the device is mounted or in use").at("open").in(file.path);
  }
  return Error::from_errno(errno, "open", file.path);
}

// Whether the path still names the open file; another process may have replaced it meanwhile.
bool still_named(const io::File& file) {
  struct stat here {};
  struct stat there {};
  return ::fstat(file.fd, &here) == 0 && ::stat(file.path.c_str(), &there) == 0 &&
         here.st_dev == there.st_dev && here.st_ino == there.st_ino;
}

Lock effective_lock(const OpenOptions& options) {
  return options.read_only && options.lock == Lock::exclusive ? Lock::shared : options.lock;
}

Error open_locked(io::File& file, const OpenOptions& options, bool& created) {
  for (int i = 0; i < kReopenMax; ++i) {
    if (Error e = open_descriptor(file, options, created)) return e;
    if (Error e =
            lock_description(file.fd, file.path, effective_lock(options), options.lock_wait_ms)) {
      return e;
    }
    if (options.lock == Lock::none || still_named(file)) return {};
    ::close(std::exchange(file.fd, -1));
  }
  return Error(Kind::locked, "the file keeps being replaced while it is opened").in(file.path);
}

// After the open, not in its flags: an open that the file system refuses for O_DIRECT may still
// have created the file.
Error apply_direct(io::File& file, Direct direct) {
  if (direct == Direct::off) return {};
  const int flags = ::fcntl(file.fd, F_GETFL);
  if (flags < 0) return Error::from_errno(errno, "read open flags", file.path);
  if (::fcntl(file.fd, F_SETFL, flags | O_DIRECT) == 0) {
    if (find_alignment(file)) {
      file.direct = true;
      return {};
    }
    if (::fcntl(file.fd, F_SETFL, flags) != 0) {
      return Error::from_errno(errno, "clear O_DIRECT", file.path);
    }
  } else if (errno != EINVAL && errno != EOPNOTSUPP) {
    return Error::from_errno(errno, "set O_DIRECT", file.path);
  }
  file.memory_align = 1;
  file.offset_align = 1;
  if (direct == Direct::optional) return {};
  return Error(
             Kind::unsupported,
             "the file system cannot bypass its cache (O_DIRECT) for this file; use another cache "
             "mode or another place")
      .in(file.path);
}

std::string directory_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

// A new name survives power loss only once its directory is on the disk.
Error sync_directory(const std::string& path) {
  const std::string directory = directory_of(path);
  const int fd = open_retrying(directory, O_RDONLY | O_DIRECTORY);
  if (fd < 0) return Error::from_errno(errno, "open directory", directory);
  const int err = ::fsync(fd) == 0 ? 0 : errno;
  ::close(fd);
  // EINVAL: a file system without such a notion.
  if (err != 0 && err != EINVAL) return Error::from_errno(err, "sync directory", directory);
  return {};
}

Error prepare(io::File& file, const OpenOptions& options, bool created) {
  if (Error e = find_kind_and_size(file)) return e;
  if (options.create && !created && !file.block_device) {
    if (::ftruncate(file.fd, 0) != 0) return Error::from_errno(errno, "truncate", file.path);
    file.size = 0;
  }
  if (Error e = apply_direct(file, options.direct)) return e;
  find_durability(file, options.assume_non_volatile);
  return created ? sync_directory(file.path) : Error();
}

}  // namespace

Result<io::File> open_file(const std::string& path, const OpenOptions& options) {
  if (options.create && options.read_only) {
    return Error(Kind::invalid_argument, "a file cannot be created read-only").in(path);
  }
  io::File file;
  file.id = ++last_id;
  file.path = path;
  file.read_only = options.read_only;
  bool created = false;
  Error error = open_locked(file, options, created);
  if (error.ok()) error = prepare(file, options, created);
  if (error.ok()) return file;
  // Whoever locked a file that was just made here has a use for it.
  if (created && error.kind() != Kind::locked) ::unlink(path.c_str());
  close_file(file);
  return error;
}

void close_file(io::File& file) {
  if (file.fd >= 0) ::close(file.fd);  // the lock goes with the description's last holder
  file.fd = -1;
}

Result<std::uint64_t> size_now(const io::File& file) {
  if (file.id == 0) return file.size;  // made by hand: no file of the kernel's
  io::File now = file;
  if (Error e = find_kind_and_size(now)) return e;
  return now.size;
}

Hole next_hole(const io::File& file, std::uint64_t from, std::uint64_t to) {
  if (file.id == 0 || file.block_device) return {};
  const off_t begin = ::lseek(file.fd, static_cast<off_t>(from), SEEK_HOLE);
  if (begin < 0 || static_cast<std::uint64_t>(begin) >= to) return {};
  const off_t end = ::lseek(file.fd, begin, SEEK_DATA);  // fails where no data follows
  const std::uint64_t last = end < 0 ? to : std::min(to, static_cast<std::uint64_t>(end));
  return {static_cast<std::uint64_t>(begin), last};
}

}  // namespace pqblk::storage
