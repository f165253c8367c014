// A small file system in memory, for tests of what happens when it is full.
//
// Room test. Needs CAP_SYS_ADMIN; without it `mounted()` is false and has printed why.
#pragma once

#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

namespace pqblk::test {

class SmallFs {
 public:
  // `size` as tmpfs takes it: "6m".
  explicit SmallFs(const std::string& size) {
    char name[] = "/tmp/pqblk-full-XXXXXX";
    if (::mkdtemp(name) == nullptr) std::abort();
    directory_ = name;
    mounted_ = ::mount("tmpfs", directory_.c_str(), "tmpfs", 0, ("size=" + size).c_str()) == 0;
    if (mounted_) return;
    std::printf("SKIP: mounting a small tmpfs needs CAP_SYS_ADMIN: %s\n", std::strerror(errno));
    ::rmdir(directory_.c_str());
  }
  ~SmallFs() {
    if (!mounted_) return;
    ::umount2(directory_.c_str(), MNT_DETACH);
    ::rmdir(directory_.c_str());
  }
  SmallFs(const SmallFs&) = delete;
  bool mounted() const { return mounted_; }
  std::string path(const std::string& name) const { return directory_ + "/" + name; }

 private:
  std::string directory_;
  bool mounted_ = false;
};

}  // namespace pqblk::test
