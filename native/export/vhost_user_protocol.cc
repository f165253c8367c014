#include "export/vhost_user_protocol.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <cerrno>

namespace pqblk::exports {

Result<UniqueFd> make_sealed_memory(const char* name, std::uint64_t bytes) {
  UniqueFd fd(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return Error::from_errno(errno, "make shared memory");
  }
  return fd;
}

bool take_event_fd(int fd) {
  char target[64] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t length = ::readlink(link.c_str(), target, sizeof target - 1);
  if (length <= 0 || std::string_view(target) != "anon_inode:[eventfd]") return false;
  const int flags = ::fcntl(fd, F_GETFL);
  return flags >= 0 && ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

bool is_stream_socket(int fd) {
  int kind = 0, domain = 0;
  socklen_t size = sizeof kind;
  return ::getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0 && kind == SOCK_STREAM &&
         ::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX;
}

VhostSocket::Ready VhostSocket::wait(int stop_fd, int other_fd) const {
  for (;;) {
    pollfd fds[3] = {{fd_.get(), POLLIN, 0}, {stop_fd, POLLIN, 0}, {other_fd, POLLIN, 0}};
    if (::poll(fds, 3, -1) < 0) continue;  // EINTR
    if (fds[1].revents != 0) return Ready::stop;
    if (fds[0].revents != 0) return Ready::peer;
    if (fds[2].revents != 0) return Ready::other;
  }
}

long VhostSocket::read_some(std::uint8_t* into, std::size_t bytes, std::vector<UniqueFd>& fds,
                            bool& cut) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * vu::kFdsMax)];
  iovec v{into, bytes};
  msghdr message{};
  message.msg_iov = &v;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = ::recvmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (got < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
      fds.emplace_back(fd);
    }
  }
  cut = (message.msg_flags & MSG_CTRUNC) != 0;
  return got == 0 ? -1 : static_cast<long>(got);
}

bool VhostSocket::notify(vu::Notice notice) {
  const vu::Header header{static_cast<std::uint32_t>(notice), vu::kVersion, 0};
  ssize_t sent = 0;
  do {
    sent = ::send(fd_.get(), &header, sizeof header, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  return sent == static_cast<ssize_t>(sizeof header);
}

bool VhostSocket::reply(vu::Message& message, int fd) {
  message.header.flags = vu::kVersion | vu::kReply;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec v[2] = {{&message.header, sizeof message.header},
                {message.payload.data(), message.header.size}};
  msghdr out{};
  out.msg_iov = v;
  out.msg_iovlen = 2;
  if (fd >= 0) {
    out.msg_control = control;
    out.msg_controllen = sizeof control;
    cmsghdr* c = CMSG_FIRSTHDR(&out);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(c), &fd, sizeof fd);
  }
  const ssize_t whole = static_cast<ssize_t>(sizeof message.header + message.header.size);
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(fd_.get(), &out, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  return sent == whole;
}

}  // namespace pqblk::exports
