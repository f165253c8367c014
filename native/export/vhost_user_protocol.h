// Messages of the vhost-user protocol, and the socket that carries them with their descriptors.
//
// Room export/: layouts, sizes and the transport; what a message does is vhost_user_session.h.
// Fields are in the host's byte order. A socket never blocks its thread: receiving waits in poll()
// next to a descriptor that ends the wait, and a peer that does not take its replies loses the
// connection.
#pragma once

#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace pqblk::exports {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~UniqueFd() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset() { *this = UniqueFd(); }

 private:
  int fd_ = -1;
};

namespace vu {

enum class Type : std::uint32_t {
  get_features = 1,
  set_features = 2,
  set_owner = 3,
  reset_owner = 4,
  set_mem_table = 5,
  set_log_base = 6,
  set_log_fd = 7,
  set_vring_num = 8,
  set_vring_addr = 9,
  set_vring_base = 10,
  get_vring_base = 11,
  set_vring_kick = 12,
  set_vring_call = 13,
  set_vring_err = 14,
  get_protocol_features = 15,
  set_protocol_features = 16,
  get_queue_num = 17,
  set_vring_enable = 18,
  set_backend_fd = 21,
  get_config = 24,
  set_config = 25,
  get_inflight_fd = 31,
  set_inflight_fd = 32,
  reset_device = 34,
  get_max_mem_slots = 36,
  add_mem_reg = 37,
  rem_mem_reg = 38,
};

// What the back-end says on a channel of its own.
enum class Notice : std::uint32_t { config_changed = 2 };

inline constexpr std::uint64_t kFeatureLogAll = std::uint64_t{1} << 26;
inline constexpr std::uint64_t kFeatureProtocol = std::uint64_t{1} << 30;

inline constexpr std::uint64_t kProtocolMultiQueue = 1 << 0;
inline constexpr std::uint64_t kProtocolLogShmFd = 1 << 1;
inline constexpr std::uint64_t kProtocolReplyAck = 1 << 3;
inline constexpr std::uint64_t kProtocolBackendChannel = 1 << 5;
inline constexpr std::uint64_t kProtocolConfig = 1 << 9;
inline constexpr std::uint64_t kProtocolInflight = 1 << 12;
inline constexpr std::uint64_t kProtocolResetDevice = 1 << 13;
inline constexpr std::uint64_t kProtocolMemSlots = 1 << 15;

inline constexpr std::uint32_t kVersion = 1, kVersionMask = 3, kReply = 4, kNeedReply = 8;
inline constexpr std::uint64_t kNoFd = 1 << 8;      // of SET_VRING_KICK, _CALL, _ERR
inline constexpr std::uint64_t kIndexMask = 0xff;   // of the same
inline constexpr std::uint32_t kVringLog = 1 << 0;  // of SET_VRING_ADDR
inline constexpr std::size_t kPayloadMax = 1024;    // bytes; the largest of ours has 308
inline constexpr std::size_t kTableRegionsMax = 8;  // of SET_MEM_TABLE
inline constexpr std::size_t kFdsMax = kTableRegionsMax;
inline constexpr std::size_t kConfigMax = 256;

struct Header {
  std::uint32_t type, flags, size;
};
static_assert(sizeof(Header) == 12);

struct MemoryRegion {
  std::uint64_t guest, size, user, file_offset;
};
struct MemoryTable {  // followed by MemoryRegions
  std::uint32_t regions, padding;
};
struct SingleRegion {
  std::uint64_t padding;
  MemoryRegion region;
};
struct VringState {
  std::uint32_t index, number;
};
struct VringAddress {
  std::uint32_t index, flags;
  std::uint64_t descriptors, used, available, log;
};
struct Log {
  std::uint64_t size, offset;
};
struct Config {  // followed by `size` bytes
  std::uint32_t offset, size, flags;
};
struct Inflight {
  std::uint64_t size, offset;
  std::uint16_t queues, ring_size;
  std::uint32_t padding;
};
static_assert(sizeof(MemoryRegion) == 32 && sizeof(SingleRegion) == 40);
static_assert(sizeof(VringAddress) == 40 && sizeof(Config) == 12 && sizeof(Inflight) == 24);

struct Message {
  Header header{};
  std::array<std::uint8_t, kPayloadMax> payload{};
  std::vector<UniqueFd> fds;

