// What the AES-256-GCM kernels of gcm_vaes.cc and gcm_avx512.cc share: single blocks of 128 bits,
// and the expansion of a key. Internal to these two files.
//
// GHASH arithmetic. SP 800-38D numbers bits from the most significant bit of the first byte. A
// block with its bytes reversed is that polynomial with its bits reflected, and a carry-less
// product of two reflected 128-bit values is the reflected product shifted right by one. That shift
// is paid once: the stored powers are H^n * x. Products of many blocks with as many powers are
// summed before one reduction.
//
// A kernel's key is a type with round[kRounds + 1], the round keys, each in the first 16 bytes of
// its element; power[n], the powers of H with H^1 * x last; and set_round(round, value).
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "crypto/aead.h"

// Lambdas and templates do not inherit a target, so each function of a kernel says its own.
#define PQBLK_AESNI __attribute__((target("avx2,aes,pclmul,ssse3,sse4.1")))
#define PQBLK_AESNI_INLINE PQBLK_AESNI __attribute__((always_inline)) inline

namespace pqblk::crypto::gcm {

inline constexpr std::size_t kBlock = 16;
inline constexpr int kRounds = 14;
// x^128 + x^127 + x^126 + x^121 + 1 reflected: what a quadword that is folded away adds above it.
inline constexpr long long kReduction = static_cast<long long>(0xC200000000000000u);

PQBLK_AESNI_INLINE __m128i load_block(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
PQBLK_AESNI_INLINE void store_block(void* p, __m128i v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), v);
}
PQBLK_AESNI_INLINE __m128i byte_reversal() {
  return _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
PQBLK_AESNI_INLINE __m128i reverse_block(__m128i v) { return _mm_shuffle_epi8(v, byte_reversal()); }

PQBLK_AESNI_INLINE __m128i load_nonce(const Nonce& nonce, std::uint32_t counter) {
  std::uint64_t first;
  std::uint32_t last;
  std::memcpy(&first, nonce.data(), sizeof first);
  std::memcpy(&last, nonce.data() + sizeof first, sizeof last);
  const std::uint64_t second = std::uint64_t{__builtin_bswap32(counter)} << 32 | last;
  return _mm_set_epi64x(static_cast<long long>(second), static_cast<long long>(first));
}

template <typename Key>
PQBLK_AESNI_INLINE __m128i encrypt_block(const Key& key, __m128i block) {
  block = _mm_xor_si128(block, load_block(key.round[0]));
#pragma GCC unroll 16
  for (int r = 1; r < kRounds; ++r) block = _mm_aesenc_si128(block, load_block(key.round[r]));
  return _mm_aesenclast_si128(block, load_block(key.round[kRounds]));
}

// E(K, nonce || 1), which hides the hash in the tag.
template <typename Key>
PQBLK_AESNI_INLINE __m128i tag_mask(const Key& key, const Nonce& nonce) {
  return encrypt_block(key, load_nonce(nonce, 1));
}

// The last block of every hash: the sizes in bits, reversed as the others are.
PQBLK_AESNI_INLINE __m128i size_block(std::size_t aad_size, std::size_t size) {
  return _mm_set_epi64x(static_cast<long long>(aad_size * 8), static_cast<long long>(size * 8));
}

// ---- Keys --------------------------------------------------------------------------------------

// FIPS 197 section 5.2, four words at a time: a running sum of the words eight back, plus the last
// word of the round key before, changed (by RotWord, SubWord and Rcon, or by SubWord alone), which
// stands in every word of `changed`.
PQBLK_AESNI_INLINE __m128i next_round_key(__m128i two_back, __m128i changed) {
  two_back = _mm_xor_si128(two_back, _mm_slli_si128(two_back, 4));
  two_back = _mm_xor_si128(two_back, _mm_slli_si128(two_back, 8));
  return _mm_xor_si128(two_back, changed);
}

template <int kRcon, typename Key>
PQBLK_AESNI_INLINE void next_round_keys(Key& key, int round, __m128i& even, __m128i& odd) {
  const __m128i rotated = _mm_aeskeygenassist_si128(odd, kRcon);
  even = next_round_key(even, _mm_shuffle_epi32(rotated, 0xFF));
  key.set_round(round, even);
  if (round == kRounds) return;
  const __m128i substituted = _mm_aeskeygenassist_si128(even, 0);
  odd = next_round_key(odd, _mm_shuffle_epi32(substituted, 0xAA));
  key.set_round(round + 1, odd);
}

template <typename Key>
PQBLK_AESNI_INLINE void expand_round_keys(Key& key, const std::uint8_t* bytes) {
  __m128i even = load_block(bytes);
  __m128i odd = load_block(bytes + kBlock);
  key.set_round(0, even);
  key.set_round(1, odd);
  next_round_keys<0x01>(key, 2, even, odd);
  next_round_keys<0x02>(key, 4, even, odd);
  next_round_keys<0x04>(key, 6, even, odd);
  next_round_keys<0x08>(key, 8, even, odd);
  next_round_keys<0x10>(key, 10, even, odd);
  next_round_keys<0x20>(key, 12, even, odd);
  next_round_keys<0x40>(key, 14, even, odd);
}

// v * x in the reflected representation: a shift left, and the polynomial where a bit falls out.
PQBLK_AESNI_INLINE __m128i times_x(__m128i v) {
  const __m128i carries = _mm_srli_epi64(v, 63);
  const __m128i shifted = _mm_or_si128(_mm_slli_epi64(v, 1), _mm_slli_si128(carries, 8));
  const __m128i top = _mm_shuffle_epi32(_mm_srai_epi32(v, 31), 0xFF);
  return _mm_xor_si128(shifted, _mm_and_si128(top, _mm_set_epi64x(kReduction, 1)));
}

// Folds the lowest quadword away: `lower` is spent, `upper` takes it up.
PQBLK_AESNI_INLINE __m128i fold_block(__m128i upper, __m128i lower) {
  const __m128i carried = _mm_clmulepi64_si128(lower, _mm_set1_epi64x(kReduction), 0x00);
  return _mm_xor_si128(upper, _mm_xor_si128(carried, _mm_shuffle_epi32(lower, 0x4E)));
}

// a * b / x, so that a power that carries an x keeps one.
PQBLK_AESNI_INLINE __m128i multiply(__m128i a, __m128i b) {
  const __m128i lo = _mm_clmulepi64_si128(a, b, 0x00);
  const __m128i mid =
      _mm_xor_si128(_mm_clmulepi64_si128(a, b, 0x01), _mm_clmulepi64_si128(a, b, 0x10));
  return fold_block(_mm_clmulepi64_si128(a, b, 0x11), fold_block(mid, lo));
}

// After expand_round_keys.
template <typename Key>
PQBLK_AESNI_INLINE void expand_powers(Key& key) {
  const __m128i h = times_x(reverse_block(encrypt_block(key, _mm_setzero_si128())));
  __m128i power = h;
  for (std::size_t n = sizeof key.power / kBlock; n-- > 0;) {
    store_block(key.power[n], power);
    power = multiply(power, h);
  }
}

// ---- CPUs --------------------------------------------------------------------------------------

// The compilers' checks for AVX2 and AVX-512 cover the operating system's part: that it saves the
// registers. Not all of them know the names of the two newer features.
inline bool cpu_has_vaes() {
  constexpr unsigned kVaes = 1u << 9;  // CPUID leaf 7, ecx
  constexpr unsigned kVpclmulqdq = 1u << 10;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (ecx & kVaes) != 0 && (ecx & kVpclmulqdq) != 0 && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
}

}  // namespace pqblk::crypto::gcm

#endif  // __x86_64__
