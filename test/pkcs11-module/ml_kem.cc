#include "ml_kem.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>

namespace test_token {
namespace {

constexpr unsigned kN = 256;
constexpr std::uint32_t kQ = 3329;
constexpr unsigned kEta = 2;

using Polynomial = std::array<std::uint32_t, kN>;  // coefficients below q
using Vector = std::vector<Polynomial>;

// ---- section 4.1: hash functions ---------------------------------------------------------------

Bytes hash(const EVP_MD* algorithm, std::initializer_list<std::span<const std::uint8_t>> parts,
           std::size_t length) {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  Bytes out(length);
  bool good = EVP_DigestInit_ex(context, algorithm, nullptr) == 1;
  for (const auto part : parts) {
    good = good && EVP_DigestUpdate(context, part.data(), part.size()) == 1;
  }
  const bool xof = (EVP_MD_get_flags(algorithm) & EVP_MD_FLAG_XOF) != 0;
  good = good && (xof ? EVP_DigestFinalXOF(context, out.data(), length)
                      : EVP_DigestFinal_ex(context, out.data(), nullptr)) == 1;
  EVP_MD_CTX_free(context);
  if (!good) std::abort();
  return out;
}

Bytes G(std::span<const std::uint8_t> a, std::span<const std::uint8_t> b) {
  return hash(EVP_sha3_512(), {a, b}, 64);
}

Bytes H(std::span<const std::uint8_t> a) { return hash(EVP_sha3_256(), {a}, 32); }

Bytes prf(std::span<const std::uint8_t> seed, std::uint8_t n) {
  return hash(EVP_shake256(), {seed, {&n, 1}}, 64 * kEta);
}

// ---- section 4.2: bits, compression, sampling --------------------------------------------------

std::uint32_t compress(std::uint32_t x, unsigned d) {
  return (((x << d) + kQ / 2) / kQ) & ((1U << d) - 1);
}

std::uint32_t decompress(std::uint32_t y, unsigned d) { return (y * kQ + (1U << (d - 1))) >> d; }

void encode(Bytes& out, const Polynomial& f, unsigned d) {
  Bytes bytes(32 * d);
  for (unsigned i = 0; i < kN * d; ++i) {
    const std::uint32_t bit = (f[i / d] >> (i % d)) & 1;
    bytes[i / 8] = static_cast<std::uint8_t>(bytes[i / 8] | (bit << (i % 8)));
  }
  out.insert(out.end(), bytes.begin(), bytes.end());
}

Polynomial decode(std::span<const std::uint8_t> bytes, unsigned d) {
  Polynomial f{};
  for (unsigned i = 0; i < kN * d; ++i) {
    const std::uint32_t bit = (static_cast<std::uint32_t>(bytes[i / 8]) >> (i % 8)) & 1;
    f[i / d] |= bit << (i % d);
  }
  if (d == 12) {
    for (std::uint32_t& x : f) x %= kQ;
  }
  return f;
}

Polynomial sample_ntt(std::span<const std::uint8_t> rho, std::uint8_t j, std::uint8_t i) {
  const std::uint8_t index[2] = {j, i};
  // Four times what is needed on average; fewer than 256 hits in it does not happen.
  const Bytes stream = hash(EVP_shake128(), {rho, index}, 3 * kN * 4);
  Polynomial a{};
  unsigned filled = 0;
  for (std::size_t at = 0; at + 3 <= stream.size() && filled < kN; at += 3) {
    const std::uint32_t d1 = stream[at] + 256U * (stream[at + 1] % 16U);
    const std::uint32_t d2 = stream[at + 1] / 16U + 16U * stream[at + 2];
    if (d1 < kQ) a[filled++] = d1;
    if (d2 < kQ && filled < kN) a[filled++] = d2;
  }
  if (filled < kN) std::abort();
  return a;
}

Polynomial sample_cbd(const Bytes& bytes) {
  const auto bit = [&](unsigned i) {
    return (static_cast<std::uint32_t>(bytes[i / 8]) >> (i % 8)) & 1U;
  };
  Polynomial f{};
  for (unsigned i = 0; i < kN; ++i) {
    const std::uint32_t x = bit(4 * i) + bit(4 * i + 1);
    const std::uint32_t y = bit(4 * i + 2) + bit(4 * i + 3);
    f[i] = (x + kQ - y) % kQ;
  }
  return f;
}

// ---- section 4.3: the number-theoretic transform -----------------------------------------------

std::uint32_t power(std::uint32_t base, unsigned exponent) {
  std::uint32_t result = 1;
  for (; exponent > 0; --exponent) result = result * base % kQ;
  return result;
}

unsigned reversed_7_bits(unsigned x) {
  unsigned y = 0;
  for (unsigned i = 0; i < 7; ++i) y |= ((x >> i) & 1) << (6 - i);
  return y;
}

Polynomial ntt(Polynomial f) {
  unsigned i = 1;
  for (unsigned length = 128; length >= 2; length /= 2) {
    for (unsigned start = 0; start < kN; start += 2 * length) {
      const std::uint32_t zeta = power(17, reversed_7_bits(i++));
      for (unsigned j = start; j < start + length; ++j) {
        const std::uint32_t t = zeta * f[j + length] % kQ;
        f[j + length] = (f[j] + kQ - t) % kQ;
        f[j] = (f[j] + t) % kQ;
      }
    }
  }
  return f;
}

Polynomial inverse_ntt(Polynomial f) {
  unsigned i = 127;
  for (unsigned length = 2; length <= 128; length *= 2) {
    for (unsigned start = 0; start < kN; start += 2 * length) {
      const std::uint32_t zeta = power(17, reversed_7_bits(i--));
      for (unsigned j = start; j < start + length; ++j) {
        const std::uint32_t t = f[j];
        f[j] = (t + f[j + length]) % kQ;
        f[j + length] = zeta * ((f[j + length] + kQ - t) % kQ) % kQ;
      }
    }
  }
  for (std::uint32_t& x : f) x = x * 3303 % kQ;
  return f;
}

Polynomial add(Polynomial a, const Polynomial& b) {
  for (unsigned i = 0; i < kN; ++i) a[i] = (a[i] + b[i]) % kQ;
  return a;
}

Polynomial multiply(const Polynomial& a, const Polynomial& b) {
  Polynomial c{};
  for (unsigned i = 0; i < 128; ++i) {
    const std::uint32_t gamma = power(17, 2 * reversed_7_bits(i) + 1);
    const std::uint32_t a0 = a[2 * i], a1 = a[2 * i + 1], b0 = b[2 * i], b1 = b[2 * i + 1];
    c[2 * i] = (a0 * b0 + a1 * b1 % kQ * gamma) % kQ;
    c[2 * i + 1] = (a0 * b1 + a1 * b0) % kQ;
  }
  return c;
}

Polynomial dot(const Vector& a, const Vector& b) {
  Polynomial sum{};
  for (std::size_t i = 0; i < a.size(); ++i) sum = add(sum, multiply(a[i], b[i]));
  return sum;
}

// ---- section 5: K-PKE --------------------------------------------------------------------------

Vector noise(unsigned k, std::span<const std::uint8_t> seed, std::uint8_t& n) {
  Vector v(k);
  for (Polynomial& f : v) f = sample_cbd(prf(seed, n++));
  return v;
}

Vector transformed(Vector v) {
  for (Polynomial& f : v) f = ntt(f);
  return v;
}

Vector decode_vector(std::span<const std::uint8_t> bytes, unsigned k) {
  Vector v(k);
  for (unsigned i = 0; i < k; ++i) v[i] = decode(bytes.subspan(384 * i, 384), 12);
  return v;
}

Bytes encrypt(const ParameterSet& set, std::span<const std::uint8_t> ek,
              std::span<const std::uint8_t> m, std::span<const std::uint8_t> r) {
  const Vector t = decode_vector(ek, set.k);
  const auto rho = ek.subspan(384 * set.k, 32);
  std::uint8_t n = 0;
  const Vector y = transformed(noise(set.k, r, n));
  const Vector e1 = noise(set.k, r, n);
  const Polynomial e2 = sample_cbd(prf(r, n));
  Bytes c;
  for (unsigned i = 0; i < set.k; ++i) {
    Vector column(set.k);  // of A: the row of its transpose
    for (unsigned j = 0; j < set.k; ++j) {
      column[j] = sample_ntt(rho, static_cast<std::uint8_t>(i), static_cast<std::uint8_t>(j));
    }
    Polynomial u = add(inverse_ntt(dot(column, y)), e1[i]);
    for (std::uint32_t& x : u) x = compress(x, set.du);
    encode(c, u, set.du);
  }
  Polynomial mu = decode(m, 1);
  for (std::uint32_t& x : mu) x = decompress(x, 1);
  Polynomial v = add(add(inverse_ntt(dot(t, y)), e2), mu);
  for (std::uint32_t& x : v) x = compress(x, set.dv);
  encode(c, v, set.dv);
  return c;
}

Bytes decrypt(const ParameterSet& set, std::span<const std::uint8_t> dk,
              std::span<const std::uint8_t> c) {
  Vector u(set.k);
  for (unsigned i = 0; i < set.k; ++i) {
    u[i] = decode(c.subspan(32 * set.du * i, 32 * set.du), set.du);
    for (std::uint32_t& x : u[i]) x = decompress(x, set.du);
  }
  Polynomial v = decode(c.subspan(32 * set.du * set.k), set.dv);
  const Polynomial product = inverse_ntt(dot(decode_vector(dk, set.k), transformed(u)));
  for (unsigned i = 0; i < kN; ++i) {
    v[i] = compress((decompress(v[i], set.dv) + kQ - product[i]) % kQ, 1);
  }
  Bytes m;
  encode(m, v, 1);
  return m;
}

Bytes32 first_32(const Bytes& bytes) {
  Bytes32 out;
  std::copy_n(bytes.begin(), out.size(), out.begin());
  return out;
}

}  // namespace

KeyPair key_gen(const ParameterSet& set, const Bytes32& d, const Bytes32& z) {
  const std::uint8_t rank = static_cast<std::uint8_t>(set.k);
  const Bytes seeds = G(d, {&rank, 1});
  const std::span<const std::uint8_t> rho(seeds.data(), 32);
  const std::span<const std::uint8_t> sigma(seeds.data() + 32, 32);
  std::uint8_t n = 0;
  const Vector s = transformed(noise(set.k, sigma, n));
  const Vector e = transformed(noise(set.k, sigma, n));
  KeyPair pair;
  for (unsigned i = 0; i < set.k; ++i) {
    Vector row(set.k);
    for (unsigned j = 0; j < set.k; ++j) {
      row[j] = sample_ntt(rho, static_cast<std::uint8_t>(j), static_cast<std::uint8_t>(i));
    }
    encode(pair.ek, add(dot(row, s), e[i]), 12);
    encode(pair.dk, s[i], 12);
  }
  pair.ek.insert(pair.ek.end(), rho.begin(), rho.end());
  const Bytes h = H(pair.ek);
  pair.dk.insert(pair.dk.end(), pair.ek.begin(), pair.ek.end());
  pair.dk.insert(pair.dk.end(), h.begin(), h.end());
  pair.dk.insert(pair.dk.end(), z.begin(), z.end());
  return pair;
}

Bytes32 decapsulate(const ParameterSet& set, const Bytes& dk, const Bytes& c) {
  const std::span<const std::uint8_t> all(dk);
  const auto ek = all.subspan(384 * set.k, set.ek_bytes());
  const auto h = all.subspan(768 * set.k + 32, 32);
  const auto z = all.subspan(768 * set.k + 64, 32);
  const Bytes m = decrypt(set, all.first(384 * set.k), c);
  const Bytes secrets = G(m, h);
  const Bytes again = encrypt(set, ek, m, std::span(secrets).subspan(32));
  if (again == c) return first_32(secrets);
  return first_32(hash(EVP_shake256(), {z, c}, 32));
}

}  // namespace test_token
