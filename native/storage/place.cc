// Where a new file would go: free space, and directories that belong to the system; see file.h.

#include <sys/resource.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <filesystem>
#include <string_view>

#include "storage/file.h"

namespace pqblk::storage {

namespace {

namespace fs = std::filesystem;

// Directories whose whole tree is the system's.
constexpr std::array<std::string_view, 14> kSystemTrees = {
    "/bin",    "/boot", "/dev",  "/etc", "/lib", "/lib32",        "/lib64",
    "/libx32", "/proc", "/sbin", "/sys", "/usr", "/var/lib/dpkg", "/var/cache/apt"};

bool within(const std::string& path, std::string_view tree) {
  return path.starts_with(tree) && (path.size() == tree.size() || path[tree.size()] == '/');
}

}  // namespace

bool in_system_directory(const std::string& path) {
  std::error_code error;
  const fs::path whole = fs::absolute(path, error);
  if (error) return true;
  const fs::path directory = fs::weakly_canonical(whole, error).parent_path();
  if (error) return true;  // what cannot be resolved is not known to be harmless
  const std::string text = directory.string();
  if (text == "/" || text == "/var" || text == "/var/lib") return true;
  if (within(text, "/run")) return !within(text, "/run/user") && !within(text, "/run/media");
  if (within(text, "/dev/shm")) return false;
  return std::any_of(kSystemTrees.begin(), kSystemTrees.end(),
                     [&text](std::string_view tree) { return within(text, tree); });
}

Result<std::uint64_t> free_space(const std::string& directory) {
  struct statvfs fs_status {};
  if (::statvfs(directory.c_str(), &fs_status) != 0) {
    return Error::from_errno(errno, "read free space", directory);
  }
  std::uint64_t bytes = std::uint64_t{fs_status.f_bavail} * fs_status.f_frsize;
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    bytes = std::min<std::uint64_t>(bytes, limit.rlim_cur);
  }
  return bytes;
}

}  // namespace pqblk::storage
