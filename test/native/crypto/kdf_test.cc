// HMAC, HKDF, random bytes, comparison and wiping.
#include "crypto/kdf.h"

#include <doctest/doctest.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <vector>

#include "crypto/aead_oracle.h"
#include "crypto/vectors.h"

using namespace pqblk::crypto;
using pqblk::test::Bytes;
using pqblk::test::from_hex;
using pqblk::test::random_content;

namespace {

// libcrypto's own HKDF, which room crypto/ does not use.
Bytes oracle_hkdf(Bytes secret, Bytes salt, Bytes info, std::size_t size) {
  const std::unique_ptr<EVP_KDF, decltype(&EVP_KDF_free)> kdf(
      EVP_KDF_fetch(nullptr, "HKDF", nullptr), &EVP_KDF_free);
  const std::unique_ptr<EVP_KDF_CTX, decltype(&EVP_KDF_CTX_free)> context(
      EVP_KDF_CTX_new(kdf.get()), &EVP_KDF_CTX_free);
  char digest[] = "SHA3-256";
  std::vector<OSSL_PARAM> params{
      OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
      OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, secret.data(), secret.size())};
  const auto add = [&](const char* name, Bytes& value) {  // it takes no empty ones
    if (value.empty()) return;
    params.push_back(OSSL_PARAM_construct_octet_string(name, value.data(), value.size()));
  };
  add(OSSL_KDF_PARAM_SALT, salt);
  add(OSSL_KDF_PARAM_INFO, info);
  params.push_back(OSSL_PARAM_construct_end());
  Bytes out(size);
  REQUIRE(EVP_KDF_derive(context.get(), out.data(), out.size(), params.data()) == 1);
  return out;
}

Bytes ours(const Bytes& secret, const Bytes& salt, const Bytes& info, std::size_t size) {
  Bytes out(size);
  hkdf_sha3_256(secret, salt, info, out);
  return out;
}

}  // namespace

TEST_CASE("SHA3-256 gives the values that NIST published") {
  const Bytes abc{'a', 'b', 'c'};
  const Bytes of_nothing =
      from_hex("a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a");
  const Bytes of_abc = from_hex("3a985da74fe225b2045c172d6bd390bd855f086e3e9d525b46bfe24511431532");
  const Digest nothing = sha3_256({});
  const Digest letters = sha3_256(abc);
  CHECK(Bytes(nothing.begin(), nothing.end()) == of_nothing);
  CHECK(Bytes(letters.begin(), letters.end()) == of_abc);
}

TEST_CASE("HKDF-SHA3-256 agrees with libcrypto's") {
  std::mt19937_64 random(41);
  for (std::size_t size = 1; size <= 200; ++size) {
    CAPTURE(size);
    const Bytes secret = random_content(random, 1 + random() % 80);
    const Bytes salt = random_content(random, random() % 160);
    const Bytes info = random_content(random, random() % 200);
    REQUIRE(ours(secret, salt, info, size) == oracle_hkdf(secret, salt, info, size));
  }
  const Bytes secret = random_content(random, 32);
  CHECK(ours(secret, {}, {}, 255 * 32) == oracle_hkdf(secret, {}, {}, 255 * 32));
  CHECK(ours(secret, {}, {}, 32) == ours(secret, Bytes(32, 0), {}, 32));  // RFC 5869 section 2.2
  CHECK(ours(secret, {}, {}, 32) != ours(secret, {}, {1}, 32));
  CHECK(ours(secret, {}, {}, 0).empty());
}

TEST_CASE("HMAC of an empty key is HMAC of a block of zeros") {
  constexpr std::size_t kSha3BlockBytes = 136;
  const Bytes message{1, 2, 3};
  const Digest digest = hmac_sha3_256({}, message);
  CHECK(digest == hmac_sha3_256(Bytes(kSha3BlockBytes, 0), message));
  CHECK(digest != hmac_sha3_256(Bytes{1}, message));
  CHECK(hmac_sha3_256(Bytes{7}, {}) != hmac_sha3_256(Bytes{7}, Bytes{0}));
}

TEST_CASE("random bytes reach the whole of the span and nothing else") {
  for (const std::size_t size : {0u, 1u, 32u, 257u, 70000u}) {
    CAPTURE(size);
    Bytes ever(size + 2, 0);
    for (int round = 0; round < 8; ++round) {
      Bytes bytes(size + 2, 0);
      REQUIRE_FALSE(random_bytes(std::span(bytes).subspan(1, size)));
      CHECK(bytes.front() == 0);
      CHECK(bytes.back() == 0);
      for (std::size_t i = 0; i < ever.size(); ++i) {
        ever[i] = static_cast<std::uint8_t>(ever[i] | bytes[i]);
      }
    }
    // A byte stays 0 through eight draws once in 2^64.
    CHECK(std::count(ever.begin(), ever.end(), 0) == 2);
  }
}

TEST_CASE("comparison looks at every byte and at the size") {
  Bytes a(48, 5);
  CHECK(equal_ct(a, Bytes(48, 5)));
  CHECK(equal_ct({}, {}));
  CHECK_FALSE(equal_ct(a, Bytes(47, 5)));
  for (std::size_t i = 0; i < a.size(); ++i) {
    Bytes b = a;
    b[i] ^= 0x80;
    CHECK_FALSE(equal_ct(a, b));
  }
}

TEST_CASE("wipe leaves zeros") {
  Bytes secret(100, 9);
  wipe(secret.data() + 1, 98);
  CHECK(secret.front() == 9);
  CHECK(secret.back() == 9);
  CHECK(std::count(secret.begin(), secret.end(), 0) == 98);
  wipe(nullptr, 0);
}

TEST_CASE("a secret key holds its bytes, moves, and can be empty") {
  Bytes raw(32);
  for (std::size_t i = 0; i < raw.size(); ++i) raw[i] = static_cast<std::uint8_t>(i);
  auto made = SecretKey::copy_of(std::span<const std::uint8_t, 32>(raw));
  REQUIRE(made);
  SecretKey key = std::move(*made);
  CHECK(std::equal(raw.begin(), raw.end(), key.bytes().begin()));
  SecretKey moved = std::move(key);
  SecretKey other;
  CHECK(other.empty());
  other = std::move(moved);
  CHECK_FALSE(other.empty());
  CHECK(std::equal(raw.begin(), raw.end(), other.bytes().begin()));
}
