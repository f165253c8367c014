// AES-256-GCM for CPUs with VAES, VPCLMULQDQ and AVX2 but without (fast) AVX-512.
//
// Room crypto/, one row of aead_backends.h; it knows nothing of the others. NIST SP 800-38D with
// 96-bit nonces. Sixteen blocks travel together in eight 256-bit registers: their fourteen AES
// rounds are interleaved with the GHASH of sixteen other blocks (when sealing, the sixteen before
// them; when opening, the same ones), so that the AES and the carry-less multiply units of the CPU
// work at once. No table look-up and no branch depends on a key or on data.
//
// GHASH arithmetic. SP 800-38D numbers bits from the most significant bit of the first byte. A
// block with its bytes reversed is that polynomial with its bits reflected, and a carry-less
// product of two reflected 128-bit values is the reflected product shifted right by one. That shift
// is paid once: the stored powers are H^n * x. Products of sixteen blocks with sixteen powers are
// summed before one reduction.
#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

#include <cstring>

#include "crypto/aead_backends.h"
#include "crypto/kdf.h"

// Lambdas and templates do not inherit a target, so each function here says it.
#define PQBLK_VAES __attribute__((target("vaes,vpclmulqdq,avx2,aes,pclmul,ssse3,sse4.1")))
#define PQBLK_VAES_INLINE PQBLK_VAES __attribute__((always_inline)) inline

