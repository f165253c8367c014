// A client's byte stream: a non-blocking socket, in plain text or under TLS.
//
// Room export/. It moves bytes and says what to wait for; it knows nothing of NBD. One thread at a
// time uses it.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/error.h"

struct ssl_st;
struct ssl_ctx_st;

namespace pqblk::exports::nbd {

struct TlsOptions {
  // Lines `name:hex`, as GnuTLS's psktool writes them. Symmetric keys: safe from quantum computers.
  std::string psk_file;
  // server-cert.pem, server-key.pem and ca-cert.pem: clients must show a certificate that it
  // signed, which ca-crl.pem (if there is one) must not revoke.
  std::string certificates;
  bool any_client = false;  // without ca-cert.pem: clients need none

  bool wanted() const { return !psk_file.empty() || !certificates.empty(); }
};

class TlsContext {
 public:
  // Errors: not_found, permission, invalid_argument (the file's content), with the file's path.
  static Result<std::shared_ptr<TlsContext>> load(const TlsOptions& options);
  ~TlsContext();
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;

 private:
  friend class Stream;
  friend unsigned find_psk(ssl_st*, const char*, unsigned char*, unsigned);
  struct Keys;
  TlsContext();
  Error load_certificates(const std::string& directory, bool any_client);

  ssl_ctx_st* context_ = nullptr;
  std::unique_ptr<Keys> keys_;
};

class Stream {
 public:
  enum class State : std::uint8_t { ok, wait_read, wait_write, closed };
  struct Transfer {
    std::size_t bytes = 0;
    State state = State::ok;  // why it moved no more; ok: the buffers are used up
  };

  explicit Stream(int fd) : fd_(fd) {}  // owned; non-blocking
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int fd() const { return fd_; }
  bool encrypted() const { return ssl_ != nullptr; }
  // Begins TLS as the server; then call handshake() until it says ok or closed.
  Error start_tls(std::shared_ptr<TlsContext> context);
  State handshake();
  std::string tls_failure() const { return tls_failure_; }  // why handshake() said closed

  Transfer receive(std::span<const iovec> to);
  Transfer send(std::span<const iovec> from);
  void say_goodbye();  // TLS: close_notify, if it can go at once

 private:
  State tls_state(int result);
  Transfer tls_send(std::span<const iovec> from);

  const int fd_;
  ssl_st* ssl_ = nullptr;
  std::shared_ptr<TlsContext> context_;
  std::unique_ptr<std::uint8_t[]> record_;  // where small pieces become one TLS record
  std::string tls_failure_;
};

}  // namespace pqblk::exports::nbd
