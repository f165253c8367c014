// TLS keys and policy of the NBD server: TLS 1.2 and 1.3, pre-shared keys or X.509 certificates.
//
// Room export/, part of nbd_stream.h.
#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "export/nbd_stream.h"

namespace pqblk::exports::nbd {
namespace {

constexpr std::size_t kKeyFileMax = 1 << 20;
constexpr std::size_t kPskMin = 16, kPskMax = 64;  // bytes of a key
// Forward secrecy first; plain PSK last, for clients that know nothing else in TLS 1.2.
constexpr const char* kPskCiphers =
    "ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES256-GCM-SHA384:DHE-PSK-AES128-GCM-SHA256:"
    "PSK-AES256-GCM-SHA384:PSK-AES128-GCM-SHA256";
constexpr const char* kCertificateCiphers = "ECDHE+AESGCM:ECDHE+CHACHA20";

// Overwrites a text that held keys, whatever way its scope is left.
struct WipedText {
  std::string text;
  ~WipedText() { OPENSSL_cleanse(text.data(), text.size()); }
};

int digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

bool decode(std::string_view hex, std::vector<unsigned char>& out) {
  if (hex.size() % 2 != 0) return false;
  out.resize(hex.size() / 2);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const int high = digit(hex[2 * i]), low = digit(hex[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    out[i] = static_cast<unsigned char>(high * 16 + low);
  }
  return true;
}

// `what` names the content in errors.
Error read_private_file(const std::string& path, const std::string& what, std::string& text) {
  const int fd =
      ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // no wait for a FIFO's writer
  if (fd < 0) return Error::from_errno(errno, "read the " + what, path);
  struct stat status {};
  Error error;
  if (::fstat(fd, &status) != 0) {
    error = Error::from_errno(errno, "read the " + what, path);
  } else if ((status.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    error = Error(Kind::permission, "others may read it; chmod 600 it first").in(path);
  } else if (!S_ISREG(status.st_mode) || static_cast<std::size_t>(status.st_size) > kKeyFileMax) {
    error = Error(Kind::invalid_argument, "not a file of " + what).in(path);
  } else {
    text.resize(static_cast<std::size_t>(status.st_size));
    const ssize_t n = ::read(fd, text.data(), text.size());
    if (n != static_cast<ssize_t>(text.size())) {
      error = Error(Kind::io_error, "it could not be read whole").in(path);
    }
  }
  ::close(fd);
  return error;
}

Error openssl_error(std::string what, const std::string& path) {
  const char* reason = ERR_reason_error_string(ERR_peek_last_error());
  if (reason != nullptr) what.append(": ").append(reason);
  ERR_clear_error();
  return Error(Kind::invalid_argument, std::move(what)).in(path);
}

}  // namespace

struct TlsContext::Keys {
  std::map<std::string, std::vector<unsigned char>, std::less<>> by_name;

  ~Keys() {
    for (auto& [name, key] : by_name) OPENSSL_cleanse(key.data(), key.size());
  }
  Error load(const std::string& path);
};

Error TlsContext::Keys::load(const std::string& path) {
  WipedText file;
  if (Error e = read_private_file(path, "pre-shared keys", file.text)) return e;
  std::string_view rest = file.text;
  for (int line_number = 1; !rest.empty(); ++line_number) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.empty() || line.front() == '#') continue;
    const std::size_t colon = line.rfind(':');
    std::vector<unsigned char> key;
    const bool good = colon != std::string_view::npos && colon != 0 &&
                      decode(line.substr(colon + 1), key) && key.size() >= kPskMin &&
                      key.size() <= kPskMax;
    if (!good) {
      OPENSSL_cleanse(key.data(), key.size());
      return Error(Kind::invalid_argument, "line " + std::to_string(line_number) +
                                               " is not name:key with 16 to 64 bytes in hex")
          .in(path);
    }
    by_name[std::string(line.substr(0, colon))] = std::move(key);
  }
  if (by_name.empty()) return Error(Kind::invalid_argument, "there is no key in it").in(path);
  return {};
}

// Serves TLS 1.2 and, through OpenSSL's compatibility path, external PSKs of TLS 1.3.
unsigned find_psk(SSL* ssl, const char* identity, unsigned char* key, unsigned size) {
  const auto* context = static_cast<const TlsContext*>(SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl)));
  if (identity == nullptr || context->keys_ == nullptr) return 0;
  const auto found = context->keys_->by_name.find(std::string_view(identity));
  if (found == context->keys_->by_name.end() || found->second.size() > size) return 0;
  std::copy(found->second.begin(), found->second.end(), key);
  return static_cast<unsigned>(found->second.size());
}

