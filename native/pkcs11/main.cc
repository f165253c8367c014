// pqblk-pkcs11: the process in which a vendor's PKCS#11 module runs, so that its crash, hang or lie
// ends an unlock and nothing else.
//
// Room pkcs11/. Descriptor 3 is a stream socket to pqblk, which starts this program, asks, and ends
// it. No arguments, no files, no messages on stdout or stderr (both belong to the module and go to
// /dev/null). It ends with its parent, cannot gain privileges, and leaves no core dump.

#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>

#include "base/endian.h"
#include "pkcs11/server.h"

namespace {

using namespace pqblk;
using namespace pqblk::pkcs11;

constexpr int kSocket = 3;

// What the sanitizers' own reports need: a leak check traces its process.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kDumpable = true;
#else
constexpr bool kDumpable = false;
#endif

enum Exit : int { kDone = 0, kNoMemory = 70, kBadFrame = 71, kNotStartedByPqblk = 72 };

bool confine() {
  const rlimit none{0, 0};
  return ::prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 && ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::setrlimit(RLIMIT_CORE, &none) == 0 && (kDumpable || ::prctl(PR_SET_DUMPABLE, 0) == 0);
}

// A module may fork. What it leaves behind would hold our socket and outlive us: it dies with the
// thread that made it, also after an exec, and so do its own children.
pid_t forking = 0;

void about_to_fork() { forking = ::getpid(); }
void end_with_parent() {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != forking) ::_exit(0);  // it has ended already
}

bool read_all(std::span<std::uint8_t> into) {
  while (!into.empty()) {
    const ssize_t got = ::read(kSocket, into.data(), into.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    into = into.subspan(static_cast<std::size_t>(got));
  }
  return true;
}

bool write_all(std::span<const std::uint8_t> from) {
  while (!from.empty()) {
    const ssize_t put = ::write(kSocket, from.data(), from.size());
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return false;
    from = from.subspan(static_cast<std::size_t>(put));
  }
  return true;
}

int serve(Server& server, std::span<std::uint8_t> in, std::span<std::uint8_t> out) {
  constexpr std::size_t head = sizeof(Le32);
  while (!server.closed()) {
    Le32 length;
    std::uint8_t raw[head];
    if (!read_all(raw)) return kDone;  // pqblk is gone
    std::memcpy(static_cast<void*>(&length), raw, head);
    if (length > in.size()) return kBadFrame;
    const std::span<std::uint8_t> request = in.first(length);
    if (!read_all(request)) return kBadFrame;
    const auto reply = server.answer(request, out.subspan(head));
    ::explicit_bzero(request.data(), request.size());
    length = static_cast<std::uint32_t>(reply.size());
    std::memcpy(out.data(), &length, head);
    const bool sent = write_all(out.first(head + reply.size()));
    ::explicit_bzero(out.data(), head + reply.size());
    if (!sent) return kDone;
  }
  return kDone;
}

}  // namespace

int main() {
  if (!confine() || ::pthread_atfork(about_to_fork, nullptr, end_with_parent) != 0) {
    return kNotStartedByPqblk;
  }
  std::signal(SIGPIPE, SIG_IGN);
  // A terminal's Ctrl-C goes to every process in front: pqblk decides when this one ends.
  std::signal(SIGINT, SIG_IGN);
  auto in = LockedBuffer::make(kMessageBytesMax);
  auto out = LockedBuffer::make(kMessageBytesMax + sizeof(Le32));
  auto values = LockedBuffer::make(2 * kMessageBytesMax);
  if (!in || !out || !values) return kNoMemory;
  Server server(std::move(*values));
  return serve(server, in->bytes(), out->bytes());
}
