#include "export/key_agent.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <optional>
#include <utility>

#include "export/nbd_listen.h"
#include "sealed/key_bundle.h"

namespace pqblk::exports {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Only processes of this user are served; the socket's mode says the same, but not to root.
bool same_user(int fd) {
  ucred peer{};
  socklen_t size = sizeof peer;
  return ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && size == sizeof peer &&
         peer.uid == ::geteuid();
}

// False: it did not become readable in time.
bool readable(int fd, Clock::time_point until) {
  const auto left = std::chrono::duration_cast<milliseconds>(until - Clock::now()).count();
  pollfd wait{fd, POLLIN, 0};
  return ::poll(&wait, 1, static_cast<int>(std::max<std::int64_t>(left, 0))) > 0;
}

// False: the client left, or took too long.
bool receive(int fd, void* data, std::size_t size) {
  const Clock::time_point until = Clock::now() + milliseconds(KeyAgent::kClientMs);
  auto* at = static_cast<std::uint8_t*>(data);
  while (size > 0) {
    if (!readable(fd, until)) return false;
    const ssize_t got = ::recv(fd, at, size, MSG_DONTWAIT);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got <= 0) return false;
    at += got;
    size -= static_cast<std::size_t>(got);
  }
  return true;
}

// An answer fits into the buffer of a fresh socket: what does not fit at once goes to nobody.
bool answer(int fd, const void* data, std::size_t size) {
  return ::send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(size);
}

bool refuse(int fd, sealed::Refusal reason) {
  const sealed::AgentRefusal refusal = sealed::make_refusal(reason);
  answer(fd, &refusal, sizeof refusal);
  return false;
}

}  // namespace

struct KeyAgent::Impl {
  KeyAgentOptions options;
  std::optional<nbd::Listener> listener;
  std::atomic<std::uint32_t> released{0}, refused{0};

  bool talk(int fd) const;
  void accept_one();
};

// True: the client has the keys.
bool KeyAgent::Impl::talk(int fd) const {
  if (!same_user(fd)) return false;
  sealed::AgentRequest request;
  if (!receive(fd, &request, sizeof request)) return false;
  const auto wanted = sealed::parse_request(request);
  if (!wanted) return refuse(fd, sealed::Refusal::not_understood);
  if (*wanted != options.uuid) return refuse(fd, sealed::Refusal::other_volume);
  const auto memory = sealed::BundleMemory::make();
  if (!memory) return false;
  const auto size = sealed::write_bundle(options.uuid, options.keys, memory->bytes());
  return size && answer(fd, memory->bytes().data(), *size);
}

void KeyAgent::Impl::accept_one() {
  const int fd = ::accept4(listener->fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return;  // it left again
  (talk(fd) ? released : refused).fetch_add(1, std::memory_order_relaxed);
  ::close(fd);
}

KeyAgent::KeyAgent(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KeyAgent::~KeyAgent() = default;

Result<std::unique_ptr<KeyAgent>> KeyAgent::listen(KeyAgentOptions options) {
  if (options.count == 0) return Error(Kind::invalid_argument, "an agent that releases no key");
  if (Error e = sealed::check_keys(options.keys)) return e;
  auto listener = nbd::Listener::on_unix(options.path);
  if (!listener) return listener.take_error();
  auto impl = std::make_unique<Impl>();
  impl->options = std::move(options);
  impl->listener.emplace(std::move(*listener));
  return std::unique_ptr<KeyAgent>(new KeyAgent(std::move(impl)));
}

Error KeyAgent::serve(const std::function<bool()>& go_on) {
  Impl& impl = *impl_;
  const std::uint32_t limit_ms = impl.options.timeout_ms;
  const Clock::time_point end = Clock::now() + milliseconds(limit_ms);
  Error error;
  while (impl.released < impl.options.count && !error) {
    const Clock::time_point now = Clock::now();
    if (!go_on()) {
      error = Error(Kind::canceled, "stopped before the keys were handed over");
    } else if (limit_ms != 0 && now >= end) {
      error = Error(Kind::canceled,
                    "nobody asked for the keys within " + std::to_string(limit_ms) + " ms");
    } else {
      Clock::time_point next_look = now + milliseconds(kLookMs);
      if (limit_ms != 0) next_look = std::min(next_look, end);
      if (readable(impl.listener->fd(), next_look)) impl.accept_one();
    }
  }
  impl.options.keys = {};
  impl.listener.reset();
  return error;
}

std::uint32_t KeyAgent::released() const { return impl_->released; }
std::uint32_t KeyAgent::refused() const { return impl_->refused; }

}  // namespace pqblk::exports
