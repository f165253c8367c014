// An NBD server for one open disk: listens, negotiates, and hands each client to a queue.
//
// Room export/. A thread of its own accepts clients and negotiates with them, so that slow or
// hostile ones and the cost of a TLS handshake never meet the data path; a client that is through
// lives on one of the disk's queues (nbd_connection.h), which are dealt out in turn. The server is
// closed before its disk.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "export/nbd_connection.h"
#include "export/nbd_stream.h"
#include "image/disk.h"

namespace pqblk::exports::nbd {

inline constexpr std::uint32_t kClientsMax = 1024;    // upper bound of the option
inline constexpr std::uint32_t kNegotiatingMax = 64;  // clients in their handshake at once
inline constexpr std::uint32_t kCloseGraceMs = 5000;  // for clients to take their last replies

struct ServerOptions {
  // Where to listen; either or both.
  std::string unix_path;       // made with mode 0600; a stale socket is replaced
  std::string tcp_host;        // name or address
  std::uint16_t tcp_port = 0;  // 0: any
  TlsOptions tls;              // with it, a client that does not start TLS is refused
  bool insecure = false;       // TCP without TLS, or TLS for clients that need no certificate
  std::string export_name;     // "" is always accepted
  std::string description;
  std::uint32_t clients_max = 32;
  std::uint32_t handshake_ms = 10'000;  // from accept to transmission
  std::uint32_t stall_ms = 30'000;      // silence in the middle of a message
  std::uint32_t idle_ms = 0;            // silence between messages; 0: a guest may sleep for days
  // Lines for people: what a client did wrong, why a request failed. From any thread, until close()
  // has returned.
  std::function<void(const std::string&)> log;
};

struct ServerStats {
  std::uint32_t clients = 0, negotiating = 0;
  std::uint64_t accepted = 0, refused_clients = 0, failed_handshakes = 0, timeouts = 0;
  std::array<std::uint64_t, kCommands> commands{};  // by Command
  std::uint64_t errors = 0, refused = 0, received_bytes = 0, sent_bytes = 0;
};

class Server {
 public:
  // Blocking. The disk stays open until close() has returned. Errors: invalid_argument (nowhere to
  // listen, TCP without TLS), exists (the path or port is taken), those of TlsContext::load().
  static Result<std::unique_ptr<Server>> start(image::Disk& disk, ServerOptions options);
  ~Server();

  // Serves a client that is connected already. Owns `fd` from here on. Any thread.
  void adopt(int fd);
  // TCP: the port that was chosen; 0 without.
  std::uint16_t tcp_port() const;
  ServerStats stats() const;

  // Blocking, any thread but the queues'. Takes no more clients and requests; answers what is in
  // flight; waits for clients that do not take their replies at most kCloseGraceMs, and for I/O as
  // long as it takes.
  void close();

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace pqblk::exports::nbd
