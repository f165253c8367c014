#include "sealed/extension.h"

#include <algorithm>
#include <vector>

namespace pqblk::sealed {
namespace {

Error bad(const std::string& what) { return Error(Kind::corrupt, "sealed extension: " + what); }

bool all_zero(std::span<const std::uint8_t> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::uint8_t b) { return b == 0; });
}

struct Region {
  std::uint64_t offset, length;
  const char* name;
};

Error check_regions(const Extension& x, std::uint64_t cluster_size) {
  Region regions[] = {
      {0, cluster_size, "header"},
      {x.key_area[0], kKeyAreaCopyBytes, "key area A"},
      {x.key_area[1], kKeyAreaCopyBytes, "key area B"},
      {x.session_table[0], x.session_table_length, "session table A"},
      {x.session_table[1], x.session_table_length, "session table B"},
      {x.log_offset, x.log_length, "log"},
  };
  constexpr std::uint64_t kOffsetMax = std::uint64_t{1} << 55;
  for (const Region& r : regions) {
    if (r.offset % cluster_size != 0 || r.offset > kOffsetMax) {
      return bad(std::string(r.name) + " is not at a cluster boundary");
    }
  }
  std::sort(std::begin(regions), std::end(regions),
            [](const Region& a, const Region& b) { return a.offset < b.offset; });
  for (std::size_t i = 1; i < std::size(regions); ++i) {
    const Region& before = regions[i - 1];
    if (before.offset + before.length > regions[i].offset) {
      return bad(std::string(before.name) + " overlaps " + regions[i].name);
    }
  }
  return {};
}

}  // namespace

Result<Extension> parse_extension(std::span<const std::uint8_t> payload,
                                  std::uint64_t cluster_size) {
  if (payload.size() != sizeof(ExtensionRaw)) {
    return bad("expected " + std::to_string(sizeof(ExtensionRaw)) + " bytes, found " +
               std::to_string(payload.size()));
  }
  ExtensionRaw raw;
  std::memcpy(&raw, payload.data(), sizeof raw);
  if (raw.reader_version > kFormatVersion || raw.format_version == 0) {
    return Error(Kind::unsupported, "sealed format version " +
                                        std::to_string(raw.format_version.get()) +
                                        " needs a newer pqblk (this one reads version 1)");
  }
  if (raw.suite != 1 && raw.suite != 2) {
    return Error(Kind::unsupported, "unknown cipher suite " + std::to_string(raw.suite));
  }
  if (raw.kdf != 1) return Error(Kind::unsupported, "unknown KDF " + std::to_string(raw.kdf));
  if (raw.backing_policy > 2) return bad("unknown backing policy");
  if (raw.key_area_length != kKeyAreaCopyBytes) return bad("key area length");
  if (!all_zero(raw.zero0) || raw.zero1 != 0 || raw.zero2 != 0 || !all_zero(raw.reserved)) {
    return bad("a reserved field is not zero");
  }
  Extension x;
  x.suite = static_cast<crypto::Suite>(raw.suite);
  x.backing_policy = static_cast<BackingPolicy>(raw.backing_policy);
  std::copy(std::begin(raw.uuid), std::end(raw.uuid), x.uuid.begin());
  std::copy(std::begin(raw.backing_uuid), std::end(raw.backing_uuid), x.backing_uuid.begin());
  std::copy(std::begin(raw.mac), std::end(raw.mac), x.mac.begin());
  for (int i = 0; i < 2; ++i) {
    x.key_area[i] = raw.key_area[i];
    x.session_table[i] = raw.session_table[i];
  }
  x.session_table_length = raw.session_table_length;
  x.log_offset = raw.log_offset;
  x.log_length = raw.log_length;
  if (x.session_table_length == 0 || x.session_table_length % kPage != 0 ||
      x.session_table_length > kSessionTableMax) {
    return bad("session table length");
  }
  if (x.log_length < kLogMinBytes || x.log_length > kLogMaxBytes || x.log_length % kPage != 0) {
    return bad("log length");
  }
  if (Error e = check_regions(x, cluster_size)) return e;
  return x;
}

