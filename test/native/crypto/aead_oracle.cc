#include "crypto/aead_oracle.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>

namespace pqblk::test {
namespace {

constexpr std::uint8_t kGuard = 0xA5;

void must(bool done) {
  if (!done) std::abort();
}

}  // namespace

Sealed oracle_seal(crypto::Suite suite, const Bytes& key, const crypto::Nonce& nonce,
                   const Bytes& aad, const Bytes& message) {
  const std::unique_ptr<EVP_CIPHER_CTX, decltype(&EVP_CIPHER_CTX_free)> context(
      EVP_CIPHER_CTX_new(), &EVP_CIPHER_CTX_free);
  const EVP_CIPHER* cipher =
      suite == crypto::Suite::aes_256_gcm ? EVP_aes_256_gcm() : EVP_chacha20_poly1305();
  must(EVP_EncryptInit_ex(context.get(), cipher, nullptr, key.data(), nonce.data()) == 1);
  Sealed sealed{Bytes(message.size()), {}};
  int written = 0;
  if (!aad.empty()) {
    must(EVP_EncryptUpdate(context.get(), nullptr, &written, aad.data(),
                           static_cast<int>(aad.size())) == 1);
  }
  if (!message.empty()) {
    must(EVP_EncryptUpdate(context.get(), sealed.ciphertext.data(), &written, message.data(),
                           static_cast<int>(message.size())) == 1);
  }
  std::uint8_t none[16];
  must(EVP_EncryptFinal_ex(context.get(), none, &written) == 1);
  must(EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_AEAD_GET_TAG, 16, sealed.tag.data()) == 1);
  return sealed;
}

Placed::Placed(std::size_t size, std::size_t lead, std::size_t slack)
    : size_(size), lead_(lead), slack_(slack), memory_(lead + size + slack, kGuard) {}

Placed::Placed(const Bytes& content, std::size_t lead, std::size_t slack)
    : Placed(content.size(), lead, slack) {
  std::copy(content.begin(), content.end(), memory_.begin() + static_cast<std::ptrdiff_t>(lead));
}

Bytes Placed::bytes() const {
  const auto begin = memory_.begin() + static_cast<std::ptrdiff_t>(lead_);
  return Bytes(begin, begin + static_cast<std::ptrdiff_t>(size_));
}

bool Placed::guards_hold() const {
  const auto is_guard = [](std::uint8_t byte) { return byte == kGuard; };
  return std::all_of(memory_.begin(), memory_.begin() + static_cast<std::ptrdiff_t>(lead_),
                     is_guard) &&
         std::all_of(memory_.end() - static_cast<std::ptrdiff_t>(slack_), memory_.end(), is_guard);
}

Bytes random_content(std::mt19937_64& random, std::size_t size) {
  Bytes content(size);
  for (std::size_t i = 0; i < size; i += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(content.data() + i, &word, std::min(sizeof word, size - i));
  }
  return content;
}

crypto::Nonce random_nonce(std::mt19937_64& random) {
  crypto::Nonce nonce{};
  const Bytes bytes = random_content(random, nonce.size());
  std::copy(bytes.begin(), bytes.end(), nonce.begin());
  return nonce;
}

std::string first_difference(const crypto::AeadBackend& backend, const Shape& shape,
                             std::mt19937_64& random) {
  const Bytes raw_key = random_content(random, crypto::kKeyBytes);
  const crypto::Nonce nonce = random_nonce(random);
  const Bytes aad = random_content(random, shape.aad_size);
  const Bytes message = random_content(random, shape.size);
  const Sealed expected = oracle_seal(backend.suite, raw_key, nonce, aad, message);
  auto key = crypto::AeadKey::create_with(
      backend, std::span<const std::uint8_t, crypto::kKeyBytes>(raw_key));
  if (!key) return "create_with: " + key.error().to_string();

  const std::size_t slack = random() % 2 * 64;
  Placed in(message, shape.lead_in, slack);
  Placed out(shape.size, shape.lead_out, slack);
  crypto::Tag tag{};
  key->seal(nonce, aad, in.data(), out.data(), shape.size, tag);
  if (out.bytes() != expected.ciphertext) return "seal: ciphertext";
  if (tag != expected.tag) return "seal: tag";
  if (in.bytes() != message) return "seal: wrote into its input";

  Placed same(message, shape.lead_out, slack);
  key->seal(nonce, aad, same.data(), same.data(), shape.size, tag);
  if (same.bytes() != expected.ciphertext || tag != expected.tag) return "seal in place";

  Placed back(shape.size, shape.lead_in, slack);
  if (!key->open(nonce, aad, out.data(), back.data(), shape.size, tag)) return "open: refused";
  if (back.bytes() != message) return "open: plaintext";
  if (!key->open(nonce, aad, same.data(), same.data(), shape.size, tag)) {
    return "open in place: refused";
  }
  if (same.bytes() != message) return "open in place: plaintext";

  crypto::Tag wrong = tag;
  wrong[random() % wrong.size()] ^= static_cast<std::uint8_t>(1u << random() % 8);
  if (key->open(nonce, aad, out.data(), back.data(), shape.size, wrong)) {
    return "open: took a wrong tag";
  }
  if (back.bytes() != Bytes(shape.size, 0)) return "open: left output after a wrong tag";
  if (!in.guards_hold() || !out.guards_hold() || !same.guards_hold() || !back.guards_hold()) {
    return "wrote outside its output";
  }
  return {};
}

}  // namespace pqblk::test
