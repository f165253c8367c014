// AES-256-GCM for CPUs with VAES, VPCLMULQDQ and AVX-512 (F, BW, VL, VBMI).
//
// Room crypto/, one row of aead_backends.h; it knows nothing of the others. NIST SP 800-38D with
// 96-bit nonces. 32 blocks travel together in eight 512-bit registers: their AES rounds are
// interleaved with the GHASH of 32 other blocks (when sealing, those before them; when opening, the
// same ones). No table look-up and no branch depends on a key or on data. The arithmetic of GHASH
// is explained in gcm_x86.h.
//
// Such a CPU has one unit for 512-bit AES and another one for 512-bit products and shuffles. AES
// would need its unit 112 times a chunk, far more than all else needs the other. So the first round
// is looked up by counter (struct Counters), products are schoolbook, the load broadcasts round
// keys, and sums take three terms at once.
#if defined(__x86_64__)

// gcc 12 takes its own _mm512_undefined_* for values that were forgotten (gcc bug 105593).
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "crypto/aead_backends.h"
#include "crypto/gcm_x86.h"

#define PQBLK_AVX512     \
  __attribute__((target( \
      "avx512f,avx512bw,avx512vl,avx512vbmi,vaes,vpclmulqdq,avx2,aes,pclmul,ssse3,sse4.1")))
#define PQBLK_AVX512_INLINE PQBLK_AVX512 __attribute__((always_inline)) inline

namespace pqblk::crypto {
namespace {

using namespace gcm;

constexpr std::size_t kQuad = 4 * kBlock;       // one 512-bit register
constexpr std::size_t kQuads = 8;               // registers in flight
constexpr std::size_t kChunk = kQuads * kQuad;  // 512 bytes
constexpr std::size_t kBlocks = kChunk / kBlock;

// Counters in a row that differ in their last byte alone, and those whose columns one load brings.
constexpr std::size_t kWindow = 256;
constexpr std::size_t kGroup = 16;
constexpr std::size_t kGroups = kWindow / kGroup;

struct alignas(kAeadStateAlign) Avx512State {
  std::uint8_t round[kRounds + 1][kBlock];
  // What the first round makes of a counter's last byte, for the values 2 to 255, 0 and 1: see
  // struct Counters. Loads of a group take in what lies behind it.
  std::uint8_t column[kGroups][kGroup * 3];
  // H^33 * x first, H^1 * x last. A chunk takes the last 32; a hash's last chunk all: the block of
  // sizes has H^1, and there is one reduction for both.
  std::uint8_t power[kBlocks + 1][kBlock];

