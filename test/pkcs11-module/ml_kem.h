// ML-KEM in plain C++, for the token of the tests: FIPS 203 read line by line, with nothing done
// for speed and nothing against side channels. test/keys/pkcs11-module.test.ts holds it against
// @noble/post-quantum and liboqs.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace test_token {

using Bytes = std::vector<std::uint8_t>;
using Bytes32 = std::array<std::uint8_t, 32>;

// Section 8, table 2. eta1 and eta2 are 2 in both sets.
struct ParameterSet {
  unsigned k;
  unsigned du;
  unsigned dv;
  std::size_t ek_bytes() const { return 384 * k + 32; }
  std::size_t dk_bytes() const { return 768 * k + 96; }
  std::size_t ciphertext_bytes() const { return 32 * (du * k + dv); }
};
inline constexpr ParameterSet kMlKem768{3, 10, 4};
inline constexpr ParameterSet kMlKem1024{4, 11, 5};

struct KeyPair {
  Bytes ek;
  Bytes dk;
};

KeyPair key_gen(const ParameterSet& set, const Bytes32& d, const Bytes32& z);   // algorithm 16
Bytes32 decapsulate(const ParameterSet& set, const Bytes& dk, const Bytes& c);  // algorithm 18

}  // namespace test_token
