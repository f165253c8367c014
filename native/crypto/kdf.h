// HMAC-SHA3-256, HKDF-SHA3-256, random bytes, constant-time comparison, secret memory.
//
// Room crypto/. The TypeScript key layer computes the same functions with another library; the
// two must agree byte for byte (tests).
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "base/error.h"

namespace pqblk::crypto {

using Digest = std::array<std::uint8_t, 32>;

Digest sha3_256(std::span<const std::uint8_t> message);  // FIPS 202

Digest hmac_sha3_256(std::span<const std::uint8_t> key, std::span<const std::uint8_t> message);

// RFC 5869 with HMAC-SHA3-256; out.size() <= 255 * 32.
void hkdf_sha3_256(std::span<const std::uint8_t> secret, std::span<const std::uint8_t> salt,
                   std::span<const std::uint8_t> info, std::span<std::uint8_t> out);

// getrandom(2); Kind::no_random when the kernel cannot answer.
Error random_bytes(std::span<std::uint8_t> out);

bool equal_ct(std::span<const std::uint8_t> a, std::span<const std::uint8_t> b);
void wipe(void* data, std::size_t size);  // not optimised away

// 32 secret bytes in memory that is locked where the limit allows, MADV_DONTDUMP and
// MADV_WIPEONFORK, and wiped on destruction. Move-only.
class SecretKey {
 public:
  static Result<SecretKey> copy_of(std::span<const std::uint8_t, 32> bytes);
  SecretKey() = default;
  SecretKey(SecretKey&& other) noexcept;
  SecretKey& operator=(SecretKey&& other) noexcept;
  ~SecretKey();
  std::span<const std::uint8_t, 32> bytes() const;  // precondition: not empty
  bool empty() const { return data_ == nullptr; }

 private:
  std::uint8_t* data_ = nullptr;
};

}  // namespace pqblk::crypto
