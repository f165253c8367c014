// The oracle of the AEAD tests: OpenSSL's one-context-per-message EVP, written apart from room
// crypto/, and a check that holds any implementation to it for one shape of message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "crypto/aead.h"
#include "crypto/aead_backends.h"

namespace pqblk::test {

using Bytes = std::vector<std::uint8_t>;

struct Sealed {
  Bytes ciphertext;
  crypto::Tag tag;
};

Sealed oracle_seal(crypto::Suite suite, const Bytes& key, const crypto::Nonce& nonce,
                   const Bytes& aad, const Bytes& message);

// Bytes at a chosen misalignment, with guards: the block begins `lead` bytes into its allocation,
// and ends either with it (an over-read is the sanitizer's to see) or `slack` bytes before.
class Placed {
 public:
  Placed(std::size_t size, std::size_t lead, std::size_t slack);
  Placed(const Bytes& content, std::size_t lead, std::size_t slack);
  std::uint8_t* data() { return memory_.data() + lead_; }
  Bytes bytes() const;
  bool guards_hold() const;

 private:
  std::size_t size_, lead_, slack_;
  Bytes memory_;
};

Bytes random_content(std::mt19937_64& random, std::size_t size);
crypto::Nonce random_nonce(std::mt19937_64& random);

struct Shape {
  std::size_t size;
  std::size_t aad_size;
  std::size_t lead_in, lead_out;  // misalignment
};

// Seals and opens a random message of this shape, disjoint and in place, and opens it with a wrong
// tag. Returns what differs from the oracle, or nothing.
std::string first_difference(const crypto::AeadBackend& backend, const Shape& shape,
                             std::mt19937_64& random);

}  // namespace pqblk::test
