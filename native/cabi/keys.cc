// The keys of a sealed disk: from the caller's memory, from a descriptor, from an agent.
//
// Room cabi/. What a bundle looks like is sealed/key_bundle.h.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

#include "cabi/convert.h"
#include "image/disk_info.h"
#include "sealed/key_bundle.h"

namespace pqblk::cabi {
namespace {

using sealed::BundleHead;

constexpr timeval kAgentLimit{10, 0};

// Kind::corrupt when the other side ends too early.
Error read_fully(int fd, std::uint8_t* to, std::size_t size) {
  while (size > 0) {
    const ssize_t got = ::read(fd, to, size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return Error(Kind::io_error, "no key bundle came in time").at("read key bundle");
    }
    if (got < 0) return Error::from_errno(errno, "read key bundle");
    if (got == 0) return Error(Kind::corrupt, "the key bundle ends early").at("read key bundle");
    to += got;
    size -= static_cast<std::size_t>(got);
  }
  return {};
}

// The bundle whose first `have` bytes are in `memory` already.
Result<sealed::KeyBundle> read_bundle(int fd, const sealed::BundleMemory& memory,
                                      std::size_t have) {
  const auto bytes = memory.bytes();
  if (Error e = read_fully(fd, bytes.data() + have, sizeof(BundleHead) - have)) return e;
  const auto size = sealed::bundle_bytes(bytes.first<sizeof(BundleHead)>());
  if (!size) return size.error();
  const std::size_t more = *size - sizeof(BundleHead);
  if (Error e = read_fully(fd, bytes.data() + sizeof(BundleHead), more)) return e;
  return sealed::parse_bundle(bytes.first(*size));
}

Error give(Result<sealed::KeyBundle> bundle, pqblk_keys** keys) {
  if (!bundle) return bundle.take_error();
  *keys = new pqblk_keys{bundle->uuid, std::move(bundle->keys)};
  return {};
}

class Connection {
 public:
  Connection() : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {}
  ~Connection() {
    if (fd_ >= 0) ::close(fd_);
  }
  Connection(const Connection&) = delete;
  int fd() const { return fd_; }

  Error connect(const std::string& path) {
    if (fd_ < 0) return Error::from_errno(errno, "ask the key agent", path);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof address.sun_path) {
      return Error(Kind::invalid_argument, "this is no path of a Unix socket").in(path);
    }
    path.copy(address.sun_path, path.size());
    ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &kAgentLimit, sizeof kAgentLimit);
    ::setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &kAgentLimit, sizeof kAgentLimit);
    if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      if (errno == ECONNREFUSED) return Error(Kind::not_found, "no agent listens here").in(path);
      return Error::from_errno(errno, "ask the key agent", path);
    }
    return check_peer(path);
  }

 private:
  // Keys from somebody else's agent would be keys that somebody else knows.
  Error check_peer(const std::string& path) const {
    ucred peer{};
    socklen_t size = sizeof peer;
    if (::getsockopt(fd_, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
      return Error::from_errno(errno, "ask the key agent", path);
    }
    if (peer.uid == ::geteuid()) return {};
    return Error(Kind::permission, "the agent runs as user " + std::to_string(peer.uid) +
                                       ", this process as " + std::to_string(::geteuid()))
        .in(path);
  }

  int fd_;
};

Error refused(sealed::Refusal reason, const std::string& socket) {
  if (reason == sealed::Refusal::other_volume) {
    return Error(Kind::wrong_key, "the agent has the keys of another disk").in(socket);
  }
  return Error(Kind::unsupported, "the agent speaks another version").in(socket);
}

