#include "export/nbd_stream.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace pqblk::exports::nbd {
namespace {

constexpr std::size_t kRecordBytes = 16 * 1024;  // the largest TLS record

// A socket BIO of our own: OpenSSL's would raise SIGPIPE.
int fd_of(BIO* bio) { return static_cast<int>(reinterpret_cast<std::intptr_t>(BIO_get_data(bio))); }

int bio_result(BIO* bio, ssize_t r, int retry) {
  BIO_clear_retry_flags(bio);
  if (r < 0 && (errno == EAGAIN || errno == EINTR))
    BIO_set_flags(bio, retry | BIO_FLAGS_SHOULD_RETRY);
  return static_cast<int>(r);
}

int bio_write(BIO* bio, const char* data, int size) {
  const ssize_t r = ::send(fd_of(bio), data, static_cast<std::size_t>(size), MSG_NOSIGNAL);
  return bio_result(bio, r, BIO_FLAGS_WRITE);
}

int bio_read(BIO* bio, char* data, int size) {
  const ssize_t r = ::recv(fd_of(bio), data, static_cast<std::size_t>(size), 0);
  return bio_result(bio, r, BIO_FLAGS_READ);
}

long bio_control(BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1 : 0; }

BIO* make_bio(int fd) {
  static BIO_METHOD* const method = [] {
    BIO_METHOD* made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "pqblk socket");
    if (made == nullptr) return made;
    BIO_meth_set_write(made, bio_write);
    BIO_meth_set_read(made, bio_read);
    BIO_meth_set_ctrl(made, bio_control);
    return made;
  }();
  BIO* bio = method != nullptr ? BIO_new(method) : nullptr;
  if (bio == nullptr) return nullptr;
  BIO_set_data(bio, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)));
  BIO_set_init(bio, 1);
  return bio;
}

Stream::State state_of_errno(Stream::State wait) {
  return errno == EAGAIN || errno == EINTR ? wait : Stream::State::closed;
}

std::size_t size_of(std::span<const iovec> buffers) {
  std::size_t sum = 0;
  for (const iovec& v : buffers) sum += v.iov_len;
  return sum;
}

}  // namespace

Stream::~Stream() {
  if (ssl_ != nullptr) SSL_free(ssl_);
  ::close(fd_);
}

Error Stream::start_tls(std::shared_ptr<TlsContext> context) {
  context_ = std::move(context);
  ssl_ = SSL_new(context_->context_);
  BIO* bio = ssl_ != nullptr ? make_bio(fd_) : nullptr;
  record_.reset(new (std::nothrow) std::uint8_t[kRecordBytes]);
  if (bio == nullptr || record_ == nullptr) {
    return Error(Kind::no_memory, "no memory for a TLS session").at("start TLS");
  }
  SSL_set_bio(ssl_, bio, bio);
  SSL_set_accept_state(ssl_);
  return {};
}

Stream::State Stream::tls_state(int result) {
  switch (SSL_get_error(ssl_, result)) {
    case SSL_ERROR_NONE:
      return State::ok;
    case SSL_ERROR_WANT_READ:
      return State::wait_read;
    case SSL_ERROR_WANT_WRITE:
      return State::wait_write;
    default:
      return State::closed;
  }
}

Stream::State Stream::handshake() {
  ERR_clear_error();
  const State state = tls_state(SSL_do_handshake(ssl_));
  if (state == State::closed) {
    const char* reason = ERR_reason_error_string(ERR_peek_error());
    tls_failure_ = reason != nullptr ? reason : "the client went away";
  }
  return state;
}

Stream::Transfer Stream::receive(std::span<const iovec> to) {
  if (ssl_ == nullptr) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(to.data());  // recvmsg only reads the list
    message.msg_iovlen = to.size();
    const ssize_t r = ::recvmsg(fd_, &message, MSG_DONTWAIT);
    if (r < 0) return {0, state_of_errno(State::wait_read)};
    if (r == 0) return {0, State::closed};
    const auto bytes = static_cast<std::size_t>(r);
    return {bytes, bytes == size_of(to) ? State::ok : State::wait_read};
  }
  Transfer moved;
  for (const iovec& buffer : to) {
    std::size_t at = 0;
    while (at < buffer.iov_len) {
      std::size_t n = 0;
      ERR_clear_error();
      const int r =
          SSL_read_ex(ssl_, static_cast<char*>(buffer.iov_base) + at, buffer.iov_len - at, &n);
      if (r != 1) {
        moved.state = tls_state(r);
        return moved;
      }
      at += n;
      moved.bytes += n;
    }
  }
  return moved;
}

Stream::Transfer Stream::send(std::span<const iovec> from) {
  if (ssl_ != nullptr) return tls_send(from);
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(from.data());  // sendmsg only reads the list
  message.msg_iovlen = from.size();
  const ssize_t r = ::sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (r < 0) return {0, state_of_errno(State::wait_write)};
  const auto bytes = static_cast<std::size_t>(r);
  return {bytes, bytes == size_of(from) ? State::ok : State::wait_write};
}

// Gathers pieces up to a record. After a refusal the caller offers the same bytes again, and maybe
// more behind them, which is what OpenSSL asks for.
Stream::Transfer Stream::tls_send(std::span<const iovec> from) {
  Transfer moved;
  std::size_t index = 0, skip = 0;  // where in `from` the next byte is
  while (index < from.size()) {
    std::size_t gathered = 0;
    for (std::size_t i = index, s = skip; i < from.size() && gathered < kRecordBytes; ++i, s = 0) {
      const std::size_t n = std::min(from[i].iov_len - s, kRecordBytes - gathered);
      std::memcpy(record_.get() + gathered, static_cast<const char*>(from[i].iov_base) + s, n);
      gathered += n;
    }
    if (gathered == 0) break;  // only empty pieces are left
    std::size_t written = 0;
    ERR_clear_error();
    const int r = SSL_write_ex(ssl_, record_.get(), gathered, &written);
    if (r != 1) {
      moved.state = tls_state(r);
      return moved;
    }
    moved.bytes += written;
    for (skip += written; index < from.size() && skip >= from[index].iov_len; ++index) {
      skip -= from[index].iov_len;
    }
  }
  return moved;
}

void Stream::say_goodbye() {
  if (ssl_ == nullptr || SSL_is_init_finished(ssl_) == 0) return;
  ERR_clear_error();
  SSL_shutdown(ssl_);
}

}  // namespace pqblk::exports::nbd
