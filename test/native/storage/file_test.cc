// Opening, locking and describing files, with the kernel as the oracle.

#include "storage/file.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <utility>

#include "base/units.h"

namespace pqblk::storage {

namespace {

namespace fs = std::filesystem;

class Scratch {
 public:
  Scratch() {
    std::string name = (fs::temp_directory_path() / "pqblk-storage-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    directory_ = name;
  }
  ~Scratch() { fs::remove_all(directory_); }
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  std::string file(const std::string& name, const std::string& content) const {
    std::ofstream(path(name)) << content;
    return path(name);
  }

 private:
  std::string directory_;
};

Kind kind_of(const Result<io::File>& file) { return file ? Kind::ok : file.error().kind(); }

// A child process that holds the file open and locked until it is killed.
class Holder {
 public:
  Holder(const std::string& path, const OpenOptions& options) {
    int ends[2] = {-1, -1};
    REQUIRE(::pipe(ends) == 0);
    pid_ = ::fork();
    REQUIRE(pid_ >= 0);
    if (pid_ == 0) {
      const bool held = bool(open_file(path, options));
      const char answer = held ? 'y' : 'n';
      if (::write(ends[1], &answer, 1) == 1) ::pause();
      ::_exit(0);
    }
    ::close(ends[1]);
    char answer = 0;
    CHECK(::read(ends[0], &answer, 1) == 1);
    CHECK(answer == 'y');
    ::close(ends[0]);
  }
  ~Holder() { kill(); }
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(std::exchange(pid_, 0), nullptr, 0);
  }
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = 0;
};

}  // namespace

TEST_CASE("opening tells the size and closes on exec; ids differ") {
  const Scratch scratch;
  const std::string path = scratch.file("a", std::string(5000, 'x'));
  Result<io::File> one = open_file(path, {.lock = Lock::none});
  Result<io::File> two = open_file(path, {.lock = Lock::none});
  REQUIRE(bool(one));
  REQUIRE(bool(two));
  CHECK(one->size == 5000);
  CHECK(one->path == path);
  CHECK(!one->block_device);
  CHECK(!one->direct);
  CHECK((::fcntl(one->fd, F_GETFD) & FD_CLOEXEC) != 0);
  CHECK(one->id != 0);
  CHECK(one->id != two->id);
  close_file(*one);
  CHECK(one->fd == -1);
  close_file(*two);
}

TEST_CASE("each failure to open has its own kind and names the path") {
  const Scratch scratch;
  const std::string missing = scratch.path("missing");
  Result<io::File> file = open_file(missing, {});
  REQUIRE(!file);
  CHECK(file.error().kind() == Kind::not_found);
  CHECK(file.error().path() == missing);
  CHECK(kind_of(open_file(scratch.path(""), {})) == Kind::invalid_argument);
  REQUIRE(::mkfifo(scratch.path("fifo").c_str(), 0600) == 0);
  CHECK(kind_of(open_file(scratch.path("fifo"), {})) == Kind::invalid_argument);  // does not hang
  CHECK(kind_of(open_file("/dev/null", {})) == Kind::invalid_argument);
  CHECK(kind_of(open_file(scratch.path("x"), {.read_only = true, .create = true})) ==
        Kind::invalid_argument);
  CHECK(!fs::exists(scratch.path("x")));
}

TEST_CASE("a read-only file cannot be written, and says so") {
  const Scratch scratch;
  const std::string path = scratch.file("a", "x");
  REQUIRE(::chmod(path.c_str(), 0444) == 0);
  REQUIRE(::chmod(scratch.path("").c_str(), 0755) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    constexpr uid_t kNobody = 65534;  // permission bits do not bind root
    if (::geteuid() == 0 && ::setuid(kNobody) != 0) ::_exit(2);
    const bool reads = bool(open_file(path, {.read_only = true}));
    ::_exit(reads && kind_of(open_file(path, {})) == Kind::permission ? 0 : 1);
  }
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("creating is exclusive, private, and truncates only when asked") {
  const Scratch scratch;
  const std::string path = scratch.path("new");
  Result<io::File> made = open_file(path, {.create = true});
  REQUIRE(bool(made));
  struct stat status {};
  REQUIRE(::fstat(made->fd, &status) == 0);
  CHECK((status.st_mode & 0777) == 0600);
  REQUIRE(::pwrite(made->fd, "content", 7, 0) == 7);
  close_file(*made);

  CHECK(kind_of(open_file(path, {.create = true})) == Kind::exists);
  CHECK(fs::file_size(path) == 7);
  Result<io::File> again = open_file(path, {.create = true, .overwrite = true});
  REQUIRE(bool(again));
  CHECK(again->size == 0);
  CHECK(fs::file_size(path) == 0);
  close_file(*again);
}

TEST_CASE("overwriting a locked file leaves its content alone") {
  const Scratch scratch;
  const std::string path = scratch.file("a", "precious");
  const Holder holder(path, {});
  CHECK(kind_of(open_file(path, {.create = true, .overwrite = true, .lock_wait_ms = 0})) ==
        Kind::locked);
  CHECK(fs::file_size(path) == 8);
}

// ---- locks ----

TEST_CASE("a second writer is told who holds the disk") {
  const Scratch scratch;
  const std::string path = scratch.file("a", "x");
  CHECK(!lock_holder(path));
  Holder holder(path, {});
  std::string command;
  std::getline(std::ifstream("/proc/" + std::to_string(holder.pid()) + "/comm"), command);

  Result<io::File> second = open_file(path, {.lock_wait_ms = 0});
  REQUIRE(!second);
  CHECK(second.error().kind() == Kind::locked);
  CHECK(second.error().message() ==
        "disk locked by pid " + std::to_string(holder.pid()) + " (" + command + ")");
  const std::optional<LockHolder> found = lock_holder(path);
  REQUIRE(bool(found));
  CHECK(found->pid == holder.pid());
  CHECK(found->command == command);

  holder.kill();
  CHECK(!lock_holder(path));
  Result<io::File> third = open_file(path, {});
  REQUIRE(bool(third));
  close_file(*third);
}

TEST_CASE("a process that merely has the file open is not named as its holder") {
  const Scratch scratch;
  const std::string path = scratch.file("a", "x");
  const Holder bystander(path, {.lock = Lock::none});
  const Holder holder(path, {});
  const std::optional<LockHolder> found = lock_holder(path);
  REQUIRE(bool(found));
  CHECK(found->pid == holder.pid());
}

TEST_CASE("readers share, writers exclude readers, and the same process is no exception") {
  const Scratch scratch;
  const std::string path = scratch.file("a", "x");
  const OpenOptions reader{.read_only = true, .lock_wait_ms = 0};
  const OpenOptions writer{.lock_wait_ms = 0};
  Result<io::File> one = open_file(path, reader);
  Result<io::File> two = open_file(path, reader);
  CHECK(kind_of(one) == Kind::ok);
  CHECK(kind_of(two) == Kind::ok);
  CHECK(kind_of(open_file(path, writer)) == Kind::locked);
  close_file(*one);
  close_file(*two);
  Result<io::File> only = open_file(path, writer);
  CHECK(kind_of(only) == Kind::ok);
  CHECK(kind_of(open_file(path, reader)) == Kind::locked);
  CHECK(kind_of(open_file(path, writer)) == Kind::locked);
  Result<io::File> unlocked = open_file(path, {.read_only = true, .lock = Lock::none});
  CHECK(kind_of(unlocked) == Kind::ok);
  close_file(*unlocked);  // must not drop the lock of the other description
  CHECK(kind_of(open_file(path, writer)) == Kind::locked);
  close_file(*only);
}

TEST_CASE("a lock that is released while it is waited for is taken") {
  const Scratch scratch;
  const std::string path = scratch.file("a", "x");
  Holder holder(path, {});
  std::thread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    holder.kill();
  });
  Result<io::File> file = open_file(path, {.lock_wait_ms = 20'000});
  killer.join();
  REQUIRE(bool(file));
  close_file(*file);
}

TEST_CASE("a file that was replaced while its lock was awaited is not the one that is opened") {
  const Scratch scratch;
  const std::string path = scratch.file("a", "old");
  Holder holder(path, {});
  std::thread replacer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    fs::rename(scratch.file("b", "newer"), path);
    holder.kill();
  });
  Result<io::File> file = open_file(path, {.lock_wait_ms = 20'000});
  replacer.join();
  REQUIRE(bool(file));
  CHECK(file->size == 5);
  close_file(*file);
}

// ---- facts ----

TEST_CASE(
    "O_DIRECT is on the descriptor when it is reported, with the alignment the kernel tells") {
  const Scratch scratch;
  const std::string path = scratch.file("a", std::string(8192, 'x'));
  Result<io::File> file = open_file(path, {.direct = Direct::optional});
  REQUIRE(bool(file));
  CHECK(((::fcntl(file->fd, F_GETFL) & O_DIRECT) != 0) == file->direct);
  if (!file->direct) {
    MESSAGE("this file system has no O_DIRECT");
  } else if (!file->in_memory) {
    CHECK(file->offset_align >= 512);
    void* buffer = nullptr;
    REQUIRE(::posix_memalign(&buffer, 4096, 8192) == 0);
    // The told alignment is enough ...
    CHECK(::pread(file->fd, static_cast<char*>(buffer) + file->memory_align, file->offset_align,
                  file->offset_align) == static_cast<ssize_t>(file->offset_align));
    // ... and half of it is not.
    CHECK(::pread(file->fd, buffer, file->offset_align / 2, 0) < 0);
    std::free(buffer);
  }
  close_file(*file);
}

TEST_CASE("a file without O_DIRECT is required to have it: refused, and nothing is left behind") {
  // procfs files are regular and refuse O_DIRECT.
  Result<io::File> file = open_file(
      "/proc/self/status", {.read_only = true, .direct = Direct::required, .lock = Lock::none});
  REQUIRE(!file);
  CHECK(file.error().kind() == Kind::unsupported);
  Result<io::File> optional = open_file(
      "/proc/self/status", {.read_only = true, .direct = Direct::optional, .lock = Lock::none});
  REQUIRE(bool(optional));
  CHECK(!optional->direct);
  CHECK(optional->memory_align == 1);
  close_file(*optional);
}

TEST_CASE("durability claims nothing that was not told") {
  const Scratch scratch;
  const std::string path = scratch.file("a", std::string(8192, 'x'));
  Result<io::File> buffered = open_file(path, {.assume_non_volatile = true});
  REQUIRE(bool(buffered));
  if (!buffered->in_memory) {
    CHECK(!buffered->non_volatile);  // whatever the device does, the page cache is volatile
    CHECK(!buffered->atomic_4k);
    CHECK(durability_class(*buffered) == "page cache: durable after a flush (O2)");
  }
  close_file(*buffered);
  for (const bool assumed : {false, true}) {
    Result<io::File> direct =
        open_file(path, {.direct = Direct::optional, .assume_non_volatile = assumed});
    REQUIRE(bool(direct));
    struct statfs system {};
    REQUIRE(::statfs(path.c_str(), &system) == 0);
    const bool in_place = system.f_type == EXT4_SUPER_MAGIC;  // whatever was said of the device
    if (direct->direct) CHECK(direct->non_volatile == (assumed && in_place));
    close_file(*direct);
  }
}

TEST_CASE("a file in memory survives kill -9 and nothing more") {
  if (!fs::exists("/dev/shm")) {
    MESSAGE("SKIPPED: no /dev/shm");
    return;
  }
  const std::string path = "/dev/shm/pqblk-storage-" + std::to_string(::getpid());
  Result<io::File> file = open_file(path, {.direct = Direct::optional, .create = true});
  REQUIRE(bool(file));
  CHECK(file->in_memory);
  CHECK(file->non_volatile);
  CHECK(file->atomic_4k);
  CHECK(durability_class(*file) == "RAM-backed: survives kill -9, not power loss (O1)");
  close_file(*file);
  ::unlink(path.c_str());
}

// A loop device over a sparse file, when this process may make one.
TEST_CASE("a block device has its capacity, and one writer") {
  const Scratch scratch;
  const std::string backing = scratch.file("backing", "");
  fs::resize_file(backing, 8 * kMiB);
  std::string device;
  if (FILE* pipe = ::popen(("losetup -f --show " + backing + " 2>/dev/null").c_str(), "r")) {
    char line[128] = "";
    if (std::fgets(line, sizeof line, pipe) != nullptr) device = line;
    ::pclose(pipe);
  }
  while (!device.empty() && device.back() == '\n') device.pop_back();
  if (device.empty()) {
    MESSAGE("SKIPPED: no loop device can be made here");
    return;
  }
  Result<io::File> file = open_file(device, {.direct = Direct::required});
  CHECK_MESSAGE(bool(file), file.error().to_string());
  if (file) {
    CHECK(file->block_device);
    CHECK(file->size == 8 * kMiB);
    CHECK(file->offset_align >= 512);
    CHECK(kind_of(open_file(device, {.lock_wait_ms = 0})) == Kind::locked);
    close_file(*file);
    CHECK(kind_of(open_file(device, {.create = true})) == Kind::exists);
  }
  CHECK(std::system(("losetup -d " + device).c_str()) == 0);
}

// ---- places ----

TEST_CASE("system directories are known, also by other names") {
  const Scratch scratch;
  for (const char* path : {"/disk.img", "/etc/disk.img", "/usr/lib/x/disk.img", "/boot/disk.img",
                           "/dev/disk.img", "/proc/disk.img", "/lib/disk.img", "/run/disk.img",
                           "/var/lib/dpkg/disk.img", "/usr/../etc/disk.img"}) {
    CAPTURE(path);
    CHECK(in_system_directory(path));
  }
  for (const std::string& path :
       {scratch.path("disk.img"), scratch.path("not/yet/there.img"), std::string("/srv/disk.img"),
        std::string("/home/u/disk.img"), std::string("/var/lib/libvirt/images/disk.img"),
        std::string("/dev/shm/disk.img"), std::string("/etcetera/disk.img")}) {
    CAPTURE(path);
    CHECK(!in_system_directory(path));
  }
  fs::create_directory_symlink("/etc", scratch.path("link"));
  CHECK(in_system_directory(scratch.path("link/disk.img")));
}

TEST_CASE("free space is what the file system and the limits leave") {
  const Scratch scratch;
  struct statvfs status {};
  REQUIRE(::statvfs(scratch.path("").c_str(), &status) == 0);
  const Result<std::uint64_t> free = free_space(scratch.path(""));
  REQUIRE(bool(free));
  const double expected =
      static_cast<double>(status.f_bavail) * static_cast<double>(status.f_frsize);
  CHECK(static_cast<double>(*free) == doctest::Approx(expected).epsilon(0.05));
  rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  const rlimit tight{1 << 20, limit.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &tight) == 0);
  const Result<std::uint64_t> limited = free_space(scratch.path(""));
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  REQUIRE(bool(limited));
  CHECK(*limited == 1 << 20);
  CHECK(!free_space(scratch.path("missing")));
}

}  // namespace pqblk::storage
