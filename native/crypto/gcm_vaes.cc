// AES-256-GCM for CPUs with VAES, VPCLMULQDQ and AVX2 but without (fast) AVX-512.
//
// Room crypto/, one row of aead_backends.h; it knows nothing of the others. NIST SP 800-38D with
// 96-bit nonces. Sixteen blocks travel together in eight 256-bit registers: their fourteen AES
// rounds are interleaved with the GHASH of sixteen other blocks (when sealing, the sixteen before
// them; when opening, the same ones), so that the AES and the carry-less multiply units of the CPU
// work at once. No table look-up and no branch depends on a key or on data. The arithmetic of GHASH
// is explained in gcm_x86.h.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "crypto/aead_backends.h"
#include "crypto/gcm_x86.h"
#include "crypto/kdf.h"

#define PQBLK_VAES __attribute__((target("vaes,vpclmulqdq,avx2,aes,pclmul,ssse3,sse4.1")))
#define PQBLK_VAES_INLINE PQBLK_VAES __attribute__((always_inline)) inline

namespace pqblk::crypto {
namespace {

using namespace gcm;

constexpr std::size_t kPair = 2 * kBlock;         // one 256-bit register
constexpr std::size_t kPairs = 8;                 // registers in flight
constexpr std::size_t kChunk = kPairs * kPair;    // 256 bytes
constexpr std::size_t kPowers = kChunk / kBlock;  // H^16 ... H^1

struct alignas(kAeadStateAlign) VaesState {
  std::uint8_t round[kRounds + 1][kPair];  // each round key twice, once for each lane
  std::uint8_t power[kPowers][kBlock];     // H^16 * x first, H^1 * x last: in the order of blocks
  // High xor low half of each power, for Karatsuba: lanes as in `power`, pairs 2j and 2j + 1 in the
  // low and the high quadword of register j.
  std::uint8_t folded[kPairs / 2][kPair];

  PQBLK_AESNI_INLINE void set_round(int r, __m128i value) {
    store_block(round[r], value);
    store_block(round[r] + kBlock, value);
  }
};
static_assert(sizeof(VaesState) <= kAeadStateBytes);

PQBLK_VAES_INLINE __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
PQBLK_VAES_INLINE void store(void* p, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
PQBLK_VAES_INLINE __m256i reverse_blocks(__m256i v) {
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(byte_reversal()));
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

// Folds the lowest quadword away: lo is spent, mid takes it up.
PQBLK_VAES_INLINE __m256i fold_into(__m256i upper, __m256i lower) {
  const __m256i carried = _mm256_clmulepi64_epi128(lower, _mm256_set1_epi64x(kReduction), 0x00);
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

PQBLK_VAES_INLINE __m128i finish_tag(const VaesState& key, __m256i hash, __m128i mask,
                                     const AeadMessage& m) {
  const __m256i bits = _mm256_zextsi128_si256(size_block(m.aad.size(), m.size));
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

// Round keys and powers of H are no business of whoever dumps this thread later.
PQBLK_VAES_INLINE void wipe_registers() { _mm256_zeroall(); }

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
  wipe_registers();
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
  const bool holds = _mm_testz_si128(difference, difference) != 0;
  wipe_registers();
  return holds;
}

// ---- Keys --------------------------------------------------------------------------------------

PQBLK_VAES_INLINE __m256i folded_halves(__m256i v) {
  return _mm256_xor_si256(v, _mm256_shuffle_epi32(v, 0x4E));
}

PQBLK_VAES_INLINE void fold_powers(VaesState& key) {
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
  fold_powers(key);
  wipe_registers();
  return true;
}

void release(void*) {}

}  // namespace

constinit const AeadBackend kGcmVaes = {
    Suite::aes_256_gcm, "vaes-avx2", cpu_has_vaes, expand, release, seal, open,
};

}  // namespace pqblk::crypto

#endif  // __x86_64__
