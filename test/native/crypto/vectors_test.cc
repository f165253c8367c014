// Wycheproof's vectors: AES-256-GCM and ChaCha20-Poly1305 on each implementation, HMAC-SHA3-256.
#include "crypto/vectors.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <span>
#include <string>

#include "crypto/aead.h"
#include "crypto/aead_backends.h"
#include "crypto/kdf.h"

using namespace pqblk::crypto;
using nlohmann::json;
using pqblk::test::Bytes;
using pqblk::test::from_hex;
using pqblk::test::load_vectors;

namespace {

Bytes field(const json& test, const char* name) {
  return from_hex(test.at(name).get<std::string>());
}

bool is_valid(const json& test) { return test.at("result").get<std::string>() == "valid"; }

void check_aead(const AeadBackend& backend, const json& test) {
  const Bytes raw = field(test, "key");
  const Bytes aad = field(test, "aad");
  const Bytes message = field(test, "msg");
  const Bytes ciphertext = field(test, "ct");
  const Bytes iv = field(test, "iv");
  const Bytes expected = field(test, "tag");
  Nonce nonce{};
  std::copy(iv.begin(), iv.end(), nonce.begin());
  Tag tag{};
  std::copy(expected.begin(), expected.end(), tag.begin());
  auto key = AeadKey::create_with(backend, std::span<const std::uint8_t, kKeyBytes>(raw));
  REQUIRE(key);

  const bool valid = is_valid(test);
  Bytes out(ciphertext.size(), 0xAA);
  CHECK(key->open(nonce, aad, ciphertext.data(), out.data(), out.size(), tag) == valid);
  CHECK(out == (valid ? message : Bytes(out.size(), 0)));
  Tag computed;
  key->seal(nonce, aad, message.data(), out.data(), out.size(), computed);
  CHECK((out == ciphertext && computed == tag) == valid);
}

// The groups with our sizes; the others (shorter keys, other nonces) are not what the product does.
void run_aead(const char* file, Suite suite, int tests_min) {
  const auto vectors = load_vectors(file);
  if (!vectors) return;
  int tests = 0;
  for (const json& group : vectors->at("testGroups")) {
    if (group.at("keySize") != 256 || group.at("ivSize") != 96 || group.at("tagSize") != 128) {
      continue;
    }
    for (const json& test : group.at("tests")) {
      for (const AeadBackend* backend : aead_backends()) {
        if (backend->suite != suite || !backend->available()) continue;
        CAPTURE(test.at("tcId").get<int>());
        CAPTURE(backend->name);
        check_aead(*backend, test);
        ++tests;
      }
    }
  }
  CHECK(tests >= tests_min);
}

}  // namespace

TEST_CASE("Wycheproof AES-256-GCM") { run_aead("aes_gcm_test.json", Suite::aes_256_gcm, 66); }

TEST_CASE("Wycheproof ChaCha20-Poly1305") {
  run_aead("chacha20_poly1305_test.json", Suite::chacha20_poly1305, 316);
}

TEST_CASE("Wycheproof HMAC-SHA3-256") {
  const auto vectors = load_vectors("hmac_sha3_256_test.json");
  if (!vectors) return;
  int tests = 0;
  for (const json& group : vectors->at("testGroups")) {
    for (const json& test : group.at("tests")) {
      CAPTURE(test.at("tcId").get<int>());
      const Digest digest = hmac_sha3_256(field(test, "key"), field(test, "msg"));
      const Bytes tag = field(test, "tag");  // may be cut short
      REQUIRE(tag.size() <= digest.size());
      const bool same = std::equal(tag.begin(), tag.end(), digest.begin());
      CHECK(same == is_valid(test));
      ++tests;
    }
  }
  CHECK(tests == vectors->at("numberOfTests").get<int>());
}