Result<sealed::KeyBundle> ask(const std::string& socket, const sealed::Uuid& volume) {
  Connection agent;
  if (Error e = agent.connect(socket)) return e;
  const sealed::AgentRequest request = sealed::make_request(volume);
  const ssize_t sent = ::send(agent.fd(), &request, sizeof request, MSG_NOSIGNAL);
  auto memory = sealed::BundleMemory::make();
  if (!memory) return memory.take_error();
  constexpr std::size_t kFirst = sizeof(sealed::AgentRefusal);
  Error error = read_fully(agent.fd(), memory->bytes().data(), kFirst);
  if (error || sent != sizeof request) {
    return Error(Kind::permission, "the agent ended the conversation").in(socket);
  }
  sealed::Refusal reason{};
  if (sealed::is_refusal(memory->bytes().first<kFirst>(), reason)) return refused(reason, socket);
  auto bundle = read_bundle(agent.fd(), *memory, kFirst);
  if (!bundle) return std::move(bundle.take_error()).in(socket);
  if (bundle->uuid != volume) return Error(Kind::wrong_key, "the agent sent other keys").in(socket);
  return bundle;
}

Error ask_for_disk(const std::string& socket, const std::string& disk, pqblk_keys** keys) {
  const auto info = image::read_disk_info(disk, image::Format::sealed);
  if (!info) return info.error();
  return give(ask(socket, info->sealed->uuid), keys);
}

Error collect(const std::uint8_t* integrity, const pqblk_data_key* data_keys, std::uint32_t count,
              sealed::VolumeKeys& out) {
  auto key = crypto::SecretKey::copy_of(std::span<const std::uint8_t, 32>(integrity, 32));
  if (!key) return key.take_error();
  out.integrity = std::move(*key);
  const std::size_t stride = data_keys->size;
  if (stride < sizeof *data_keys) return misuse("the size of a data key is too small");
  for (std::uint32_t i = 0; i < count; ++i) {
    const pqblk_data_key& from = *element(data_keys, stride, i);
    if (from.size != stride) return misuse("the data keys of an array have one size");
    auto own = crypto::SecretKey::copy_of(from.key);
    if (!own) return own.take_error();
    out.data.push_back({from.epoch, std::move(*own)});
  }
  return sealed::check_keys(out);
}

}  // namespace
}  // namespace pqblk::cabi

using namespace pqblk;        // NOLINT: the C functions live outside it
using namespace pqblk::cabi;  // NOLINT

int pqblk_keys_new(const uint8_t* volume_uuid, const uint8_t* integrity_key,
                   const pqblk_data_key* data_keys, uint32_t count, uint32_t current_epoch,
                   pqblk_keys** keys, pqblk_error* error) {
  return guarded(error, [&]() -> Error {
    if (keys == nullptr) return misuse("nowhere to put the keys");
    *keys = nullptr;
    if (volume_uuid == nullptr || integrity_key == nullptr || data_keys == nullptr || count == 0 ||
        count > sealed::kBundleEpochsMax) {
      return misuse("keys are a UUID, an integrity key and 1 to 64 data keys");
    }
    auto made = std::make_unique<pqblk_keys>();
    std::copy_n(volume_uuid, made->uuid.size(), made->uuid.begin());
    made->keys.current_epoch = current_epoch;
    if (Error e = collect(integrity_key, data_keys, count, made->keys)) return e;
    *keys = made.release();
    return {};
  });
}

int pqblk_keys_from_fd(int fd, pqblk_keys** keys, pqblk_error* error) {
  return guarded(error, [&]() -> Error {
    if (keys == nullptr) return misuse("nowhere to put the keys");
    *keys = nullptr;
    auto memory = sealed::BundleMemory::make();
    if (!memory) return memory.take_error();
    return give(read_bundle(fd, *memory, 0), keys);
  });
}

int pqblk_keys_from_agent(const char* socket, const char* disk, pqblk_keys** keys,
                          pqblk_error* error) {
  return guarded(error, [&]() -> Error {
    if (keys == nullptr) return misuse("nowhere to put the keys");
    *keys = nullptr;
    if (socket == nullptr || disk == nullptr) return misuse("an agent has a socket, keys a disk");
    return ask_for_disk(socket, disk, keys);
  });
}

void pqblk_keys_free(pqblk_keys* keys) { delete keys; }
