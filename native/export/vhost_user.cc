#include "export/vhost_user.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "export/vhost_user_session.h"
#include "io/thread_setup.h"

namespace pqblk::exports {
namespace {

constexpr int kBacklog = 4;
constexpr int kProbeMs = 20;

Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return Error(
        Kind::invalid_argument,
        "the path of a socket has 1 to " + std::to_string(sizeof address.sun_path - 1) + " bytes");
  }
  path.copy(address.sun_path, path.size());
  return address;
}

// A socket that nobody listens to is what a killed server leaves behind.
Error make_way(const std::string& path, const sockaddr_un& address) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) {
    return errno == ENOENT ? Error() : Error::from_errno(errno, "look at socket", path);
  }
  if (!S_ISSOCK(status.st_mode)) {
    return Error(Kind::exists, "there is a file that is not a socket").in(path);
  }
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!probe) return Error::from_errno(errno, "socket", path);
  const auto* generic = reinterpret_cast<const sockaddr*>(&address);
  if (::connect(probe.get(), generic, sizeof address) == 0 || errno == EAGAIN) {
    return Error(Kind::exists, "somebody listens on this socket").in(path);
  }
  if (errno != ECONNREFUSED) return Error::from_errno(errno, "try socket", path);
  if (::unlink(path.c_str()) != 0) return Error::from_errno(errno, "remove stale socket", path);
  return {};
}

Result<UniqueFd> listen_at(const std::string& path) {
  const auto address = address_of(path);
  if (!address) return address.error();
  if (Error e = make_way(path, *address)) return e;
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return Error::from_errno(errno, "socket", path);
  const auto* generic = reinterpret_cast<const sockaddr*>(&*address);
  ::fchmod(fd.get(), 0600);  // which bind() gives to the file; whoever connects has the disk
  if (::bind(fd.get(), generic, sizeof *address) != 0) {
    return Error::from_errno(errno, "bind socket", path);
  }
  if (::listen(fd.get(), kBacklog) != 0) {
    const int err = errno;
    ::unlink(path.c_str());
    return Error::from_errno(err, "listen", path);
  }
  return fd;
}

// Whether whoever connected only looked if somebody listens. A front-end speaks first, or waits.
bool is_gone(int fd) {
  pollfd waiting{fd, POLLIN, 0};
  char first = 0;
  return ::poll(&waiting, 1, kProbeMs) == 1 && ::recv(fd, &first, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

// Whether an inherited socket listens. What is none is left as it is.
Result<bool> inspect(int fd) {
  if (!is_stream_socket(fd)) {
    return Error(Kind::invalid_argument,
                 "descriptor " + std::to_string(fd) + " is no inherited Unix stream socket");
  }
  int listening = 0;
  socklen_t size = sizeof listening;
  if (::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0) {
    return Error::from_errno(errno, "inherited socket");
  }
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  if (listening != 0) ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
  return listening != 0;
}

}  // namespace

struct VhostUserServer::Impl {
  Impl(image::Disk& d, VhostUserOptions o) : disk(d), options(std::move(o)), log(options.log) {}

  Error open();
  void serve();
  void serve_one(UniqueFd socket);
  void refuse_one();
  void stop();
  UniqueFd accept_one();

  image::Disk& disk;
  VhostUserOptions options;
  ReportLog log;
  UniqueFd listener, connected, stop_event;
  ino_t made_inode = 0;  // of the socket that this server made
  std::atomic<bool> serving{true}, in_session{false};
  std::atomic<std::uint64_t> accepted{0}, refused{0};
  std::vector<VringCounters> rings;
  std::atomic<bool> writeback{true};
  std::mutex session_lock;
  VhostSession* session = nullptr;  // the one there is
  std::thread thread;
};

Error VhostUserServer::Impl::open() {
  const int inherited = std::exchange(options.fd, -1);
  if (inherited >= 0) {
    const auto listens = inspect(inherited);
    if (!listens) return listens.error();
    (*listens ? listener : connected) = UniqueFd(inherited);
  }
  if (options.queues == 0) options.queues = disk.facts().queues;
  if (options.queues > image::kMaxQueues) {
    return Error(Kind::invalid_argument, "a device has 1 to " + std::to_string(image::kMaxQueues) +
                                             " queues, not " + std::to_string(options.queues));
  }
  rings = std::vector<VringCounters>(options.queues);
  stop_event = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop_event) return Error::from_errno(errno, "eventfd");
  if (inherited >= 0) return {};
  auto listening = listen_at(options.path);
  if (!listening) return listening.take_error();
  listener = std::move(*listening);
  struct stat status {};
  if (::lstat(options.path.c_str(), &status) == 0) made_inode = status.st_ino;
  return {};
}

