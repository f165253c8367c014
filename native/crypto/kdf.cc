#include "crypto/kdf.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <sys/random.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "crypto/secret_memory.h"

namespace pqblk::crypto {
namespace {

// These functions have no error path: what they need is in every libcrypto since 3.0, and a wrong
// key would be worse than no process.
void must(bool done, const char* what) {
  if (done) return;
  std::fprintf(stderr, "pqblk: libcrypto failed: %s\n", what);
  std::abort();
}

EVP_MAC* hmac_method() {
  static EVP_MAC* const method = EVP_MAC_fetch(nullptr, "HMAC", nullptr);
  must(method != nullptr, "no HMAC");
  return method;
}

// HMAC-SHA3-256 over pieces. libcrypto cleanses the context when it is freed.
class Hmac {
 public:
  explicit Hmac(std::span<const std::uint8_t> key) : context_(EVP_MAC_CTX_new(hmac_method())) {
    must(context_ != nullptr, "no memory for HMAC");
    char digest[] = "SHA3-256";
    const OSSL_PARAM params[] = {OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
                                 OSSL_PARAM_construct_end()};
    // HMAC pads keys with zero bytes, so an empty key (which libcrypto takes for "keep the last
    // one") is the key of one zero byte.
    static constexpr std::uint8_t kEmpty[1] = {};
    if (key.empty()) key = kEmpty;
    must(EVP_MAC_init(context_, key.data(), key.size(), params) == 1, "HMAC-SHA3-256 key");
  }
  ~Hmac() { EVP_MAC_CTX_free(context_); }
  Hmac(const Hmac&) = delete;
  Hmac& operator=(const Hmac&) = delete;

  Hmac& add(std::span<const std::uint8_t> bytes) {
    if (bytes.empty()) return *this;
    must(EVP_MAC_update(context_, bytes.data(), bytes.size()) == 1, "HMAC-SHA3-256 message");
    return *this;
  }

  void finish(Digest& digest) {
    std::size_t size = 0;
    must(EVP_MAC_final(context_, digest.data(), &size, digest.size()) == 1 && size == digest.size(),
         "HMAC-SHA3-256 result");
  }

 private:
  EVP_MAC_CTX* context_;
};

constexpr std::size_t kHkdfBlocksMax = 255;

}  // namespace

Digest sha3_256(std::span<const std::uint8_t> message) {
  Digest digest;
  unsigned int size = 0;
  must(EVP_Digest(message.data(), message.size(), digest.data(), &size, EVP_sha3_256(), nullptr) ==
               1 &&
           size == digest.size(),
       "SHA3-256");
  return digest;
}

Digest hmac_sha3_256(std::span<const std::uint8_t> key, std::span<const std::uint8_t> message) {
  Digest digest;
  Hmac(key).add(message).finish(digest);
  return digest;
}

void hkdf_sha3_256(std::span<const std::uint8_t> secret, std::span<const std::uint8_t> salt,
                   std::span<const std::uint8_t> info, std::span<std::uint8_t> out) {
  assert(out.size() <= kHkdfBlocksMax * sizeof(Digest));
  Digest extracted;
  Hmac(salt).add(secret).finish(extracted);  // an absent salt is a key of zeros, as HMAC pads it
  Digest block;
  std::span<const std::uint8_t> previous;
  for (std::uint8_t counter = 1; !out.empty(); ++counter) {
    const std::uint8_t last[1] = {counter};
    Hmac(extracted).add(previous).add(info).add(last).finish(block);
    previous = block;
    const std::size_t taken = std::min(out.size(), block.size());
    std::memcpy(out.data(), block.data(), taken);
    out = out.subspan(taken);
  }
  wipe(extracted.data(), extracted.size());
  wipe(block.data(), block.size());
}

Error random_bytes(std::span<std::uint8_t> out) {
  while (!out.empty()) {
    const ssize_t got = ::getrandom(out.data(), out.size(), 0);
    if (got > 0) {
      out = out.subspan(static_cast<std::size_t>(got));
    } else if (got == 0 || errno != EINTR) {
      const std::string cause = got == 0 ? "no bytes" : std::strerror(errno);
      return Error(Kind::no_random, "the kernel gave no random bytes: " + cause).at("getrandom");
    }
  }
  return {};
}

bool equal_ct(std::span<const std::uint8_t> a, std::span<const std::uint8_t> b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

void wipe(void* data, std::size_t size) {
  if (size > 0) OPENSSL_cleanse(data, size);
}

Result<SecretKey> SecretKey::copy_of(std::span<const std::uint8_t, 32> bytes) {
  static_assert(kSecretKeySlotBytes == 32);
  auto slot = secret_allocate(SecretSlot::key);
  if (!slot) return slot.take_error();
  SecretKey key;
  key.data_ = static_cast<std::uint8_t*>(*slot);
  std::memcpy(key.data_, bytes.data(), bytes.size());
  return key;
}

SecretKey::SecretKey(SecretKey&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}

SecretKey& SecretKey::operator=(SecretKey&& other) noexcept {
  std::swap(data_, other.data_);
  return *this;
}

SecretKey::~SecretKey() {
  if (data_ != nullptr) secret_release(SecretSlot::key, data_);
}

std::span<const std::uint8_t, 32> SecretKey::bytes() const {
  assert(data_ != nullptr);
  return std::span<const std::uint8_t, 32>(data_, 32);
}

}  // namespace pqblk::crypto
