// Fuzzes the key bundle, which a process reads from whoever started it: what parses is written back
// to the same bytes, and nothing else is taken.

#include "sealed/key_bundle.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

using namespace pqblk;
using namespace pqblk::sealed;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::uint8_t> bytes(data, size);
  if (size >= sizeof(BundleHead)) {
    const auto length = bundle_bytes(bytes.first<sizeof(BundleHead)>());
    if (length && *length > kBundleBytesMax) __builtin_trap();
    const bool whole = length && *length == size;
    if (!whole && parse_bundle(bytes)) __builtin_trap();
  }
  const auto bundle = parse_bundle(bytes);
  if (bundle) {
    const auto memory = BundleMemory::make();
    if (!memory) return 0;
    const auto written = write_bundle(bundle->uuid, bundle->keys, memory->bytes());
    if (!written || *written != size || std::memcmp(memory->bytes().data(), data, size) != 0) {
      __builtin_trap();
    }
  }
  if (size == sizeof(AgentRequest)) {
    AgentRequest request;
    std::memcpy(&request, data, size);
    const auto uuid = parse_request(request);
    if (!uuid) return 0;
    const AgentRequest again = make_request(*uuid);
    if (std::memcmp(&again, &request, sizeof again) != 0) __builtin_trap();
  }
  return 0;
}
