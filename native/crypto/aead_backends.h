// The implementations behind AeadKey, one row each. Internal to room crypto/ and its tests; the
// rest of the engine uses aead.h, where the best available row is chosen once per process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "crypto/aead.h"

namespace pqblk::crypto {

// Where an expanded key lives: one slot of secret memory (secret_memory.h).
inline constexpr std::size_t kAeadStateBytes = 1536;
inline constexpr std::size_t kAeadStateAlign = 64;

// One message. `out` equals `in` or is disjoint from it.
struct AeadMessage {
  const Nonce& nonce;
  std::span<const std::uint8_t> aad;
  const std::uint8_t* in;
  std::uint8_t* out;
  std::size_t size;
};

struct AeadBackend {
  Suite suite;
  std::string_view name;
  bool (*available)();  // by what the CPU and the libraries of this process have
  // Expands a key into kAeadStateBytes of zeroed memory aligned to kAeadStateAlign.
  bool (*expand)(void* state, const std::uint8_t* key);
  void (*release)(void* state);  // frees what `expand` took elsewhere; the caller wipes the state
  // Any number of threads may be in these at once with one state.
  void (*seal)(const void* state, const AeadMessage& message, Tag& tag);
  // False when the tag does not hold; `out` then holds anything and the caller zeroes it.
  bool (*open)(const void* state, const AeadMessage& message, const Tag& tag);
};

extern const AeadBackend kGcmAvx512;         // our kernel, gcm_avx512.cc; on x86-64 alone
extern const AeadBackend kGcmIpsecMbAvx512;  // the rows of ipsec-mb are absent off x86-64
extern const AeadBackend kGcmVaes;           // our kernel, gcm_vaes.cc; on x86-64 alone
extern const AeadBackend kGcmIpsecMb;
extern const AeadBackend kGcmLibcrypto;  // OpenSSL, everywhere
extern const AeadBackend kChachaIpsecMbAvx512;
extern const AeadBackend kChachaLibcrypto;
extern const AeadBackend kChachaIpsecMb;

// Every row of this build, available or not, the preferred one of each suite first.
std::span<const AeadBackend* const> aead_backends();

}  // namespace pqblk::crypto
