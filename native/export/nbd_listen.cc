#include "export/nbd_listen.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace pqblk::exports::nbd {
namespace {

constexpr int kBacklog = 64;
constexpr int kType = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;

// Makes way for a new socket: removes the file when it is a socket that nobody listens on.
Error clear_path(const std::string& path, const sockaddr_un& address) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) {
    return errno == ENOENT ? Error() : Error::from_errno(errno, "listen", path);
  }
  if (!S_ISSOCK(status.st_mode)) {
    return Error(Kind::exists, "the path is taken by something that is no socket").in(path);
  }
  const int probe = ::socket(AF_UNIX, kType, 0);
  if (probe < 0) return Error::from_errno(errno, "listen", path);
  const int r = ::connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const bool stale = r != 0 && errno == ECONNREFUSED;
  ::close(probe);
  if (!stale) return Error(Kind::exists, "another server listens on this socket").in(path);
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    return Error::from_errno(errno, "replace the stale socket", path);
  }
  return {};
}

}  // namespace

Listener::Listener(Listener&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      path_(std::move(other.path_)),
      device_(other.device_),
      inode_(other.inode_) {
  other.path_.clear();
}

Listener::~Listener() {
  if (fd_ >= 0) ::close(fd_);
  struct stat status {};
  if (path_.empty() || ::lstat(path_.c_str(), &status) != 0) return;
  if (status.st_dev == device_ && status.st_ino == inode_) ::unlink(path_.c_str());
}

Result<Listener> Listener::on_unix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return Error(Kind::invalid_argument, "the path of a Unix socket has 1 to " +
                                             std::to_string(sizeof address.sun_path - 1) + " bytes")
        .in(path);
  }
  std::memcpy(address.sun_path, path.c_str(), path.size());
  if (Error e = clear_path(path, address)) return e;
  Listener self(::socket(AF_UNIX, kType, 0));
  if (self.fd_ < 0) return Error::from_errno(errno, "listen", path);
  // The file gets the socket's mode: there is no moment at which others could connect.
  if (::fchmod(self.fd_, S_IRUSR | S_IWUSR) != 0 ||
      ::bind(self.fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    return Error::from_errno(errno == EADDRINUSE ? EEXIST : errno, "listen", path);
  }
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) return Error::from_errno(errno, "listen", path);
  self.path_ = path;
  self.device_ = status.st_dev;
  self.inode_ = status.st_ino;
  if (::listen(self.fd_, kBacklog) != 0) return Error::from_errno(errno, "listen", path);
  return self;
}

Result<Listener> Listener::on_tcp(const std::string& host, std::uint16_t port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const std::string where = host + ":" + std::to_string(port);
  const int r = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (r != 0) return Error(Kind::invalid_argument, ::gai_strerror(r)).at("listen").in(where);
  int err = EADDRNOTAVAIL;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    Listener self(::socket(at->ai_family, at->ai_socktype | kType, at->ai_protocol));
    const int on = 1;
    if (self.fd_ >= 0 && ::setsockopt(self.fd_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0 &&
        ::bind(self.fd_, at->ai_addr, at->ai_addrlen) == 0 && ::listen(self.fd_, kBacklog) == 0) {
      ::freeaddrinfo(found);
      return self;
    }
    err = errno;
  }
  ::freeaddrinfo(found);
  return Error::from_errno(err == EADDRINUSE ? EEXIST : err, "listen", where);
}

std::uint16_t Listener::port() const {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (::getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  if (address.ss_family == AF_INET) {
    return ntohs(reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
  }
  if (address.ss_family == AF_INET6) {
    return ntohs(reinterpret_cast<const sockaddr_in6*>(&address)->sin6_port);
  }
  return 0;
}

}  // namespace pqblk::exports::nbd
