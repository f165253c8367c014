#include "sim/nonce_trace.h"

#include "sim/pages.h"

namespace pqblk::sim {
namespace {

std::string hex(std::span<const std::uint8_t> bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace

void NonceTrace::consume(std::span<const std::uint8_t> key, std::span<const std::uint8_t> nonce) {
  const std::uint64_t a = hash_bytes(key.data(), key.size());
  const std::uint64_t b = hash_bytes(nonce.data(), nonce.size());
  const Print print{mix64(a + mix64(b)), mix64(b + mix64(a ^ 0x9e3779b97f4a7c15U))};
  std::lock_guard guard(mutex_);
  if (!seen_.insert(print).second && duplicate_.empty()) {
    duplicate_ = "nonce " + hex(nonce) + " was used twice under key " + hex(key);
  }
}

void NonceTrace::reset() {
  seen_.clear();
  duplicate_.clear();
}

}  // namespace pqblk::sim
