#include "node/service_manager.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>

namespace pqblk::node {

Napi::Value notify_service_manager(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const char* const path = std::getenv("NOTIFY_SOCKET");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::size_t size = path != nullptr ? std::strlen(path) : 0;
  if (size < 2 || size >= sizeof address.sun_path) return Napi::Boolean::New(env, false);
  std::memcpy(address.sun_path, path, size);
  if (path[0] == '@') address.sun_path[0] = '\0';  // the abstract namespace
  const int fd = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return Napi::Boolean::New(env, false);
  const std::string state = info[0].ToString().Utf8Value();
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + size);
  const ssize_t sent = ::sendto(fd, state.data(), state.size(), MSG_NOSIGNAL,
                                reinterpret_cast<const sockaddr*>(&address), length);
  ::close(fd);
  return Napi::Boolean::New(env, sent == static_cast<ssize_t>(state.size()));
}

}  // namespace pqblk::node