namespace pqblk::crypto {
namespace {

constexpr std::size_t kBlock = 16;
constexpr std::size_t kPair = 2 * kBlock;         // one 256-bit register
constexpr std::size_t kPairs = 8;                 // registers in flight
constexpr std::size_t kChunk = kPairs * kPair;    // 256 bytes
constexpr std::size_t kPowers = kChunk / kBlock;  // H^16 ... H^1
constexpr int kRounds = 14;

struct alignas(kAeadStateAlign) VaesState {
  std::uint8_t round[kRounds + 1][kPair];  // each round key twice, once for each lane
  std::uint8_t power[kPowers][kBlock];     // H^16 * x first, H^1 * x last: in the order of blocks
  // High xor low half of each power, for Karatsuba: lanes as in `power`, pairs 2j and 2j + 1 in the
  // low and the high quadword of register j.
  std::uint8_t folded[kPairs / 2][kPair];
};
static_assert(sizeof(VaesState) <= kAeadStateBytes);

PQBLK_VAES_INLINE __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
PQBLK_VAES_INLINE void store(void* p, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
PQBLK_VAES_INLINE __m128i load_block(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
PQBLK_VAES_INLINE void store_block(void* p, __m128i v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), v);
}

PQBLK_VAES_INLINE __m128i reverse_block(__m128i v) {
  return _mm_shuffle_epi8(v, _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
PQBLK_VAES_INLINE __m256i reverse_blocks(__m256i v) {
  return _mm256_shuffle_epi8(
      v, _mm256_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,  //
                         0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

// Two things gcc must be kept from, together worth a third of the speed. It turns a chain of sums
// into a tree, whose many leaves then spill out of the sixteen registers; and it lifts loads of key
// material out of loops into stack slots, where they would also outlive the call.
PQBLK_VAES_INLINE void add_in_order(__m256i& sum, __m256i v) {
  sum = _mm256_xor_si256(sum, v);
  asm("" : "+x"(sum));
}
PQBLK_VAES_INLINE const VaesState& load_anew(const VaesState& key) {
  const VaesState* pointer = &key;
  asm("" : "+r"(pointer) : : "memory");
  return *pointer;
}

// ---- GHASH -------------------------------------------------------------------------------------

// An unreduced sum of products: lo + mid * x^64 + hi * x^128, in each lane.
struct Products {
  __m256i lo, mid, hi;
};

// x^128 + x^127 + x^126 + x^121 + 1 reflected: what a quadword that is folded away adds above it.
PQBLK_VAES_INLINE __m256i reduction_poly() {
  return _mm256_set1_epi64x(static_cast<long long>(0xC200000000000000u));
}

// Folds the lowest quadword away: lo is spent, mid takes it up.
PQBLK_VAES_INLINE __m256i fold_into(__m256i upper, __m256i lower) {
  const __m256i carried = _mm256_clmulepi64_epi128(lower, reduction_poly(), 0x00);
  return _mm256_xor_si256(upper, _mm256_xor_si256(carried, _mm256_shuffle_epi32(lower, 0x4E)));
}

// The lanes of `v` added up, in the low lane; the high lane is zero.
PQBLK_VAES_INLINE __m256i sum_of_lanes(__m256i v) {
  const __m128i sum = _mm_xor_si128(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm256_zextsi128_si256(sum);
}

PQBLK_VAES_INLINE __m256i reduce(const Products& p) {
  return sum_of_lanes(fold_into(p.hi, fold_into(p.mid, p.lo)));
}

// Schoolbook: four multiplications, and `powers` need no folded halves. For the odd ends.
PQBLK_VAES_INLINE void add_products(Products& sum, __m256i blocks, __m256i powers) {
  sum.lo = _mm256_xor_si256(sum.lo, _mm256_clmulepi64_epi128(blocks, powers, 0x00));
  sum.mid = _mm256_xor_si256(sum.mid, _mm256_clmulepi64_epi128(blocks, powers, 0x01));
  sum.mid = _mm256_xor_si256(sum.mid, _mm256_clmulepi64_epi128(blocks, powers, 0x10));
  sum.hi = _mm256_xor_si256(sum.hi, _mm256_clmulepi64_epi128(blocks, powers, 0x11));
}

// Karatsuba: pairs 2j and 2j + 1 of a chunk, whose folded halves share a register. `mid` still
// lacks lo + hi; see karatsuba_mid().
PQBLK_VAES_INLINE void add_two_pairs(Products& sum, const VaesState& key, std::size_t j,
                                     __m256i even, __m256i odd) {
  const __m256i even_powers = load(key.power[4 * j]);
  const __m256i odd_powers = load(key.power[4 * j + 2]);
  const __m256i halves = load(key.folded[j]);
  const __m256i folded =
      _mm256_xor_si256(_mm256_unpacklo_epi64(even, odd), _mm256_unpackhi_epi64(even, odd));
  add_in_order(sum.lo, _mm256_clmulepi64_epi128(even, even_powers, 0x00));
  add_in_order(sum.hi, _mm256_clmulepi64_epi128(even, even_powers, 0x11));
  add_in_order(sum.lo, _mm256_clmulepi64_epi128(odd, odd_powers, 0x00));
  add_in_order(sum.hi, _mm256_clmulepi64_epi128(odd, odd_powers, 0x11));
  add_in_order(sum.mid, _mm256_clmulepi64_epi128(folded, halves, 0x00));
  add_in_order(sum.mid, _mm256_clmulepi64_epi128(folded, halves, 0x11));
}

// The same from memory. The first pair takes up the hash so far, and so comes last of a chunk, to
// keep the hash off the critical path for as long as can be.
PQBLK_VAES_INLINE void hash_two_pairs(Products& sum, const VaesState& key, std::size_t j,
                                      __m256i hash, const std::uint8_t* chunk) {
  __m256i even = reverse_blocks(load(chunk + 2 * j * kPair));
  const __m256i odd = reverse_blocks(load(chunk + (2 * j + 1) * kPair));
  if (j == 0) even = _mm256_xor_si256(even, hash);
  add_two_pairs(sum, key, j, even, odd);
}

PQBLK_VAES_INLINE __m256i karatsuba_mid(const Products& sum) {
  return _mm256_xor_si256(sum.mid, _mm256_xor_si256(sum.lo, sum.hi));
}

PQBLK_VAES_INLINE Products no_products() {
  const __m256i zero = _mm256_setzero_si256();
  return {zero, zero, zero};
}

PQBLK_VAES_INLINE __m256i hash_chunk(const VaesState& state, __m256i hash,
                                     const std::uint8_t* chunk) {
  const VaesState& key = load_anew(state);
  Products sum = no_products();
#pragma GCC unroll 4
  for (std::size_t j = 1; j < kPairs / 2; ++j) hash_two_pairs(sum, key, j, hash, chunk);
  hash_two_pairs(sum, key, 0, hash, chunk);
  sum.mid = karatsuba_mid(sum);
  return reduce(sum);
}

// The 0 < size < 16 bytes at `data`, zero-padded. Where a whole block lies before them this is one
// load and one shuffle; a copy through memory would stall on its own small stores.
PQBLK_VAES_INLINE __m128i load_ragged(const std::uint8_t* data, std::size_t size, bool preceded) {
  alignas(kPair) static constexpr std::int8_t kShift[kPair] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,  //
      -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  if (preceded) {
    return _mm_shuffle_epi8(load_block(data + size - kBlock), load_block(kShift + kBlock - size));
  }
  alignas(kBlock) std::uint8_t padded[kBlock] = {};
  std::memcpy(padded, data, size);
  return load_block(padded);
}

// 0 < size <= 256 bytes, zero-padded to whole blocks.
PQBLK_VAES inline __m256i hash_end(const VaesState& key, __m256i hash, const std::uint8_t* data,
                                   std::size_t size) {
  const std::uint8_t* power = key.power[kPowers - (size + kBlock - 1) / kBlock];
  const bool preceded = size > kBlock;
  Products sum = no_products();
  for (; size >= kPair; data += kPair, size -= kPair, power += kPair) {
    add_products(sum, _mm256_xor_si256(hash, reverse_blocks(load(data))), load(power));
    hash = _mm256_setzero_si256();
  }
  if (size >= kBlock) {
    const __m256i block = _mm256_zextsi128_si256(reverse_block(load_block(data)));
    add_products(sum, _mm256_xor_si256(hash, block), _mm256_zextsi128_si256(load_block(power)));
    hash = _mm256_setzero_si256();
    data += kBlock;
    size -= kBlock;
    power += kBlock;
  }
  if (size > 0) {
    const __m256i block = _mm256_zextsi128_si256(reverse_block(load_ragged(data, size, preceded)));
    add_products(sum, _mm256_xor_si256(hash, block), _mm256_zextsi128_si256(load_block(power)));
  }
  return reduce(sum);
}

PQBLK_VAES inline __m256i hash_bytes(const VaesState& key, __m256i hash, const std::uint8_t* data,
                                     std::size_t size) {
  for (; size >= kChunk; data += kChunk, size -= kChunk) hash = hash_chunk(key, hash, data);
  return size > 0 ? hash_end(key, hash, data, size) : hash;
}

// ---- AES-CTR and both together -----------------------------------------------------------------

PQBLK_VAES_INLINE __m128i load_nonce(const Nonce& nonce, std::uint32_t counter) {
  std::uint64_t first;
  std::uint32_t last;
  std::memcpy(&first, nonce.data(), sizeof first);
  std::memcpy(&last, nonce.data() + sizeof first, sizeof last);
  const std::uint64_t second = std::uint64_t{__builtin_bswap32(counter)} << 32 | last;
  return _mm_set_epi64x(static_cast<long long>(second), static_cast<long long>(first));
}

// The counter of a message's first block is 2 and a chunk is 16 blocks, so every chunk counts from
// 16k + 2 to 16k + 17: an addition into the low four bits that never carries, which is an exclusive
// or with a constant. `base` is the nonce with 16k, in both lanes.
struct Counters {
  __m256i reversed;  // base, bytes reversed: the 32-bit counter is the lowest word of each lane
  __m256i base;
};

PQBLK_VAES_INLINE Counters first_counters(const Nonce& nonce) {
  const __m256i base = _mm256_broadcastsi128_si256(load_nonce(nonce, 0));
  return {reverse_blocks(base), base};
}

PQBLK_VAES_INLINE __m256i
pair_at(int first) {  // the counters `first` and `first` + 1, as bytes lie
  return _mm256_set_epi32((first + 1) << 24, 0, 0, 0, first << 24, 0, 0, 0);
}

// Encrypts or decrypts 256 bytes and advances the counters. With kHash it also adds the 256 bytes
// at `hashed` to the hash; they may be the input itself, for they are read before `out` is written.
template <bool kHash>
PQBLK_VAES_INLINE void crypt_chunk(const VaesState& state, Counters& counters,
                                   const std::uint8_t* in, std::uint8_t* out,
                                   const std::uint8_t* hashed, __m256i& hash) {
  const VaesState& key = load_anew(state);
  __m256i s[kPairs];
  const __m256i whitening = load(key.round[0]);
  const __m256i whitened = _mm256_xor_si256(counters.base, whitening);
#pragma GCC unroll 8
  for (std::size_t i = 0; i + 1 < kPairs; ++i) {
    s[i] = _mm256_xor_si256(whitened, pair_at(static_cast<int>(2 * i + 2)));
  }
  counters.reversed =
      _mm256_add_epi32(counters.reversed, _mm256_set_epi32(0, 0, 0, 16, 0, 0, 0, 16));
  counters.base = reverse_blocks(counters.reversed);
  s[kPairs - 1] = _mm256_xor_si256(_mm256_xor_si256(counters.base, whitening), pair_at(0));

  Products sum = no_products();
#pragma GCC unroll 16
  for (std::size_t r = 1; r < kRounds; ++r) {
    const __m256i round = load(key.round[r]);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kPairs; ++i) s[i] = _mm256_aesenc_epi128(s[i], round);
    if constexpr (kHash) {
      if (r < kPairs && r % 2 == 0) hash_two_pairs(sum, key, r / 2, hash, hashed);
      if (r == kPairs) {
        hash_two_pairs(sum, key, 0, hash, hashed);
        sum.mid = karatsuba_mid(sum);
      }
      if (r == kPairs + 2) sum.mid = fold_into(sum.mid, sum.lo);
      if (r == kPairs + 4) hash = sum_of_lanes(fold_into(sum.hi, sum.mid));
    }
  }
  const __m256i last = load(key.round[kRounds]);
#pragma GCC unroll 8
  for (std::size_t i = 0; i < kPairs; ++i) {
    const __m256i masked = _mm256_xor_si256(last, load(in + i * kPair));
    store(out + i * kPair, _mm256_aesenclast_epi128(s[i], masked));
  }
}

PQBLK_VAES_INLINE __m128i encrypt_block(const VaesState& key, __m128i block) {
  block = _mm_xor_si128(block, load_block(key.round[0]));
#pragma GCC unroll 16
  for (int r = 1; r < kRounds; ++r) block = _mm_aesenc_si128(block, load_block(key.round[r]));
  return _mm_aesenclast_si128(block, load_block(key.round[kRounds]));
}

// E(K, nonce || 1), which hides the hash in the tag.
PQBLK_VAES_INLINE __m128i tag_mask(const VaesState& key, const Nonce& nonce) {
  return encrypt_block(key, load_nonce(nonce, 1));
}

PQBLK_VAES_INLINE __m128i finish_tag(const VaesState& key, __m256i hash, __m128i mask,
                                     const AeadMessage& m) {
  const __m256i bits = _mm256_set_epi64x(0, 0, static_cast<long long>(m.aad.size() * 8),
                                         static_cast<long long>(m.size * 8));
  Products sum = no_products();
  add_products(sum, _mm256_xor_si256(hash, bits),
               _mm256_zextsi128_si256(load_block(key.power[kPowers - 1])));
  return _mm_xor_si128(reverse_block(_mm256_castsi256_si128(reduce(sum))), mask);
}

// The last size % 256 bytes pass through a buffer of ours. `before` is a chunk of ciphertext not
// hashed yet, or null.
PQBLK_VAES inline __m256i seal_end(const VaesState& key, Counters counters, __m256i hash,
                                   const std::uint8_t* in, std::uint8_t* out, std::size_t size,
                                   const std::uint8_t* before) {
  alignas(kPair) std::uint8_t buffer[kChunk];
  std::memcpy(buffer, in, size);
  if (before != nullptr) {
    crypt_chunk<true>(key, counters, buffer, buffer, before, hash);
  } else {
    crypt_chunk<false>(key, counters, buffer, buffer, nullptr, hash);
  }
  std::memcpy(out, buffer, size);
  hash = hash_end(key, hash, buffer, size);
  wipe(buffer, sizeof buffer);  // the rest of it is key stream
  return hash;
}

PQBLK_VAES inline __m256i open_end(const VaesState& key, Counters counters, __m256i hash,
                                   const std::uint8_t* in, std::uint8_t* out, std::size_t size) {
  alignas(kPair) std::uint8_t buffer[kChunk];
  hash = hash_end(key, hash, in, size);
  std::memcpy(buffer, in, size);
  crypt_chunk<false>(key, counters, buffer, buffer, nullptr, hash);
  std::memcpy(out, buffer, size);
  wipe(buffer, sizeof buffer);
  return hash;
}

PQBLK_VAES void seal(const void* state, const AeadMessage& m, Tag& tag) {
  const VaesState& key = *static_cast<const VaesState*>(state);
  const __m128i mask = tag_mask(key, m.nonce);
  __m256i hash = hash_bytes(key, _mm256_setzero_si256(), m.aad.data(), m.aad.size());
  if (m.size > 0) {
    Counters counters = first_counters(m.nonce);
    const std::uint8_t* in = m.in;
    std::uint8_t* out = m.out;
    std::size_t left = m.size;
    if (left >= kChunk) {
      crypt_chunk<false>(key, counters, in, out, nullptr, hash);
      for (left -= kChunk; left >= kChunk; left -= kChunk) {
        in += kChunk;
        out += kChunk;
        crypt_chunk<true>(key, counters, in, out, out - kChunk, hash);
      }
      hash = left > 0 ? seal_end(key, counters, hash, in + kChunk, out + kChunk, left, out)
                      : hash_chunk(key, hash, out);
    } else {
      hash = seal_end(key, counters, hash, in, out, left, nullptr);
    }
  }
  store_block(tag.data(), finish_tag(key, hash, mask, m));
}

PQBLK_VAES bool open(const void* state, const AeadMessage& m, const Tag& tag) {
  const VaesState& key = *static_cast<const VaesState*>(state);
  const __m128i mask = tag_mask(key, m.nonce);
  __m256i hash = hash_bytes(key, _mm256_setzero_si256(), m.aad.data(), m.aad.size());
  Counters counters = first_counters(m.nonce);
  const std::uint8_t* in = m.in;
  std::uint8_t* out = m.out;
  std::size_t left = m.size;
  for (; left >= kChunk; left -= kChunk, in += kChunk, out += kChunk) {
    crypt_chunk<true>(key, counters, in, out, in, hash);
  }
  if (left > 0) hash = open_end(key, counters, hash, in, out, left);
  const __m128i difference = _mm_xor_si128(finish_tag(key, hash, mask, m), load_block(tag.data()));
  return _mm_testz_si128(difference, difference) != 0;
}

// ---- Keys --------------------------------------------------------------------------------------

// FIPS 197 section 5.2, four words at a time: a running sum of the words eight back, plus the last
// word of the round key before, changed (by RotWord, SubWord and Rcon, or by SubWord alone), which
// stands in every word of `changed`.
PQBLK_VAES_INLINE __m128i next_round_key(__m128i two_back, __m128i changed) {
  two_back = _mm_xor_si128(two_back, _mm_slli_si128(two_back, 4));
  two_back = _mm_xor_si128(two_back, _mm_slli_si128(two_back, 8));
  return _mm_xor_si128(two_back, changed);
}

PQBLK_VAES_INLINE void store_round_key(VaesState& key, int round, __m128i value) {
  store(key.round[round], _mm256_broadcastsi128_si256(value));
}

template <int kRcon>
PQBLK_VAES_INLINE void next_round_keys(VaesState& key, int round, __m128i& even, __m128i& odd) {
  const __m128i rotated = _mm_aeskeygenassist_si128(odd, kRcon);
  even = next_round_key(even, _mm_shuffle_epi32(rotated, 0xFF));
  store_round_key(key, round, even);
  if (round == kRounds) return;
  const __m128i substituted = _mm_aeskeygenassist_si128(even, 0);
  odd = next_round_key(odd, _mm_shuffle_epi32(substituted, 0xAA));
  store_round_key(key, round + 1, odd);
}

PQBLK_VAES_INLINE void expand_round_keys(VaesState& key, const std::uint8_t* bytes) {
  __m128i even = load_block(bytes);
  __m128i odd = load_block(bytes + kBlock);
  store_round_key(key, 0, even);
  store_round_key(key, 1, odd);
  next_round_keys<0x01>(key, 2, even, odd);
  next_round_keys<0x02>(key, 4, even, odd);
  next_round_keys<0x04>(key, 6, even, odd);
  next_round_keys<0x08>(key, 8, even, odd);
  next_round_keys<0x10>(key, 10, even, odd);
  next_round_keys<0x20>(key, 12, even, odd);
  next_round_keys<0x40>(key, 14, even, odd);
}

// v * x in the reflected representation: a shift left, and the polynomial where a bit falls out.
PQBLK_VAES_INLINE __m128i times_x(__m128i v) {
  const __m128i carries = _mm_srli_epi64(v, 63);
  const __m128i shifted = _mm_or_si128(_mm_slli_epi64(v, 1), _mm_slli_si128(carries, 8));
  const __m128i top = _mm_shuffle_epi32(_mm_srai_epi32(v, 31), 0xFF);
  const __m128i poly = _mm_set_epi64x(static_cast<long long>(0xC200000000000000u), 1);
  return _mm_xor_si128(shifted, _mm_and_si128(top, poly));
}

PQBLK_VAES_INLINE __m256i folded_halves(__m256i v) {
  return _mm256_xor_si256(v, _mm256_shuffle_epi32(v, 0x4E));
}

PQBLK_VAES_INLINE void expand_powers(VaesState& key) {
  const __m128i h = times_x(reverse_block(encrypt_block(key, _mm_setzero_si128())));
  __m128i power = h;
  for (std::size_t n = kPowers; n-- > 0;) {
    store_block(key.power[n], power);
    Products sum = no_products();
    add_products(sum, _mm256_zextsi128_si256(power), _mm256_zextsi128_si256(h));
    power = _mm256_castsi256_si128(reduce(sum));
  }
  for (std::size_t j = 0; j < kPairs / 2; ++j) {
    const __m256i low = folded_halves(load(key.power[4 * j]));
    const __m256i high = folded_halves(load(key.power[4 * j + 2]));
    store(key.folded[j], _mm256_unpacklo_epi64(low, high));
  }
}

PQBLK_VAES bool expand(void* state, const std::uint8_t* bytes) {
  VaesState& key = *static_cast<VaesState*>(state);
  expand_round_keys(key, bytes);
  expand_powers(key);
  return true;
}

void release(void*) {}

// The compilers' check for AVX2 covers the operating system's part: that it saves the registers.
// Not all of them know the names of the two newer features.
bool available() {
  constexpr unsigned kVaes = 1u << 9;  // CPUID leaf 7, ecx
  constexpr unsigned kVpclmulqdq = 1u << 10;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (ecx & kVaes) != 0 && (ecx & kVpclmulqdq) != 0 && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul");
}

}  // namespace

constinit const AeadBackend kGcmVaes = {
    Suite::aes_256_gcm, "vaes-avx2", available, expand, release, seal, open,
};

}  // namespace pqblk::crypto

#endif  // __x86_64__
