// OFD locks and their holders; see lock.h.

#include "storage/lock.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <fstream>
#include <memory>
#include <thread>

namespace pqblk::storage {

namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kRetryEvery{10};

struct CloseDir {
  void operator()(DIR* dir) const { ::closedir(dir); }
};
using Dir = std::unique_ptr<DIR, CloseDir>;

// Calls visit(number) for each entry whose name is a number, until it returns true.
template <class Visit>
bool any_number_in(const std::string& directory, Visit visit) {
  const Dir dir(::opendir(directory.c_str()));
  if (!dir) return false;  // the process is gone, or another user's
  while (const dirent* entry = ::readdir(dir.get())) {
    const std::string name = entry->d_name;
    std::int64_t number = 0;
    const auto parsed = std::from_chars(name.data(), name.data() + name.size(), number);
    if (parsed.ec != std::errc() || parsed.ptr != name.data() + name.size()) continue;
    if (visit(number)) return true;
  }
  return false;
}

// The kernel lists in fdinfo the locks that belong to that descriptor's description (or process).
bool descriptor_locks(const std::string& fdinfo) {
  std::ifstream in(fdinfo);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("lock:")) return true;
  }
  return false;
}

// The process name, not its arguments: those may hold what must not reach a log.
std::string command_of(std::int64_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/comm");
  std::string command;
  std::getline(in, command);
  return command;
}

std::int64_t find_holder_pid(const struct stat& file) {
  std::int64_t found = 0;
  any_number_in("/proc", [&](std::int64_t pid) {
    const std::string process = "/proc/" + std::to_string(pid);
    const bool holds = any_number_in(process + "/fd", [&](std::int64_t fd) {
      struct stat other {};
      const std::string name = std::to_string(fd);
      if (::stat((process + "/fd/" + name).c_str(), &other) != 0) return false;
      if (other.st_dev != file.st_dev || other.st_ino != file.st_ino) return false;
      return descriptor_locks(process + "/fdinfo/" + name);
    });
    if (holds) found = pid;
    return holds;
  });
  return found;
}

struct flock whole_file(short type) {
  struct flock range {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  return range;  // start 0, length 0: to the end, however far it grows
}

Error locked_error(int fd, const std::string& path) {
  std::string message = "disk locked";
  if (const std::optional<LockHolder> holder = holder_of(fd); holder && holder->pid > 0) {
    message += " by pid " + std::to_string(holder->pid);
    if (!holder->command.empty()) message += " (" + holder->command + ")";
  } else {
    message += " by another process";
  }
  return Error(Kind::locked, std::move(message)).in(path);
}

}  // namespace

std::optional<LockHolder> holder_of(int fd) {
  struct flock probe = whole_file(F_WRLCK);
  if (::fcntl(fd, F_OFD_GETLK, &probe) != 0 || probe.l_type == F_UNLCK) return std::nullopt;
  LockHolder holder;
  struct stat file {};
  if (probe.l_pid > 0) {
    holder.pid = probe.l_pid;  // a traditional lock names its process
  } else if (::fstat(fd, &file) == 0) {
    holder.pid = find_holder_pid(file);
  }
  if (holder.pid > 0) holder.command = command_of(holder.pid);
  return holder;
}

Error lock_description(int fd, const std::string& path, Lock lock, std::uint32_t wait_ms) {
  if (lock == Lock::none) return {};
  const auto deadline = steady_clock::now() + milliseconds(wait_ms);
  for (;;) {
    struct flock range = whole_file(lock == Lock::exclusive ? F_WRLCK : F_RDLCK);
    if (::fcntl(fd, F_OFD_SETLK, &range) == 0) return {};
    const int err = errno;
    if (err == EINTR) continue;
    if (err != EAGAIN && err != EACCES) return Error::from_errno(err, "lock", path);
    if (steady_clock::now() >= deadline) return locked_error(fd, path);
    std::this_thread::sleep_for(kRetryEvery);
  }
}

std::optional<LockHolder> lock_holder(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return std::nullopt;
  std::optional<LockHolder> holder = holder_of(fd);
  ::close(fd);
  return holder;
}

}  // namespace pqblk::storage
