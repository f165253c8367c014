// Fuzzes the NBD server as a client would: a handshake and requests from arbitrary bytes, sent in
// arbitrary pieces to a real server over a real disk in memory. What must hold: no crash, no leak,
// and the server hangs up by itself once the client has said its last word.
//
// The first byte of an input chooses: bits 0-1 where it starts (the greeting, options, requests
// with and without structured replies), bits 2-4 how it is cut.

#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "export/nbd_negotiation.h"
#include "export/nbd_server.h"
#include "image/disk_create.h"

using namespace pqblk;
using namespace pqblk::exports::nbd;

namespace {

constexpr std::uint64_t kDiskBytes = 1 << 20;
constexpr int kPatienceMs = 20'000;
constexpr std::size_t kInputMax = 64 << 10;

void must(const Error& error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", error.to_string().c_str());
  std::abort();
}

class Target {
 public:
  Target() {
    const int file = ::memfd_create("fuzz-nbd", MFD_CLOEXEC);
    if (file < 0 || ::ftruncate(file, kDiskBytes) != 0) std::abort();
    image::OpenOptions open;
    open.path = "/proc/self/fd/" + std::to_string(file);
    open.cache = image::Cache::unsafe;
    open.io.engine = io::EngineType::threads;
    auto disk = image::Disk::open(std::move(open));
    if (!disk) must(disk.error());
    disk_ = disk->release();
    ServerOptions options;
    options.unix_path = "/tmp/pqblk-fuzz-nbd-" + std::to_string(::getpid());
    options.clients_max = kClientsMax;
    auto server = Server::start(*disk_, std::move(options));
    if (!server) must(server.error());
    server_ = server->release();
    static Target* self = this;
    std::atexit([] { delete self->server_; });
  }
  int connect() {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) std::abort();
    server_->adopt(ends[1]);
    return ends[0];
  }

 private:
  image::Disk* disk_;  // lives as long as the process
  Server* server_;
};

void put(std::vector<std::uint8_t>& to, std::uint64_t value, int bytes) {
  for (int i = bytes - 1; i >= 0; --i) to.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
}

void option(std::vector<std::uint8_t>& to, Option which, std::uint32_t length) {
  put(to, kOptionMagic, 8);
  put(to, static_cast<std::uint32_t>(which), 4);
  put(to, length, 4);
}

std::vector<std::uint8_t> prefix(unsigned start) {
  std::vector<std::uint8_t> bytes;
  if (start == 0) return bytes;
  put(bytes, kFixedNewstyle | kNoZeroes, 4);
  if (start == 1) return bytes;
  if (start == 3) {
    option(bytes, Option::structured_reply, 0);
    option(bytes, Option::set_meta_context, 27);
    put(bytes, 0, 4);
    put(bytes, 1, 4);
    put(bytes, 15, 4);
    for (const char c : std::string("base:allocation")) bytes.push_back(static_cast<uint8_t>(c));
  }
  option(bytes, Option::go, 6);
  put(bytes, 0, 6);
  return bytes;
}

// Reads what the server says for as long as it says something; true when it has hung up.
bool drain(int fd, int timeout_ms) {
  static std::vector<std::uint8_t> sink(1 << 20);
  for (;;) {
    pollfd event{fd, POLLIN, 0};
    const int ready = ::poll(&event, 1, timeout_ms);
    if (ready < 0 && errno == EINTR) continue;  // libFuzzer's own clock
    if (ready <= 0) return false;
    const ssize_t n = ::recv(fd, sink.data(), sink.size(), MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno == ECONNRESET)) return true;
  }
}

void say(int fd, const std::uint8_t* data, std::size_t size) {
  while (size > 0) {
    const ssize_t n = ::send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) {
      static_cast<void>(drain(fd, 1));  // it waits for us to take its replies
      continue;
    }
    if (n <= 0) return;
    data += n;
    size -= static_cast<std::size_t>(n);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Target& target = *new Target;
  if (size == 0 || size > kInputMax) return 0;
  const unsigned start = data[0] & 3U;
  const std::size_t piece = std::size_t{1} << (2 * ((data[0] >> 2U) & 7U));
  const int fd = target.connect();
  const std::vector<std::uint8_t> hello = prefix(start);
  say(fd, hello.data(), hello.size());
  for (std::size_t at = 1; at < size; at += piece) say(fd, data + at, std::min(piece, size - at));
  ::shutdown(fd, SHUT_WR);
  if (!drain(fd, kPatienceMs)) __builtin_trap();
  ::close(fd);
  return 0;
}
