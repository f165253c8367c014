// The sealed header extension: parse, build, and the header's MAC.
//
// Room sealed/: bytes in, values out; it reads and writes no file. docs/format.md, section 1.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "sealed/backend_api.h"
#include "sealed/layout.h"

namespace pqblk::sealed {

struct Extension {
  crypto::Suite suite = crypto::Suite::aes_256_gcm;
  BackingPolicy backing_policy = BackingPolicy::none;
  Uuid uuid{};
  std::uint64_t key_area[2] = {0, 0};
  std::uint64_t session_table[2] = {0, 0};
  std::uint32_t session_table_length = 0;
  std::uint64_t log_offset = 0;
  std::uint64_t log_length = 0;
  Uuid backing_uuid{};
  Mac32 mac{};
};

// Checks every field, alignment to `cluster_size`, and that no two regions overlap.
Result<Extension> parse_extension(std::span<const std::uint8_t> payload,
                                  std::uint64_t cluster_size);
void build_extension(const Extension& extension, std::span<std::uint8_t, sizeof(ExtensionRaw)> out);

// The three MAC keys under the volume integrity key.
struct MacKeys {
  crypto::SecretKey header, sessions, log_header;
};
Result<MacKeys> derive_mac_keys(const crypto::SecretKey& integrity, const Uuid& uuid);

// MAC over the first 512 bytes of the file (MAC field, dirty and corrupt bits as zero) and the
// backing name.
Mac32 header_mac(const MacKeys& keys, std::span<const std::uint8_t, kHeaderMacBytes> header,
                 std::string_view backing_name);
// Puts the MAC into the header bytes.
void sign_header(const MacKeys& keys, std::span<std::uint8_t, kHeaderMacBytes> header,
                 std::string_view backing_name);
Error verify_header(const MacKeys& keys, std::span<const std::uint8_t, kHeaderMacBytes> header,
                    std::string_view backing_name);

// A keyed MAC over label ‖ UUID ‖ bytes, used by the session table and the log header.
Mac32 labelled_mac(const crypto::SecretKey& key, std::string_view label, const Uuid& uuid,
                   std::span<const std::uint8_t> bytes);

}  // namespace pqblk::sealed
