// The QCOW2 header: on-disk structures, a pure parser that checks every field, and the serialiser.
//
// Room format/qcow2: bytes in, facts out. It opens nothing, and the payload of our own extension
// (sealed disks) is opaque here. Spec: QEMU docs/interop/qcow2.txt, "Header", "Header extensions",
// "Feature name table".
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/endian.h"
#include "base/error.h"
#include "format/qcow2/layout.h"

namespace pqblk::format::qcow2 {

struct HeaderV2 {
  Be32 magic;
  Be32 version;
  Be64 backing_file_offset;
  Be32 backing_file_size;
  Be32 cluster_bits;
  Be64 size;
  Be32 crypt_method;
  Be32 l1_size;
  Be64 l1_table_offset;
  Be64 refcount_table_offset;
  Be32 refcount_table_clusters;
  Be32 nb_snapshots;
  Be64 snapshots_offset;
};
static_assert(sizeof(HeaderV2) == 72 && alignof(HeaderV2) == 1);
static_assert(offsetof(HeaderV2, l1_table_offset) == 40);
static_assert(offsetof(HeaderV2, snapshots_offset) == 64);

struct HeaderV3 {
  HeaderV2 v2;
  Be64 incompatible_features;
  Be64 compatible_features;
  Be64 autoclear_features;
  Be32 refcount_order;
  Be32 header_length;
  std::uint8_t compression_type;  // present when header_length > 104
  std::uint8_t padding[7];
};
static_assert(sizeof(HeaderV3) == 112 && alignof(HeaderV3) == 1);
static_assert(offsetof(HeaderV3, incompatible_features) == 72);
static_assert(offsetof(HeaderV3, refcount_order) == 96);
static_assert(offsetof(HeaderV3, compression_type) == 104);

inline constexpr std::uint32_t kHeaderLengthV2 = 72;
inline constexpr std::uint32_t kHeaderLengthV3Min = 104;
inline constexpr std::uint32_t kHeaderLengthV3 = 112;  // what we write

// Incompatible feature bits (numbers, not masks).
inline constexpr std::uint32_t kDirtyBit = 0;
inline constexpr std::uint32_t kCorruptBit = 1;
inline constexpr std::uint32_t kExternalDataBit = 2;
inline constexpr std::uint32_t kCompressionBit = 3;
inline constexpr std::uint32_t kExtendedL2Bit = 4;
inline constexpr std::uint32_t kSealedBit = 56;  // ours: guest sectors are ciphertext
// Compatible and autoclear feature bits.
inline constexpr std::uint32_t kLazyRefcountsBit = 0;
inline constexpr std::uint32_t kBitmapsBit = 0;
inline constexpr std::uint32_t kRawExternalBit = 1;

constexpr std::uint64_t bit(std::uint32_t number) { return std::uint64_t{1} << number; }

inline constexpr char kSealedFeatureName[] = "sealed disk (pqblk): keys needed";

enum class Compression : std::uint8_t { zlib = 0, zstd = 1 };

// Header extension types.
inline constexpr std::uint32_t kExtensionEnd = 0;
inline constexpr std::uint32_t kExtensionBackingFormat = 0xe2792aca;
inline constexpr std::uint32_t kExtensionFeatureNames = 0x6803f857;
inline constexpr std::uint32_t kExtensionBitmaps = 0x23852875;
inline constexpr std::uint32_t kExtensionCrypto = 0x0537be77;
inline constexpr std::uint32_t kExtensionDataFile = 0x44415441;
inline constexpr std::uint32_t kExtensionSealed = 0x50514231;  // "PQB1"

// The header and the sealed extension lie in this many bytes, which a device writes atomically.
inline constexpr std::uint32_t kAtomicHeaderBytes = 512;

struct Extension {
  std::uint32_t type = 0;
  std::vector<std::uint8_t> data;
};

struct BitmapsExtension {  // "Bitmaps extension"
  Be32 nb_bitmaps;
  Be32 reserved;
  Be64 bitmap_directory_size;
  Be64 bitmap_directory_offset;
};
static_assert(sizeof(BitmapsExtension) == 24);

struct Header {
  std::uint32_t version = 3;
  Layout layout;
  std::uint64_t size = 0;  // bytes of the virtual disk
  std::uint32_t l1_size = 0;
  HostOffset l1_offset;
  HostOffset refcount_table_offset;
  std::uint32_t refcount_table_clusters = 0;
  std::uint32_t snapshot_count = 0;
  HostOffset snapshots_offset;
  std::uint64_t incompatible = 0;
  std::uint64_t compatible = 0;
  std::uint64_t autoclear = 0;
  Compression compression = Compression::zlib;
  std::vector<std::uint8_t> extra_fields;  // fields after ours that a later version added, as found
  std::optional<std::string> backing_name;
  std::uint32_t header_length = kHeaderLengthV3;  // as stored
  std::uint64_t backing_offset = 0;   // where the name was found; 0: place it after the extensions
  std::vector<Extension> extensions;  // in file order, byte for byte, without the end marker
  std::uint64_t area_end = 0;         // what was parsed lies before this byte of the cluster

  const Extension* find(std::uint32_t type) const;  // null when absent
  std::string backing_format() const;               // "" when the header does not say
  // Sets or adds an extension; the sealed one always goes first. An empty payload removes it.
  void set_extension(std::uint32_t type, std::vector<std::uint8_t> data);
  void set_backing_format(const std::string& format);
  void set_feature_names();  // the table of the features this engine knows

  bool has(std::uint32_t incompatible_bit) const {
    return (incompatible & bit(incompatible_bit)) != 0;
  }
  bool sealed() const { return has(kSealedBit); }
  std::uint64_t slots() const { return layout.clusters(size); }  // of a plain image

  // The whole header cluster: header, extensions, backing name, zeros. Its first
  // kAtomicHeaderBytes hold the header and, when there is one, the sealed extension.
  // Errors: invalid_argument when it does not fit.
  Result<std::vector<std::uint8_t>> serialise() const;
  // Brings the fixed fields, and the payload of a sealed extension of unchanged length, into the
  // first bytes of the cluster as it is stored; nothing moves.
  void patch(std::span<std::uint8_t> first_bytes) const;

 private:
  HeaderV3 fixed() const;
};

// Bytes of the header cluster, from the first bytes of a file (72 at least).
// Errors: invalid_argument when this is not QCOW2 (no magic), unsupported (version), corrupt.
Result<std::uint64_t> header_cluster_size(std::span<const std::uint8_t> first_bytes);

// Checks every field against the specification, the limits of layout.h and the file's size.
// `bytes` holds the header cluster (or what the file has of it). Unknown incompatible bits, an
// external data file and encryption are refused by name (Kind::unsupported); a sealed image too
// unless `allow_sealed`.
Result<Header> parse_header(std::span<const std::uint8_t> bytes, std::uint64_t file_size,
                            bool allow_sealed);

}  // namespace pqblk::format::qcow2
