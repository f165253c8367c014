// A vhost-user front-end and a virtio-blk driver of our own: guest memory in a memfd, split and
// packed rings, and every message by hand, well-formed or not.
//
// Room test/export. It shares no code with the server but the message layouts: the rings are the
// driver's side, written from the specification. Memory and rings outlive a connection, as a guest
// outlives its back-end.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "export/vhost_user_protocol.h"

namespace pqblk::exports::test {

// Two adjacent regions of the guest's address space, from different places of one memfd.
class GuestRam {
 public:
  static constexpr std::uint64_t kGuestBase = 0x10'0000, kUserBase = 0x7f00'0000'0000;
  explicit GuestRam(std::uint64_t bytes);
  ~GuestRam();
  std::uint64_t allocate(std::uint64_t bytes, std::uint64_t align);  // a guest address
  std::uint8_t* at(std::uint64_t guest) const { return data_ + (guest - kGuestBase); }
  std::uint64_t user(std::uint64_t guest) const { return guest - kGuestBase + kUserBase; }
  std::vector<vu::MemoryRegion> regions() const;
  int fd() const { return fd_.get(); }
  std::uint64_t size() const { return bytes_; }
  std::uint64_t end() const { return kGuestBase + bytes_; }

 private:
  UniqueFd fd_;
  std::uint64_t bytes_;
  std::uint8_t* data_;
  std::uint64_t next_ = kGuestBase;
};

struct Buffer {
  std::uint64_t guest = 0;
  std::uint32_t length = 0;
  bool writable = false;
};

struct RingOptions {
  std::uint32_t size = 128;
  bool packed = false, indirect = false, event_idx = true;
};

// The driver's side of one ring.
class DriverRing {
 public:
  static constexpr std::size_t kTableMax = 32;  // descriptors of an indirect table
  static std::unique_ptr<DriverRing> make(GuestRam& ram, RingOptions options);
  virtual ~DriverRing() = default;

  // Takes a token back from pop(). The device sees it after publish().
  virtual void add(std::span<const Buffer> buffers, std::uint32_t token) = 0;
  void add(std::initializer_list<Buffer> buffers, std::uint32_t token) {
    add(std::span(buffers.begin(), buffers.size()), token);
  }
  virtual bool publish() = 0;  // true: the device wants a kick
  struct Used {
    std::uint32_t token, written;
  };
  virtual std::optional<Used> pop() = 0;
  // To be called once so many answers wait (split rings with EVENT_IDX; others: at the first);
  // true: they do already.
  virtual bool ask_for_calls(std::uint16_t answers = 1) = 0;
  virtual std::uint32_t base() const = 0;  // as a front-end would say it after a crash

  std::uint64_t descriptors = 0, driver = 0, device = 0;  // guest addresses
  std::uint32_t complaints = 0;  // what the device gave back and was not out, or twice

 protected:
  DriverRing(GuestRam& ram, RingOptions options);
  std::uint64_t write_table(std::uint32_t id, std::span<const Buffer> buffers, bool packed);
  GuestRam& ram_;
  const RingOptions options_;
  std::vector<std::uint64_t> tables_;
};

// The messages. Nothing is hidden: a test may send what no front-end would.
class Connection {
 public:
  explicit Connection(const std::string& path);  // connected() tells
  explicit Connection(UniqueFd fd) : fd_(std::move(fd)) {}
  bool connected() const { return static_cast<bool>(fd_); }
  bool send(vu::Type type, const void* payload, std::size_t bytes, const std::vector<int>& fds = {},
            std::uint32_t flags = 0);
  bool send_raw(const void* data, std::size_t bytes);
  std::optional<vu::Message> receive();  // waits a while; nothing: closed or silent
  template <class T>
  bool send(vu::Type type, const T& payload, const std::vector<int>& fds = {},
            std::uint32_t flags = 0) {
    return send(type, &payload, sizeof payload, fds, flags);
  }
  std::optional<std::uint64_t> get(vu::Type type);
  // With NEED_REPLY: what the back-end says of it; nothing when it hung up.
  template <class T>
  std::optional<std::uint64_t> ask(vu::Type type, const T& payload,
                                   const std::vector<int>& fds = {}) {
    if (!send(type, payload, fds, vu::kNeedReply)) return std::nullopt;
    const auto reply = receive();
    return reply ? reply->as<std::uint64_t>() : std::nullopt;
  }
  bool hung_up();  // waits a while for it
  int fd() const { return fd_.get(); }
  void close() { fd_.reset(); }

