// Every (key, nonce) that was ever consumed; a pair that comes twice is the unforgivable fault.
//
// Room test/sim. One trace lives through all crashes, kills, copies and branches of a run: the
// images that they leave are written on by different lives, which must never share a nonce. Any
// thread may consume; the rest is for when no other thread works.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <unordered_set>

namespace pqblk::sim {

class NonceTrace {
 public:
  // `key` names the key (its salt and label), not its secret.
  void consume(std::span<const std::uint8_t> key, std::span<const std::uint8_t> nonce);
  void reset();
  std::size_t count() const { return seen_.size(); }
  // What was consumed twice; empty when nothing was.
  const std::string& duplicate() const { return duplicate_; }

 private:
  using Print = std::array<std::uint64_t, 2>;  // 128 bits: no accidental match
  struct Hash {
    std::size_t operator()(const Print& p) const { return p[0]; }
  };
  std::mutex mutex_;
  std::unordered_set<Print, Hash> seen_;
  std::string duplicate_;
};

}  // namespace pqblk::sim
