// How much a test does: bounded for `npm test`, less where a sanitizer makes everything slow, more
// in a soak. Two doctest suites say what a sanitizer's run leaves out (scripts/suites.mjs):
//
//   hunt   looks for planted faults: proves the tests, not the engine
//   solo   one thread works at any time: tells ThreadSanitizer nothing
//
// Room test.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace pqblk::test {

// Seconds a soak may take, of one program; 0: no soak.
inline std::uint32_t soak_seconds() {
  const char* text = std::getenv("PQBLK_SOAK_SECONDS");
  return text == nullptr ? 0 : static_cast<std::uint32_t>(std::strtoul(text, nullptr, 10));
}

// Single-threaded runs tell a sanitizer little after the first few; never 0.
constexpr std::uint64_t effort(std::uint64_t n) {
#if defined(__SANITIZE_THREAD__)
  return n / 25 + 1;
#elif defined(__SANITIZE_ADDRESS__)
  return n / 10 + 1;
#else
  return n;
#endif
}

}  // namespace pqblk::test