 private:
  UniqueFd fd_;
};

struct FrontEndOptions {
  std::uint32_t rings = 1;
  RingOptions ring;
  std::uint32_t depth = 16;          // requests of a ring at once
  std::uint32_t slot_bytes = 65536;  // data of a request
  std::uint64_t drop_features = 0;   // not acknowledged though offered
  bool inflight = false;
  bool read_config = true;  // once, before anything else, as QEMU does
};

struct Answer {
  std::uint32_t slot = 0;
  std::uint8_t status = 0xff;
  std::uint32_t written = 0;
};

// A guest: memory, rings and requests; connects as often as it likes.
class FrontEnd {
 public:
  FrontEnd(FrontEndOptions options);
  // Everything up to running rings; empty when it went well. The connection stays open.
  std::string connect(const std::string& path);
  std::string set_up(Connection connection);
  Connection& connection() { return *connection_; }
  void disconnect() { connection_.reset(); }
  std::string stop_rings();  // GET_VRING_BASE of all
  std::string start_rings();

  GuestRam& ram() { return ram_; }
  DriverRing& ring(std::uint32_t r) { return *rings_[r].driver; }
  std::uint64_t features() const { return features_; }
  int call_fd(std::uint32_t r) const { return rings_[r].call.get(); }
  int kick_fd(std::uint32_t r) const { return rings_[r].kick.get(); }
  int error_fd(std::uint32_t r) const { return rings_[r].error.get(); }
  // Changes the region that the server will find after the next connect().
  void scribble_inflight(const std::function<void(std::uint8_t*, std::size_t)>& change);

  // ---- requests; a slot is one at a time ----
  std::uint8_t* data(std::uint32_t r, std::uint32_t slot) const;
  std::uint64_t data_address(std::uint32_t r, std::uint32_t slot) const;
  std::uint64_t status_address(std::uint32_t r, std::uint32_t slot) const;
  std::uint64_t header_address(std::uint32_t r, std::uint32_t slot) const;
  // `pieces`: descriptors of the data.
  void add(std::uint32_t r, std::uint32_t slot, std::uint32_t type, std::uint64_t sector,
           std::uint32_t bytes, std::uint32_t pieces = 1);
  void kick(std::uint32_t r);  // publishes, and kicks if asked to
  void force_kick(std::uint32_t r);
  std::optional<Answer> poll(std::uint32_t r);
  // `answers`: no call before so many wait, of those that are out.
  std::optional<Answer> wait(std::uint32_t r, int timeout_ms = 60'000, std::uint16_t answers = 1);
  // One request alone; its status, or 0xff.
  std::uint8_t run(std::uint32_t r, std::uint32_t type, std::uint64_t sector, std::uint32_t bytes,
                   std::uint32_t pieces = 1);

 private:
  struct Ring {
    std::unique_ptr<DriverRing> driver;
    std::uint64_t area = 0;  // headers and statuses
    std::uint64_t data = 0;
    std::uint32_t base = 0;
    UniqueFd kick, call, error;
  };
  const FrontEndOptions options_;
  GuestRam ram_;
  std::vector<Ring> rings_;
  std::optional<Connection> connection_;
  std::uint64_t features_ = 0;
  bool crashed_ = false;
  bool knows_config_ = false;
  UniqueFd inflight_;
  vu::Inflight inflight_shape_{};
};

}  // namespace pqblk::exports::test
