// Fuzzes the header extension: what parses is built back to the same bytes, and its areas do not
// overlap.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sealed/extension.h"

using namespace pqblk;
using namespace pqblk::sealed;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::vector<std::uint8_t> payload(data, data + size);
  for (const std::uint32_t bits : {12u, 16u, 21u}) {
    const auto parsed = parse_extension(payload, std::uint64_t{1} << bits);
    if (!parsed) continue;
    std::vector<std::uint8_t> built(sizeof(ExtensionRaw));
    build_extension(
        *parsed, std::span<std::uint8_t, sizeof(ExtensionRaw)>(built.data(), sizeof(ExtensionRaw)));
    // The versions are the builder's own, the MAC is sign_header()'s to fill; all else is there.
    constexpr auto kFrom = offsetof(ExtensionRaw, suite), kTo = offsetof(ExtensionRaw, mac);
    if (!std::equal(built.begin() + kFrom, built.begin() + kTo, payload.begin() + kFrom)) {
      __builtin_trap();
    }
    if (parsed->log_length < kLogMinBytes || parsed->log_offset == 0) __builtin_trap();
  }
  return 0;
}