UniqueFd VhostUserServer::Impl::accept_one() {
  return UniqueFd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

void VhostUserServer::Impl::refuse_one() {
  const UniqueFd socket = accept_one();
  if (!socket || is_gone(socket.get())) return;
  refused.fetch_add(1, std::memory_order_relaxed);
  log.say("vhost-user: a second front-end was turned away");
}

void VhostUserServer::Impl::serve_one(UniqueFd socket) {
  accepted.fetch_add(1, std::memory_order_relaxed);
  in_session.store(true, std::memory_order_release);
  VhostSession one({disk, options.queues, log, rings, writeback}, std::move(socket));
  const auto publish = [this](VhostSession* now) {
    const std::lock_guard guard(session_lock);
    session = now;
  };
  publish(&one);
  one.run(stop_event.get(), listener.get(), [this] { refuse_one(); });
  publish(nullptr);
  in_session.store(false, std::memory_order_release);
}

void VhostUserServer::Impl::serve() {
  io::set_up_thread("pqblk-vhost");
  if (connected) serve_one(std::move(connected));
  while (listener) {
    pollfd fds[2] = {{stop_event.get(), POLLIN, 0}, {listener.get(), POLLIN, 0}};
    if (::poll(fds, 2, -1) < 0) continue;
    if (fds[0].revents != 0) break;
    UniqueFd socket = accept_one();
    if (socket) {
      serve_one(std::move(socket));
    } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
      // Out of descriptors or memory: the knock stays, and must not keep a core busy.
      ::poll(fds, 1, 100);
    }
  }
  serving.store(false, std::memory_order_release);
}

void VhostUserServer::Impl::stop() {
  if (thread.joinable()) {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t r = ::write(stop_event.get(), &one, sizeof one);
    thread.join();
  }
  serving.store(false, std::memory_order_release);
  listener.reset();
  struct stat status {};
  // Somebody may have put another socket in its place.
  if (made_inode != 0 && ::lstat(options.path.c_str(), &status) == 0 &&
      status.st_ino == made_inode) {
    ::unlink(options.path.c_str());
  }
  made_inode = 0;
}

VhostUserServer::VhostUserServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

VhostUserServer::~VhostUserServer() { stop(); }

void VhostUserServer::stop() { impl_->stop(); }

void VhostUserServer::config_changed() {
  const std::lock_guard guard(impl_->session_lock);
  if (impl_->session != nullptr) impl_->session->config_changed();
}

VhostUserStats VhostUserServer::stats() const {
  VhostUserStats s;
  s.connected = connected();
  s.accepted = impl_->accepted.load(std::memory_order_relaxed);
  s.refused = impl_->refused.load(std::memory_order_relaxed);
  s.rings = impl_->options.queues;
  for (const VringCounters& ring : impl_->rings) {
    if (ring.running.load(std::memory_order_relaxed)) ++s.running;
    s.errors += ring.errors.get();
    s.requests += ring.requests.get();
  }
  return s;
}

bool VhostUserServer::serving() const { return impl_->serving.load(std::memory_order_acquire); }

bool VhostUserServer::connected() const {
  return impl_->in_session.load(std::memory_order_acquire);
}

Result<std::unique_ptr<VhostUserServer>> VhostUserServer::start(image::Disk& disk,
                                                                VhostUserOptions options) {
  auto impl = std::make_unique<Impl>(disk, std::move(options));
  if (Error e = impl->open()) {
    impl->stop();
    return e;
  }
  try {
    impl->thread = std::thread([raw = impl.get()] { raw->serve(); });
  } catch (const std::system_error& error) {
    impl->stop();
    return Error::from_errno(error.code().value(), "start server thread");
  }
  return std::unique_ptr<VhostUserServer>(new VhostUserServer(std::move(impl)));
}

}  // namespace pqblk::exports
