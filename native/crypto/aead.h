// Authenticated encryption of sectors and authentication of log blocks.
//
// Room crypto/: bytes in, bytes out. It knows keys and ciphers; it knows nothing of images, files
// or requests. Which implementation runs (a VAES kernel, intel-ipsec-mb, libcrypto) is chosen once
// per process by what the CPU has, and is named by `aead_implementation()`.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/error.h"

namespace pqblk::crypto {

inline constexpr std::size_t kKeyBytes = 32;
inline constexpr std::size_t kNonceBytes = 12;
inline constexpr std::size_t kTagBytes = 16;

enum class Suite : std::uint8_t { aes_256_gcm = 1, chacha20_poly1305 = 2 };  // docs/format.md

std::string_view suite_name(Suite suite);  // "AES-256-GCM", "ChaCha20-Poly1305"

using Nonce = std::array<std::uint8_t, kNonceBytes>;
using Tag = std::array<std::uint8_t, kTagBytes>;

struct AeadBackend;

// An expanded key. Its memory is locked, excluded from core dumps, wiped on fork and on
// destruction. Immutable after creation; any number of threads may use one at once.
class AeadKey {
 public:
  static Result<AeadKey> create(Suite suite, std::span<const std::uint8_t, kKeyBytes> key);
  // With one implementation (aead_backends.h) instead of the chosen one: for tests and benches.
  static Result<AeadKey> create_with(const AeadBackend& backend,
                                     std::span<const std::uint8_t, kKeyBytes> key);
  AeadKey(AeadKey&&) noexcept;
  AeadKey& operator=(AeadKey&&) noexcept;
  ~AeadKey();

  // One message. `out` may equal `in` or be disjoint; sizes are equal, any size >= 0.
  void seal(const Nonce& nonce, std::span<const std::uint8_t> aad, const std::uint8_t* in,
            std::uint8_t* out, std::size_t size, Tag& tag) const;
  // Returns false, and zeroes `out`, when the tag does not hold (constant-time comparison).
  [[nodiscard]] bool open(const Nonce& nonce, std::span<const std::uint8_t> aad,
                          const std::uint8_t* in, std::uint8_t* out, std::size_t size,
                          const Tag& tag) const;

  struct State;  // implementation-defined, cache-line aligned
 private:
  explicit AeadKey(State* state) : state_(state) {}
  State* state_ = nullptr;
};

// So many expanded keys live in this process that no more should be kept than must be: what is left
// is for keys of brief use, and for those that something is written under. Any thread.
bool aead_keys_scarce();

std::string_view aead_implementation(
    Suite suite);  // e.g. "vaes-avx2", "ipsec-mb avx512", "libcrypto"

}  // namespace pqblk::crypto