void build_extension(const Extension& x, std::span<std::uint8_t, sizeof(ExtensionRaw)> out) {
  ExtensionRaw raw;
  std::memset(&raw, 0, sizeof raw);
  raw.format_version = kFormatVersion;
  raw.reader_version = kFormatVersion;
  raw.suite = static_cast<std::uint8_t>(x.suite);
  raw.kdf = 1;
  raw.backing_policy = static_cast<std::uint8_t>(x.backing_policy);
  std::copy(x.uuid.begin(), x.uuid.end(), raw.uuid);
  std::copy(x.backing_uuid.begin(), x.backing_uuid.end(), raw.backing_uuid);
  std::copy(x.mac.begin(), x.mac.end(), raw.mac);
  raw.key_area_length = kKeyAreaCopyBytes;
  for (int i = 0; i < 2; ++i) {
    raw.key_area[i] = x.key_area[i];
    raw.session_table[i] = x.session_table[i];
  }
  raw.session_table_length = x.session_table_length;
  raw.log_offset = x.log_offset;
  raw.log_length = x.log_length;
  std::memcpy(out.data(), &raw, sizeof raw);
}

Result<MacKeys> derive_mac_keys(const crypto::SecretKey& integrity, const Uuid& uuid) {
  MacKeys keys;
  struct {
    const char* label;
    crypto::SecretKey* out;
  } const parts[] = {{"pqblk/v1 header mac", &keys.header},
                     {"pqblk/v1 session mac", &keys.sessions},
                     {"pqblk/v1 log header mac", &keys.log_header}};
  for (const auto& part : parts) {
    std::array<std::uint8_t, 32> bytes;
    const std::string_view label(part.label);
    crypto::hkdf_sha3_256(integrity.bytes(), uuid,
                          {reinterpret_cast<const std::uint8_t*>(label.data()), label.size()},
                          bytes);
    Result<crypto::SecretKey> key = crypto::SecretKey::copy_of(bytes);
    crypto::wipe(bytes.data(), bytes.size());
    if (!key) return key.take_error();
    *part.out = std::move(*key);
  }
  return keys;
}

Mac32 header_mac(const MacKeys& keys, std::span<const std::uint8_t, kHeaderMacBytes> header,
                 std::string_view backing_name) {
  std::vector<std::uint8_t> message(header.begin(), header.end());
  // incompatible_features is the big-endian 64-bit field at 72; dirty and corrupt are its low bits.
  message[79] = static_cast<std::uint8_t>(message[79] & ~3u);
  std::fill_n(message.begin() + kExtensionAt + offsetof(ExtensionRaw, mac), 32, std::uint8_t{0});
  message.insert(message.end(), backing_name.begin(), backing_name.end());
  return crypto::hmac_sha3_256(keys.header.bytes(), message);
}

void sign_header(const MacKeys& keys, std::span<std::uint8_t, kHeaderMacBytes> header,
                 std::string_view backing_name) {
  const Mac32 mac = header_mac(keys, header, backing_name);
  std::copy(mac.begin(), mac.end(), header.begin() + kExtensionAt + offsetof(ExtensionRaw, mac));
}

Error verify_header(const MacKeys& keys, std::span<const std::uint8_t, kHeaderMacBytes> header,
                    std::string_view backing_name) {
  const Mac32 mac = header_mac(keys, header, backing_name);
  const auto stored = header.subspan(kExtensionAt + offsetof(ExtensionRaw, mac), 32);
  if (crypto::equal_ct(mac, stored)) return {};
  return Error(
      Kind::integrity,
      "the header's MAC does not hold: the image was changed, or these keys are not its own");
}

Mac32 labelled_mac(const crypto::SecretKey& key, std::string_view label, const Uuid& uuid,
                   std::span<const std::uint8_t> bytes) {
  std::vector<std::uint8_t> message(label.begin(), label.end());
  message.insert(message.end(), uuid.begin(), uuid.end());
  message.insert(message.end(), bytes.begin(), bytes.end());
  return crypto::hmac_sha3_256(key.bytes(), message);
}

}  // namespace pqblk::sealed