TlsContext::TlsContext() = default;

TlsContext::~TlsContext() {
  if (context_ != nullptr) SSL_CTX_free(context_);
}

namespace {
// Also a link that leads nowhere: what cannot be read is never taken for what is not wanted.
bool is_there(const std::string& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0;
}

// One that wants a passphrase is refused: nobody is there to be asked.
Error use_private_key(SSL_CTX* context, const std::string& path) {
  WipedText file;
  if (Error e = read_private_file(path, "a private key", file.text)) return e;
  const std::unique_ptr<BIO, int (*)(BIO*)> bio(
      BIO_new_mem_buf(file.text.data(), static_cast<int>(file.text.size())), &BIO_free);
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };
  const std::unique_ptr<EVP_PKEY, void (*)(EVP_PKEY*)> key(
      bio ? PEM_read_bio_PrivateKey(bio.get(), nullptr, no_passphrase, nullptr) : nullptr,
      &EVP_PKEY_free);
  if (!key || SSL_CTX_use_PrivateKey(context, key.get()) != 1 ||
      SSL_CTX_check_private_key(context) != 1) {
    return openssl_error("not the certificate's private key in PEM, without a passphrase", path);
  }
  return {};
}
}  // namespace

Result<std::shared_ptr<TlsContext>> TlsContext::load(const TlsOptions& options) {
  std::shared_ptr<TlsContext> self(new TlsContext);
  self->context_ = SSL_CTX_new(TLS_server_method());
  if (self->context_ == nullptr) return Error(Kind::no_memory, "no memory for TLS");
  SSL_CTX* const context = self->context_;
  SSL_CTX_set_app_data(context, self.get());
  SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
  SSL_CTX_set_options(context, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
                                   SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_NO_TICKET);
  SSL_CTX_set_num_tickets(context, 0);
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                                SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_dh_auto(context, 1);
  std::string ciphers;
  if (!options.psk_file.empty()) {
    self->keys_ = std::make_unique<Keys>();
    if (Error e = self->keys_->load(options.psk_file)) return e;
    SSL_CTX_set_psk_server_callback(context, find_psk);
    ciphers = kPskCiphers;
  }
  if (!options.certificates.empty()) {
    if (Error e = self->load_certificates(options.certificates, options.any_client)) return e;
    ciphers += (ciphers.empty() ? "" : ":") + std::string(kCertificateCiphers);
  }
  if (SSL_CTX_set_cipher_list(context, ciphers.c_str()) != 1) {
    return openssl_error("no usable cipher", options.psk_file + options.certificates);
  }
  return self;
}

Error TlsContext::load_certificates(const std::string& directory, bool any_client) {
  const std::string certificate = directory + "/server-cert.pem";
  const std::string key = directory + "/server-key.pem";
  const std::string authority = directory + "/ca-cert.pem";
  const std::string revoked = directory + "/ca-crl.pem";
  std::vector<std::string> needed{certificate};
  // Without an authority whoever reaches the server is let in: only where somebody said so.
  if (!any_client || is_there(authority)) needed.push_back(authority);
  if (is_there(revoked)) needed.push_back(revoked);
  for (const std::string& path : needed) {
    if (::access(path.c_str(), R_OK) == 0) continue;
    const int err = errno;
    if (path == authority && err == ENOENT && !is_there(authority)) {
      return Error(Kind::invalid_argument,
                   "no certificate of the authority that signs clients' certificates: without it "
                   "whoever reaches the server has the disk, which --insecure would allow")
          .in(authority);
    }
    return Error::from_errno(err, "read the TLS certificate", path);
  }
  if (SSL_CTX_use_certificate_chain_file(context_, certificate.c_str()) != 1) {
    return openssl_error("not a certificate in PEM", certificate);
  }
  if (Error e = use_private_key(context_, key)) return e;
  if (!is_there(authority)) return {};
  if (SSL_CTX_load_verify_locations(context_, authority.c_str(), nullptr) != 1) {
    return openssl_error("not a certificate in PEM", authority);
  }
  SSL_CTX_set_verify(context_, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  if (!is_there(revoked)) return {};
  X509_STORE* const store = SSL_CTX_get_cert_store(context_);
  X509_LOOKUP* const lookup = X509_STORE_add_lookup(store, X509_LOOKUP_file());
  if (lookup == nullptr || X509_load_crl_file(lookup, revoked.c_str(), X509_FILETYPE_PEM) < 1) {
    return openssl_error("not a revocation list in PEM", revoked);
  }
  X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
  return {};
}

}  // namespace pqblk::exports::nbd
