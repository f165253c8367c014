// A small NBD client, as blunt as a test needs it: it can also say what no client should.
//
// Room test/export. Blocking; every wait ends after kPatience. Written from the protocol's text, it
// shares with the server only the numbers and structures of nbd_protocol.h.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "export/nbd_protocol.h"
#include "export/nbd_server.h"

namespace pqblk::exports::test {

using Bytes = std::vector<std::uint8_t>;

inline constexpr int kPatienceSeconds = 60;

struct OptionAnswer {
  nbd::OptionReply type{};
  Bytes data;
};

struct Reply {
  std::uint64_t cookie = 0;
  nbd::Errno error = nbd::Errno::ok;
  bool structured = false;
  nbd::Chunk chunk = nbd::Chunk::none;
  std::uint64_t offset = 0;
  Bytes data;                                                    // of a read; a hole is filled in
  std::string message;                                           // of a structured error
  std::vector<std::pair<std::uint32_t, std::uint32_t>> extents;  // length, flags
};

class NbdClient {
 public:
  explicit NbdClient(int fd);
  // Connected to a server in this process.
  explicit NbdClient(nbd::Server& server);
  ~NbdClient();
  NbdClient(const NbdClient&) = delete;
  NbdClient& operator=(const NbdClient&) = delete;

  // ---- raw ----
  bool send(const void* data, std::size_t count);
  template <class T>
  bool send(const T& value) {
    return send(&value, sizeof value);
  }
  bool send(const Bytes& bytes) { return send(bytes.data(), bytes.size()); }
  bool receive(void* data, std::size_t count);  // all of it, or false: the end or no patience
  template <class T>
  bool receive(T& value) {
    return receive(&value, sizeof value);
  }
  bool ended();  // nothing comes any more: the server closed the connection
  void hang_up();
  int fd() const { return fd_; }

  // ---- handshake ----
  bool greet(std::uint32_t flags = nbd::kFixedNewstyle | nbd::kNoZeroes);
  bool send_option(nbd::Option option, const Bytes& data = {});
  // Replies up to and with the one that ends the option.
  std::vector<OptionAnswer> answers();
  std::vector<OptionAnswer> ask(nbd::Option option, const Bytes& data = {});
  // All of it, to the transmission phase.
  bool go(bool structured = true, bool allocation = true);

  // ---- transmission ----
  std::uint64_t size = 0;
  std::uint16_t flags = 0;
  void request(nbd::Command command, std::uint16_t command_flags, std::uint64_t cookie,
               std::uint64_t offset, std::uint32_t length, const Bytes& payload = {});
  // `read_length`: of a simple reply to a read, which does not say it.
  std::optional<Reply> reply(std::uint32_t read_length = 0);
  // One request and its reply.
  Reply call(nbd::Command command, std::uint64_t offset, std::uint32_t length,
             std::uint16_t command_flags = 0, const Bytes& payload = {});

 private:
  int fd_;
  std::uint64_t cookie_ = 1'000'000;
};

Bytes go_data(const std::string& name, const std::vector<std::uint16_t>& infos);
Bytes meta_data(const std::string& name, const std::vector<std::string>& queries);
void append_bytes(Bytes& to, const void* from, std::size_t count);
template <class T>
void append(Bytes& to, const T& value) {
  append_bytes(to, &value, sizeof value);
}

}  // namespace pqblk::exports::test