  PQBLK_AESNI_INLINE void set_round(int r, __m128i value) { store_block(round[r], value); }
};
static_assert(sizeof(Avx512State) <= kAeadStateBytes);
static_assert(sizeof(Avx512State::power) >= kQuad, "the last group's load ends in the state");
static_assert(offsetof(Avx512State, power[1]) % kQuad == 0, "a chunk's powers fill cache lines");

PQBLK_AVX512_INLINE __m512i load(const void* p) { return _mm512_loadu_si512(p); }
PQBLK_AVX512_INLINE void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
PQBLK_AVX512_INLINE __m512i in_all_lanes(const void* block) {
  return _mm512_broadcast_i32x4(load_block(block));
}
PQBLK_AVX512_INLINE __m512i reverse_blocks(__m512i v) {
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(byte_reversal()));
}
PQBLK_AVX512_INLINE __m512i xor3(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

// Round keys and powers of H are no business of whoever interrupts or dumps this thread later; the
// upper registers would keep them for as long as nobody else uses AVX-512.
PQBLK_AVX512_INLINE void wipe_registers() {
#define PQBLK_WIPE(n) "vpxorq %%xmm" #n ", %%xmm" #n ", %%xmm" #n "\n\t"
  asm volatile(PQBLK_WIPE(0) PQBLK_WIPE(1) PQBLK_WIPE(2) PQBLK_WIPE(3) PQBLK_WIPE(4) PQBLK_WIPE(5)
                   PQBLK_WIPE(6) PQBLK_WIPE(7) PQBLK_WIPE(8) PQBLK_WIPE(9) PQBLK_WIPE(10)
                       PQBLK_WIPE(11) PQBLK_WIPE(12) PQBLK_WIPE(13) PQBLK_WIPE(14) PQBLK_WIPE(15)
                           PQBLK_WIPE(16) PQBLK_WIPE(17) PQBLK_WIPE(18) PQBLK_WIPE(19)
                               PQBLK_WIPE(20) PQBLK_WIPE(21) PQBLK_WIPE(22) PQBLK_WIPE(23)
                                   PQBLK_WIPE(24) PQBLK_WIPE(25) PQBLK_WIPE(26) PQBLK_WIPE(27)
                                       PQBLK_WIPE(28) PQBLK_WIPE(29) PQBLK_WIPE(30) PQBLK_WIPE(31)
               :
               :
               : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                 "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
                 "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27",
                 "xmm28", "xmm29", "xmm30", "xmm31");
#undef PQBLK_WIPE
}

// gcc lifts loads of key material out of loops into stack slots, where they would cost time and
// outlive the call.
PQBLK_AVX512_INLINE const Avx512State& load_anew(const Avx512State& key) {
  const Avx512State* pointer = &key;
  asm("" : "+r"(pointer) : : "memory");
  return *pointer;
}

// ---- GHASH -------------------------------------------------------------------------------------

// An unreduced sum of products: lo + mid * x^64 + hi * x^128, in each lane.
struct Products {
  __m512i lo, mid, hi;
};

PQBLK_AVX512_INLINE Products no_products() {
  const __m512i zero = _mm512_setzero_si512();
  return {zero, zero, zero};
}

// Adds two terms, and keeps gcc from making a tree of the sums, whose leaves it would spill.
PQBLK_AVX512_INLINE void add_in_order(__m512i& sum, __m512i a, __m512i b) {
  sum = xor3(sum, a, b);
  asm("" : "+v"(sum));
}

PQBLK_AVX512_INLINE void add_products(Products& sum, __m512i blocks, __m512i powers) {
  sum.lo = _mm512_xor_si512(sum.lo, _mm512_clmulepi64_epi128(blocks, powers, 0x00));
  add_in_order(sum.mid, _mm512_clmulepi64_epi128(blocks, powers, 0x01),
               _mm512_clmulepi64_epi128(blocks, powers, 0x10));
  sum.hi = _mm512_xor_si512(sum.hi, _mm512_clmulepi64_epi128(blocks, powers, 0x11));
}

// Folds the lowest quadword of each lane away: `lower` is spent, `upper` takes it up.
PQBLK_AVX512_INLINE __m512i fold_into(__m512i upper, __m512i lower) {
  const __m512i carried = _mm512_clmulepi64_epi128(lower, _mm512_set1_epi64(kReduction), 0x00);
  return xor3(upper, carried, _mm512_shuffle_epi32(lower, _MM_PERM_BADC));
}

PQBLK_AVX512_INLINE __m128i sum_of_lanes(__m512i v) {
  const __m256i pair = _mm256_xor_si256(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  return _mm_xor_si128(_mm256_castsi256_si128(pair), _mm256_extracti128_si256(pair, 1));
}

PQBLK_AVX512_INLINE __m128i reduce(const Products& p) {
  return sum_of_lanes(fold_into(p.hi, fold_into(p.mid, p.lo)));
}

PQBLK_AVX512_INLINE __m512i in_first_lane(__m128i v) { return _mm512_zextsi128_si512(v); }

// Two quads of a chunk on their way through the products, eight steps for a chunk. The first quad
// takes up the hash so far, and so is among the last two, to keep the hash off the critical path
// for as long as can be.
struct TwoQuads {
  __m512i a, a_powers, b, b_powers;
};

PQBLK_AVX512_INLINE void hash_step(Products& sum, TwoQuads& q, std::size_t step, __m128i hash,
                                   const std::uint8_t* chunk, const std::uint8_t* powers) {
  if (step % 2 == 0) {
    const std::size_t at = (step + 2) % kQuads * kQuad;
    q = {reverse_blocks(load(chunk + at)), load(powers + at),
         reverse_blocks(load(chunk + at + kQuad)), load(powers + at + kQuad)};
    if (at == 0) q.a = _mm512_xor_si512(q.a, in_first_lane(hash));
    add_in_order(sum.lo, _mm512_clmulepi64_epi128(q.a, q.a_powers, 0x00),
                 _mm512_clmulepi64_epi128(q.b, q.b_powers, 0x00));
    add_in_order(sum.mid, _mm512_clmulepi64_epi128(q.a, q.a_powers, 0x01),
                 _mm512_clmulepi64_epi128(q.a, q.a_powers, 0x10));
  } else {
    add_in_order(sum.mid, _mm512_clmulepi64_epi128(q.b, q.b_powers, 0x01),
                 _mm512_clmulepi64_epi128(q.b, q.b_powers, 0x10));
    add_in_order(sum.hi, _mm512_clmulepi64_epi128(q.a, q.a_powers, 0x11),
                 _mm512_clmulepi64_epi128(q.b, q.b_powers, 0x11));
  }
}

PQBLK_AVX512_INLINE __m128i hash_chunk(Products sum, const std::uint8_t* powers, __m128i hash,
                                       const std::uint8_t* chunk) {
  TwoQuads quads;
#pragma GCC unroll 8
  for (std::size_t step = 0; step < kQuads; ++step) {
    hash_step(sum, quads, step, hash, chunk, powers);
  }
  return reduce(sum);
}

// The first `size` bytes of a quad, or all of it.
PQBLK_AVX512_INLINE __mmask64 bytes_mask(std::size_t size) {
  return size >= kQuad ? ~__mmask64{0} : (__mmask64{1} << size) - 1;
}

// Adds up to 512 bytes, zero-padded to whole blocks; the last block meets the power before `end`.
PQBLK_AVX512_INLINE void hash_ragged(Products& sum, __m128i hash, const std::uint8_t* data,
                                     std::size_t size, const std::uint8_t* end) {
  const std::uint8_t* power = end - (size + kBlock - 1) / kBlock * kBlock;
  __m512i first = in_first_lane(hash);
#pragma GCC unroll 1
  while (size > 0) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(bytes_mask(size), data);
    const __mmask64 powers = bytes_mask(static_cast<std::size_t>(end - power));
    add_products(sum, _mm512_xor_si512(reverse_blocks(bytes), first),
                 _mm512_maskz_loadu_epi8(powers, power));
    first = _mm512_setzero_si512();
    const std::size_t step = std::min(size, kQuad);
    data += step;
    power += step;
    size -= step;
  }
}

PQBLK_AVX512_INLINE __m128i hash_bytes(const Avx512State& key, __m128i hash,
                                       const std::uint8_t* data, std::size_t size) {
  for (; size >= kChunk; data += kChunk, size -= kChunk) {
    hash = hash_chunk(no_products(), load_anew(key).power[1], hash, data);
  }
  if (size == 0) return hash;
  Products sum = no_products();
  hash_ragged(sum, hash, data, size, key.power[kBlocks] + kBlock);
  return reduce(sum);
}

// The block of sizes, which ends a hash, has the power H^1.
PQBLK_AVX512_INLINE Products product_of_sizes(const Avx512State& key, __m128i sizes) {
  Products sum = no_products();
  add_products(sum, in_first_lane(sizes), in_first_lane(load_block(key.power[kBlocks])));
  return sum;
}

// The hash of a message whose last 0 to 512 bytes are at `data`.
PQBLK_AVX512_INLINE __m128i hash_end(const Avx512State& key, __m128i hash, const std::uint8_t* data,
                                     std::size_t size, __m128i sizes) {
  if (size == 0) return reduce(product_of_sizes(key, _mm_xor_si128(hash, sizes)));
  Products sum = product_of_sizes(key, sizes);
  hash_ragged(sum, hash, data, size, key.power[kBlocks]);
  return reduce(sum);
}

// ---- AES-CTR and both together -----------------------------------------------------------------

// Within a window of 256 counters only the last byte of the block changes, so the first round
// changes only the one column that it enters, {S, S, 3S, 2S} where S is what SubBytes makes of it.
// That depends on the key but on no nonce: the state has S, 3S and 2S for each value of the byte,
// and the first round of a block is an exclusive or of its column with what the round makes of all
// else. Which columns are read depends on the counter alone.
constexpr int kSubstitutedByZero = 0x52;

struct Counters {
  __m128i whitened;    // round 0 of a counter of zero, its last byte such that the column is zero
  std::uint32_t word;  // the last word of it
  std::size_t chunk;
  __m512i others;  // the first round without the column, for the chunk's window, in all lanes
};

PQBLK_AVX512_INLINE __m512i other_columns(const Avx512State& key, const Counters& counters) {
  const auto window = static_cast<std::uint32_t>(counters.chunk * kBlocks / kWindow * kWindow);
  const auto word = static_cast<int>(counters.word ^ __builtin_bswap32(window));
  const __m128i whitened = _mm_insert_epi32(counters.whitened, word, 3);
  return _mm512_broadcast_i32x4(_mm_aesenc_si128(whitened, load_block(key.round[1])));
}

PQBLK_AVX512_INLINE Counters first_counters(const Avx512State& key, const Nonce& nonce) {
  const __m128i whitened = _mm_xor_si128(load_nonce(nonce, 0), load_block(key.round[0]));
  const __m128i blanked = _mm_insert_epi8(whitened, kSubstitutedByZero, kBlock - 1);
  Counters counters = {blanked, static_cast<std::uint32_t>(_mm_extract_epi32(blanked, 3)), 0, {}};
  counters.others = other_columns(key, counters);
  return counters;
}

// The columns of blocks 4n to 4n + 3 of a group, where the first column of their lanes is.
PQBLK_AVX512_INLINE __m512i columns_of(__m512i group, int n) {
  constexpr __mmask64 kFirstColumns = 0x000F000F000F000F;
  const int at = 0x02010000 + 0x0C0C0C0C * n;
  const __m512i from = _mm512_set_epi32(0, 0, 0, at + 0x09090909, 0, 0, 0, at + 0x06060606, 0, 0, 0,
                                        at + 0x03030303, 0, 0, 0, at);
  return _mm512_maskz_permutexvar_epi8(kFirstColumns, from, group);
}

// A chunk's counters go from 32k + 2 to 32k + 33, so the last two may be the first of a window.
PQBLK_AVX512_INLINE void first_round(const Avx512State& key, Counters& counters,
                                     __m512i (&s)[kQuads]) {
  const std::size_t group = counters.chunk++ * kBlocks / kGroup % kGroups;
#pragma GCC unroll 8
  for (std::size_t i = 0; i + 1 < kQuads; ++i) {
    const __m512i columns = load(key.column[group + i / 4]);
    s[i] = _mm512_xor_si512(counters.others, columns_of(columns, i % 4));
  }
  __m512i others = counters.others;
  if (group + kBlocks / kGroup == kGroups) {
    counters.others = other_columns(key, counters);
    others = _mm512_mask_blend_epi64(0xF0, others, counters.others);
  }
  s[kQuads - 1] = _mm512_xor_si512(others, columns_of(load(key.column[group + 1]), 3));
}

// Which of the eight hash_step()s go along with the rounds: none, all, or those of quads 0 to 3.
enum class Along : std::uint8_t { none, chunk, first_half };

// The step that goes along with a round, or kQuads. Evenly spread, for the CPU looks ahead by less
// than a chunk.
constexpr std::size_t step_along(Along along, std::size_t round) {
  const std::size_t step = (round - 2) % 3 < 2 ? (round - 2) / 3 * 2 + (round - 2) % 3 : kQuads;
  const bool first_half = step < 2 || step >= kQuads - 2;
  return along == Along::chunk || (along == Along::first_half && first_half) ? step : kQuads;
}

// The bytes that are hashed along with the rounds, and the powers for them.
struct Hashed {
  const std::uint8_t* chunk;
  const std::uint8_t* powers;
};

// All rounds but the first of quads kFrom to kTo - 1, which are then encrypted or decrypted. What
// is hashed may be the input itself, for it is read before `out` is written.
template <Along kAlong, std::size_t kFrom = 0, std::size_t kTo = kQuads>
PQBLK_AVX512_INLINE void other_rounds(const Avx512State& key, __m512i (&s)[kQuads],
                                      const std::uint8_t* in, std::uint8_t* out,
                                      const Hashed& hashed, __m128i hash, Products& sum) {
  [[maybe_unused]] TwoQuads quads;
#pragma GCC unroll 16
  for (std::size_t r = 2; r < kRounds; ++r) {
    const __m512i round = in_all_lanes(key.round[r]);
#pragma GCC unroll 8
    for (std::size_t i = kFrom; i < kTo; ++i) s[i] = _mm512_aesenc_epi128(s[i], round);
    const std::size_t step = step_along(kAlong, r);
    if (step < kQuads) hash_step(sum, quads, step, hash, hashed.chunk, hashed.powers);
  }
  const __m512i last = in_all_lanes(key.round[kRounds]);
#pragma GCC unroll 8
  for (std::size_t i = kFrom; i < kTo; ++i) {
    const __m512i masked = _mm512_xor_si512(last, load(in + i * kQuad));
    store(out + i * kQuad, _mm512_aesenclast_epi128(s[i], masked));
  }
}

PQBLK_AVX512_INLINE void crypt_chunk(const Avx512State& state, Counters& counters,
                                     const std::uint8_t* in, std::uint8_t* out) {
  const Avx512State& key = load_anew(state);
  __m512i s[kQuads];
  first_round(key, counters, s);
  Products sum = no_products();
  other_rounds<Along::none>(key, s, in, out, {}, _mm_setzero_si128(), sum);
}

// `sum` is what else belongs to the new hash.
PQBLK_AVX512_INLINE __m128i crypt_and_hash(const Avx512State& state, Counters& counters,
                                           const std::uint8_t* in, std::uint8_t* out,
                                           const Hashed& hashed, __m128i hash, Products sum) {
  const Avx512State& key = load_anew(state);
  __m512i s[kQuads];
  first_round(key, counters, s);
  other_rounds<Along::chunk>(key, s, in, out, hashed, hash, sum);
  return reduce(sum);
}

// In two halves, so that only the second one is left to hash when all is encrypted.
PQBLK_AVX512_INLINE __m128i seal_last_chunk(const Avx512State& state, Counters& counters,
                                            const std::uint8_t* in, std::uint8_t* out, __m128i hash,
                                            __m128i sizes) {
  const Avx512State& key = load_anew(state);
  __m512i s[kQuads];
  first_round(key, counters, s);
  Products before = no_products();
  other_rounds<Along::chunk, 0, kQuads / 2>(key, s, in, out, {out - kChunk, key.power[1]}, hash,
                                            before);
  hash = reduce(before);
  Products sum = product_of_sizes(key, sizes);
  const Hashed last = {out, key.power[0]};
  other_rounds<Along::first_half, kQuads / 2>(key, s, in, out, last, hash, sum);
  TwoQuads quads;
#pragma GCC unroll 4
  for (std::size_t step = 2; step < kQuads - 2; ++step) {
    hash_step(sum, quads, step, hash, last.chunk, last.powers);
  }
  return reduce(sum);
}

// The last size % 512 bytes, one register at a time, `done` bytes into the message.
PQBLK_AVX512_INLINE void crypt_ragged(const Avx512State& state, const Nonce& nonce,
                                      std::size_t done, const std::uint8_t* in, std::uint8_t* out,
                                      std::size_t size) {
  const __m512i first = _mm512_set_epi32(0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 2);
  const __m512i four = _mm512_broadcast_i32x4(_mm_set_epi32(0, 0, 0, 4));
  const __m512i base = reverse_blocks(_mm512_broadcast_i32x4(load_nonce(nonce, 0)));
  __m512i blocks =
      _mm512_add_epi32(_mm512_add_epi32(base, first),
                       _mm512_broadcast_i32x4(_mm_cvtsi32_si128(static_cast<int>(done / kBlock))));
#pragma GCC unroll 1
  while (size > 0) {
    const Avx512State& key = load_anew(state);
    __m512i s = _mm512_xor_si512(reverse_blocks(blocks), in_all_lanes(key.round[0]));
#pragma GCC unroll 16
    for (int r = 1; r < kRounds; ++r) s = _mm512_aesenc_epi128(s, in_all_lanes(key.round[r]));
    const __mmask64 bytes = bytes_mask(size);
    const __m512i masked =
        _mm512_xor_si512(in_all_lanes(key.round[kRounds]), _mm512_maskz_loadu_epi8(bytes, in));
    _mm512_mask_storeu_epi8(out, bytes, _mm512_aesenclast_epi128(s, masked));
    blocks = _mm512_add_epi32(blocks, four);
    const std::size_t step = std::min(size, kQuad);
    in += step;
    out += step;
    size -= step;
  }
}

PQBLK_AVX512_INLINE __m128i seal_and_hash(const Avx512State& key, const AeadMessage& m,
                                          __m128i hash, __m128i sizes) {
  const std::uint8_t* in = m.in;
  std::uint8_t* out = m.out;
  std::size_t left = m.size;
  if (left == 0) return hash_end(key, hash, nullptr, 0, sizes);
  Counters counters = first_counters(key, m.nonce);
  if (left >= kChunk) {
    crypt_chunk(key, counters, in, out);
    for (;;) {
      in += kChunk;
      out += kChunk;
      left -= kChunk;
      if (left <= kChunk) break;
      hash =
          crypt_and_hash(key, counters, in, out, {out - kChunk, key.power[1]}, hash, no_products());
    }
    if (left == kChunk) return seal_last_chunk(key, counters, in, out, hash, sizes);
    hash = hash_chunk(no_products(), key.power[1], hash, out - kChunk);
  }
  crypt_ragged(key, m.nonce, m.size - left, in, out, left);
  return hash_end(key, hash, out, left, sizes);
}

PQBLK_AVX512_INLINE __m128i hash_and_open(const Avx512State& key, const AeadMessage& m,
                                          __m128i hash, __m128i sizes) {
  const std::uint8_t* in = m.in;
  std::uint8_t* out = m.out;
  std::size_t left = m.size;
  if (left == 0) return hash_end(key, hash, nullptr, 0, sizes);
  Counters counters = first_counters(key, m.nonce);
  for (; left > kChunk; left -= kChunk, in += kChunk, out += kChunk) {
    hash = crypt_and_hash(key, counters, in, out, {in, key.power[1]}, hash, no_products());
  }
  if (left == kChunk) {
    return crypt_and_hash(key, counters, in, out, {in, key.power[0]}, hash,
                          product_of_sizes(key, sizes));
  }
  hash = hash_end(key, hash, in, left, sizes);
  crypt_ragged(key, m.nonce, m.size - left, in, out, left);
  return hash;
}

PQBLK_AVX512 void seal(const void* state, const AeadMessage& m, Tag& tag) {
  const Avx512State& key = *static_cast<const Avx512State*>(state);
  const __m128i mask = tag_mask(key, m.nonce);
  const __m128i before = hash_bytes(key, _mm_setzero_si128(), m.aad.data(), m.aad.size());
  const __m128i hash = seal_and_hash(key, m, before, size_block(m.aad.size(), m.size));
  store_block(tag.data(), _mm_xor_si128(reverse_block(hash), mask));
  wipe_registers();
}

PQBLK_AVX512 bool open(const void* state, const AeadMessage& m, const Tag& tag) {
  const Avx512State& key = *static_cast<const Avx512State*>(state);
  const __m128i mask = tag_mask(key, m.nonce);
  const __m128i before = hash_bytes(key, _mm_setzero_si128(), m.aad.data(), m.aad.size());
  const __m128i hash = hash_and_open(key, m, before, size_block(m.aad.size(), m.size));
  const __m128i computed = _mm_xor_si128(reverse_block(hash), mask);
  const __m128i difference = _mm_xor_si128(computed, load_block(tag.data()));
  const bool holds = _mm_testz_si128(difference, difference) != 0;
  wipe_registers();
  return holds;
}

// ---- Keys --------------------------------------------------------------------------------------

PQBLK_AVX512_INLINE void expand_columns(Avx512State& key) {
  for (std::size_t n = 0; n < kWindow; ++n) {
    const auto counter = static_cast<std::uint8_t>(n + 2);
    const int byte = counter ^ key.round[0][kBlock - 1];
    const __m128i block = _mm_insert_epi8(_mm_set1_epi8(kSubstitutedByZero), byte, kBlock - 1);
    const __m128i column = _mm_aesenc_si128(block, _mm_setzero_si128());
    const int products = _mm_cvtsi128_si32(_mm_srli_si128(column, 1));
    std::memcpy(&key.column[n / kGroup][n % kGroup * 3], &products, 3);
  }
}

PQBLK_AVX512 bool expand(void* state, const std::uint8_t* bytes) {
  Avx512State& key = *static_cast<Avx512State*>(state);
  expand_round_keys(key, bytes);
  expand_powers(key);
  expand_columns(key);
  wipe_registers();
  return true;
}

void release(void*) {}

bool available() {
  return cpu_has_vaes() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi");
}

}  // namespace

constinit const AeadBackend kGcmAvx512 = {
    Suite::aes_256_gcm, "vaes-avx512", available, expand, release, seal, open,
};

}  // namespace pqblk::crypto

#endif  // __x86_64__
