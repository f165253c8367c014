#include "node/local_socket.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>

namespace pqblk::node {
namespace {

constexpr int kBacklog = 64;

// Calls `use` (bind or connect) with a new socket and the address of the abstract `name`.
template <typename Use>
int with_address(const std::string& name, Use use) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // The first byte is zero: no file's name begins so. The rest is not terminated.
  if (name.empty() || name.size() + 1 > sizeof address.sun_path) return -ENAMETOOLONG;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  if (use(fd, reinterpret_cast<const sockaddr*>(&address), length)) return fd;
  const int error = errno;
  ::close(fd);
  return -error;
}

std::string name_in(const Napi::CallbackInfo& info) {
  return info[0].IsString() ? info[0].As<Napi::String>().Utf8Value() : std::string();
}

}  // namespace

Napi::Value listen_local(const Napi::CallbackInfo& info) {
  const int result =
      with_address(name_in(info), [](int fd, const sockaddr* address, socklen_t length) {
        return ::bind(fd, address, length) == 0 && ::listen(fd, kBacklog) == 0;
      });
  return Napi::Number::New(info.Env(), result);
}

Napi::Value connect_local(const Napi::CallbackInfo& info) {
  const int result =
      with_address(name_in(info), [](int fd, const sockaddr* address, socklen_t length) {
        return ::connect(fd, address, length) == 0;
      });
  return Napi::Number::New(info.Env(), result);
}

Napi::Value peer_of(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const int fd = info[0].IsNumber() ? info[0].As<Napi::Number>().Int32Value() : -1;
  ucred peer{};
  socklen_t size = sizeof peer;
  // No peer: pid 0, uid -1. Of another namespace that this one does not see: pid 0 alone.
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 ||
      peer.uid == static_cast<uid_t>(-1)) {
    return env.Undefined();
  }
  const Napi::Object result = Napi::Object::New(env);
  result.Set("pid", Napi::Number::New(env, peer.pid));
  result.Set("uid", Napi::Number::New(env, peer.uid));
  return result;
}

}  // namespace pqblk::node