  Type type() const { return static_cast<Type>(header.type); }
  std::span<const std::uint8_t> bytes() const { return {payload.data(), header.size}; }
  // The payload's beginning as a T; nothing when it is shorter.
  template <class T>
  std::optional<T> as() const {
    if (header.size < sizeof(T)) return std::nullopt;
    T value;
    std::memcpy(&value, payload.data(), sizeof value);
    return value;
  }
  template <class T>
  void set(const T& value) {
    std::memcpy(payload.data(), &value, sizeof value);
    header.size = sizeof value;
  }
};

}  // namespace vu

// Memory that can be handed over and never shrinks under its users.
Result<UniqueFd> make_sealed_memory(const char* name, std::uint64_t bytes);
// Anything else could block whoever writes to it, or never become readable by writing to it. False
// where the system does not tell (/proc is not mounted).
bool take_event_fd(int fd);

// Whether it is a Unix stream socket.
bool is_stream_socket(int fd);

// What receive() met.
enum class Received : std::uint8_t { message, closed, stopped, refused };

class VhostSocket {
 public:
  explicit VhostSocket(UniqueFd fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }
  // Waits for a whole message. `stopped`: `stop_fd` became readable. `refused`: `why` says what is
  // wrong with it, and the stream cannot be followed any further. `idle` is called when `other_fd`
  // (a listening socket, or -1) becomes readable meanwhile.
  template <class Idle>
  Received receive(vu::Message& message, int stop_fd, int other_fd, Idle idle, std::string& why);
  // A reply to `message`'s type. False: the peer is gone or does not read.
  bool reply(vu::Message& message, int fd = -1);
  // A message without payload that nobody answers. False as above.
  bool notify(vu::Notice notice);

 private:
  enum class Ready : std::uint8_t { peer, stop, other };
  Ready wait(int stop_fd, int other_fd) const;
  // Reads up to `bytes` more; 0: none there now; negative: the end.
  long read_some(std::uint8_t* into, std::size_t bytes, std::vector<UniqueFd>& fds, bool& cut);

  UniqueFd fd_;
};

template <class Idle>
Received VhostSocket::receive(vu::Message& message, int stop_fd, int other_fd, Idle idle,
                              std::string& why) {
  message.fds.clear();
  message.header = {};
  std::size_t have = 0;
  constexpr std::size_t kHeader = sizeof(vu::Header);
  while (have < kHeader || have < kHeader + message.header.size) {
    const Ready ready = wait(stop_fd, other_fd);
    if (ready == Ready::stop) return Received::stopped;
    if (ready == Ready::other) {
      idle();
      continue;
    }
    const bool in_header = have < kHeader;
    std::uint8_t* into = in_header ? reinterpret_cast<std::uint8_t*>(&message.header) + have
                                   : message.payload.data() + (have - kHeader);
    const std::size_t left = (in_header ? kHeader : kHeader + message.header.size) - have;
    bool cut = false;
    const long got = read_some(into, left, message.fds, cut);
    if (got < 0) return Received::closed;
    have += static_cast<std::size_t>(got);
    if (cut || message.fds.size() > vu::kFdsMax) {
      why = "a message with more descriptors than any has";
      return Received::refused;
    }
    if (in_header && have == kHeader) {
      const vu::Header& h = message.header;
      if ((h.flags & vu::kVersionMask) != vu::kVersion || (h.flags & vu::kReply) != 0 ||
          h.size > vu::kPayloadMax) {
        why = "not a vhost-user request: type " + std::to_string(h.type) + ", flags " +
              std::to_string(h.flags) + ", " + std::to_string(h.size) + " bytes";
        return Received::refused;
      }
    }
  }
  return Received::message;
}

}  // namespace pqblk::exports
