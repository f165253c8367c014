#include "format/qcow2/header.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>
#include <limits>

namespace pqblk::format::qcow2 {
namespace {

using Bytes = std::span<const std::uint8_t>;

struct ExtensionHead {
  Be32 type;
  Be32 length;
};
static_assert(sizeof(ExtensionHead) == 8);

struct FeatureName {
  std::uint8_t type;  // 0 incompatible, 1 compatible, 2 autoclear
  std::uint8_t number;
  char name[46];
};
static_assert(sizeof(FeatureName) == 48);

struct Feature {
  std::uint8_t type;
  std::uint32_t number;
  const char* name;
};
constexpr std::array kFeatures{
    Feature{0, kDirtyBit, "dirty bit"},
    Feature{0, kCorruptBit, "corrupt bit"},
    Feature{0, kExternalDataBit, "external data file"},
    Feature{0, kCompressionBit, "compression type"},
    Feature{0, kExtendedL2Bit, "extended L2 entries"},
    Feature{1, kLazyRefcountsBit, "lazy refcounts"},
};
constexpr std::uint64_t kKnownIncompatible = bit(kDirtyBit) | bit(kCorruptBit) |
                                             bit(kCompressionBit) | bit(kExtendedL2Bit) |
                                             bit(kSealedBit);

template <class T>
T read_struct(Bytes bytes) {
  T out;
  std::memcpy(&out, bytes.data(), sizeof out);
  return out;
}

template <class T>
void append(std::vector<std::uint8_t>& out, const T& value) {
  const auto* p = reinterpret_cast<const std::uint8_t*>(&value);
  out.insert(out.end(), p, p + sizeof value);
}

Error corrupt(std::string message) {
  return Error(Kind::corrupt, "qcow2 header: " + std::move(message));
}

std::string text(std::uint64_t n) { return std::to_string(n); }

// A structure of `length` bytes at `offset`: on a cluster, beyond the header, inside the file.
Error check_table(const Layout& layout, const char* what, std::uint64_t offset,
                  std::uint64_t length, std::uint64_t file_size) {
  if (!layout.cluster_aligned(offset)) {
    return corrupt(std::string(what) + " at " + text(offset) + " is not on a cluster boundary");
  }
  if (offset < layout.cluster_size()) {
    return corrupt(std::string(what) + " overlaps the header cluster");
  }
  if (offset >= file_size || length > file_size - offset) {
    return corrupt(std::string(what) + " (" + text(length) + " bytes at " + text(offset) +
                   ") lies beyond the end of the file (" + text(file_size) + " bytes)");
  }
  return Error();
}

struct Parser {
  Bytes bytes;
  std::uint64_t file_size;
  Header header;
  HeaderV2 v2;
  std::uint32_t header_length = kHeaderLengthV2;

  Error fixed_fields();
  Error version3_fields();
  Error tables() const;
  Error backing();
  Error parse_extensions();
  Error features(bool allow_sealed) const;
  std::string feature_name(std::uint32_t number) const;
};

Error Parser::fixed_fields() {
  Result<std::uint64_t> size = header_cluster_size(bytes);
  if (!size) return size.take_error();
  v2 = read_struct<HeaderV2>(bytes);
  bytes = bytes.first(static_cast<std::size_t>(std::min<std::uint64_t>(bytes.size(), *size)));
  header.version = v2.version;
  header.layout.cluster_bits = v2.cluster_bits;
  header.size = v2.size;
  header.l1_size = v2.l1_size;
  header.l1_offset = {v2.l1_table_offset};
  header.refcount_table_offset = {v2.refcount_table_offset};
  header.refcount_table_clusters = v2.refcount_table_clusters;
  header.snapshot_count = v2.nb_snapshots;
  header.snapshots_offset = {v2.snapshots_offset};
  if (v2.crypt_method != 0) {
    const std::uint32_t method = v2.crypt_method;
    const char* name = method == 1 ? "AES" : method == 2 ? "LUKS" : "unknown";
    return Error(Kind::unsupported, std::string("qcow2 encryption (") + name + ", method " +
                                        text(method) + ") is not supported");
  }
  return Error();
}

Error Parser::version3_fields() {
  if (header.version == 2) return Error();
  if (bytes.size() < kHeaderLengthV3Min) return corrupt("truncated version 3 header");
  HeaderV3 v3{};
  std::memcpy(&v3, bytes.data(), std::min(bytes.size(), sizeof v3));
  header_length = v3.header_length;
  if (header_length < kHeaderLengthV3Min || header_length % 8 != 0 ||
      header_length > bytes.size()) {
    return corrupt("header length " + text(header_length) +
                   " (expected a multiple of 8, at least " + text(kHeaderLengthV3Min) +
                   ", within the first cluster)");
  }
  header.incompatible = v3.incompatible_features;
  header.compatible = v3.compatible_features;
  header.autoclear = v3.autoclear_features;
  if (v3.refcount_order > kRefcountOrderMax) {
    return corrupt("refcount order " + text(v3.refcount_order) + " (at most 6)");
  }
  header.layout.refcount_order = v3.refcount_order;
  header.layout.extended_l2 = header.has(kExtendedL2Bit);
  if (header.layout.extended_l2 && header.layout.cluster_bits < kClusterBitsMinExtended) {
    return corrupt("extended L2 entries need clusters of 16 KiB or more");
  }
  const std::uint8_t type = header_length > kHeaderLengthV3Min ? v3.compression_type : 0;
  if (header.has(kCompressionBit) != (type != 0)) {
    return corrupt("compression type " + text(type) + " contradicts its feature bit");
  }
  if (type > static_cast<std::uint8_t>(Compression::zstd)) {
    return Error(Kind::unsupported, "qcow2 compression type " + text(type) + " is not supported");
  }
  header.compression = static_cast<Compression>(type);
  header.header_length = header_length;
  if (header_length > kHeaderLengthV3) {
    header.extra_fields.assign(bytes.begin() + kHeaderLengthV3, bytes.begin() + header_length);
  }
  return Error();
}

Error Parser::tables() const {
  const Layout& layout = header.layout;
  const std::uint64_t l1_bytes = std::uint64_t{header.l1_size} * 8;
  if (l1_bytes > kL1BytesMax) {
    return corrupt("L1 table of " + text(l1_bytes) + " bytes (at most 32 MiB)");
  }
  if (header.size > std::numeric_limits<std::int64_t>::max()) {
    return corrupt("virtual size " + text(header.size) + " is absurd");
  }
  const std::uint64_t needed = layout.l1_entries(layout.clusters(header.size));
  if (header.l1_size < needed) {
    return corrupt("L1 table of " + text(header.l1_size) + " entries cannot map " +
                   text(header.size) + " bytes (needs " + text(needed) + ")");
  }
  if (header.l1_size != 0) {
    Error e = check_table(layout, "L1 table", header.l1_offset.bytes, l1_bytes, file_size);
    if (e) return e;
  }
  const std::uint64_t refcount_bytes = std::uint64_t{header.refcount_table_clusters}
                                       << layout.cluster_bits;
  if (header.refcount_table_clusters == 0 ||
      refcount_bytes > std::max(kRefcountTableBytesMax, layout.cluster_size())) {
    return corrupt("refcount table of " + text(header.refcount_table_clusters) +
                   " clusters (at least one, at most 8 MiB)");
  }
  Error e = check_table(layout, "refcount table", header.refcount_table_offset.bytes, 8, file_size);
  if (e) return e;
  if (header.snapshot_count > kSnapshotsMax) {
    return corrupt(text(header.snapshot_count) + " snapshots (at most 65536)");
  }
  if (header.snapshot_count != 0) {
    return check_table(layout, "snapshot table", header.snapshots_offset.bytes,
                       std::uint64_t{header.snapshot_count} * 40, file_size);
  }
  return Error();
}

Error Parser::backing() {
  const std::uint64_t offset = v2.backing_file_offset;
  const std::uint32_t length = v2.backing_file_size;
  if (offset == 0) return Error();
  if (length > kBackingNameMax) {
    return corrupt("backing file name of " + text(length) + " bytes (at most 1023)");
  }
  if (length == 0) return Error();
  if (offset < header_length || offset >= bytes.size() || length > bytes.size() - offset) {
    return corrupt("backing file name lies outside the header cluster");
  }
  header.backing_name.emplace(reinterpret_cast<const char*>(bytes.data()) + offset, length);
  if (header.backing_name->find('\0') != std::string::npos) {
    return corrupt("backing file name contains a zero byte");
  }
  header.backing_offset = offset;
  header.area_end = offset + length;
  return Error();
}

Error Parser::parse_extensions() {
  // The area ends at its end marker, at the backing name, or with the cluster.
  const std::size_t end =
      header.backing_offset != 0 ? static_cast<std::size_t>(header.backing_offset) : bytes.size();
  std::size_t at = header_length;
  const auto looked_up_to = [this](std::size_t to) {
    header.area_end = std::max<std::uint64_t>(header.area_end, to);
  };
  looked_up_to(at);
  while (at + sizeof(ExtensionHead) <= end) {
    const auto head = read_struct<ExtensionHead>(bytes.subspan(at));
    looked_up_to(at + sizeof head);
    if (head.type == kExtensionEnd) return Error();
    at += sizeof head;
    const std::uint32_t length = head.length;
    if (length > end - at) {
      return corrupt("extension " + text(head.type) + " of " + text(length) +
                     " bytes leaves the extension area");
    }
    if (header.find(head.type) != nullptr) {
      return corrupt("extension " + text(head.type) + " appears twice");
    }
    const Bytes data = bytes.subspan(at, length);
    looked_up_to(at + length);
    header.extensions.push_back({head.type, {data.begin(), data.end()}});
    at += std::min<std::size_t>(align_up<std::size_t>(length, 8), end - at);
  }
  return Error();
}

std::string Parser::feature_name(std::uint32_t number) const {
  if (const Extension* table = header.find(kExtensionFeatureNames)) {
    for (std::size_t at = 0; at + sizeof(FeatureName) <= table->data.size();
         at += sizeof(FeatureName)) {
      const auto entry = read_struct<FeatureName>(Bytes(table->data).subspan(at));
      if (entry.type != 0 || entry.number != number) continue;
      const std::string name(entry.name, strnlen(entry.name, sizeof entry.name));
      // The name comes from the image: only printable characters reach a message.
      const bool printable =
          std::all_of(name.begin(), name.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
      if (!name.empty() && printable) return name;
    }
  }
  for (const Feature& feature : kFeatures) {
    if (feature.type == 0 && feature.number == number) return feature.name;
  }
  if (number == kSealedBit) return kSealedFeatureName;
  return "unknown feature";
}

Error Parser::features(bool allow_sealed) const {
  std::uint64_t refused = header.incompatible & ~kKnownIncompatible;
  if (header.sealed() && !allow_sealed) refused |= bit(kSealedBit);
  if (refused != 0) {
    std::string names;
    for (std::uint32_t number = 0; number < 64; ++number) {
      if ((refused & bit(number)) == 0) continue;
      if (!names.empty()) names += ", ";
      names += feature_name(number) + " (incompatible bit " + text(number) + ")";
    }
    return Error(Kind::unsupported, "the image needs features this opener does not have: " + names);
  }
  const bool has_extension = header.find(kExtensionSealed) != nullptr;
  if (header.sealed()) {
    if (!has_extension || header.extensions.front().type != kExtensionSealed) {
      return corrupt("a sealed image whose first extension is not its own");
    }
    const std::size_t end =
        header_length + sizeof(ExtensionHead) + header.extensions[0].data.size();
    if (end > kAtomicHeaderBytes) return corrupt("the sealed extension leaves the first 512 bytes");
  }
  if ((header.autoclear & bit(kBitmapsBit)) != 0) {
    const Extension* bitmaps = header.find(kExtensionBitmaps);
    if (bitmaps == nullptr || bitmaps->data.size() != sizeof(BitmapsExtension)) {
      return corrupt("the bitmaps bit is set without its extension");
    }
  }
  return Error();
}

}  // namespace

const Extension* Header::find(std::uint32_t type) const {
  for (const Extension& extension : extensions) {
    if (extension.type == type) return &extension;
  }
  return nullptr;
}

std::string Header::backing_format() const {
  const Extension* extension = find(kExtensionBackingFormat);
  if (extension == nullptr) return {};
  return {extension->data.begin(), extension->data.end()};
}

void Header::set_extension(std::uint32_t type, std::vector<std::uint8_t> data) {
  assert(type != kExtensionEnd);
  const auto found = std::find_if(extensions.begin(), extensions.end(),
                                  [type](const Extension& e) { return e.type == type; });
  if (data.empty()) {
    if (found != extensions.end()) extensions.erase(found);
    return;
  }
  if (found != extensions.end()) {
    found->data = std::move(data);
  } else if (type == kExtensionSealed) {
    extensions.insert(extensions.begin(), Extension{type, std::move(data)});
  } else {
    extensions.push_back(Extension{type, std::move(data)});
  }
}

void Header::set_backing_format(const std::string& format) {
  set_extension(kExtensionBackingFormat, {format.begin(), format.end()});
}

void Header::set_feature_names() {
  std::vector<std::uint8_t> table;
  const auto add = [&table](std::uint8_t type, std::uint32_t number, const char* name) {
    FeatureName entry{};
    entry.type = type;
    entry.number = static_cast<std::uint8_t>(number);
    std::memcpy(entry.name, name, std::min(std::strlen(name), sizeof entry.name));
    append(table, entry);
  };
  if (sealed()) add(0, kSealedBit, kSealedFeatureName);
  for (const Feature& feature : kFeatures) add(feature.type, feature.number, feature.name);
  set_extension(kExtensionFeatureNames, std::move(table));
}

HeaderV3 Header::fixed() const {
  HeaderV3 head{};
  head.v2.magic = kMagic;
  head.v2.version = version;
  head.v2.cluster_bits = layout.cluster_bits;
  head.v2.size = size;
  head.v2.l1_size = l1_size;
  head.v2.l1_table_offset = l1_offset.bytes;
  head.v2.refcount_table_offset = refcount_table_offset.bytes;
  head.v2.refcount_table_clusters = refcount_table_clusters;
  head.v2.nb_snapshots = snapshot_count;
  head.v2.snapshots_offset = snapshots_offset.bytes;
  head.incompatible_features = incompatible;
  head.compatible_features = compatible;
  head.autoclear_features = autoclear;
  head.refcount_order = layout.refcount_order;
  head.header_length = kHeaderLengthV3 + static_cast<std::uint32_t>(extra_fields.size());
  head.compression_type = static_cast<std::uint8_t>(compression);
  return head;
}

void Header::patch(std::span<std::uint8_t> first_bytes) const {
  HeaderV3 head = fixed();
  HeaderV2 stored;
  std::memcpy(&stored, first_bytes.data(), sizeof stored);
  head.v2.backing_file_offset = stored.backing_file_offset;
  head.v2.backing_file_size = stored.backing_file_size;
  const std::uint32_t length = version == 2 ? kHeaderLengthV2 : header_length;
  head.header_length = length;
  std::memcpy(first_bytes.data(), &head, std::min<std::size_t>(length, sizeof head));
  if (!extensions.empty() && extensions[0].type == kExtensionSealed) {
    const std::vector<std::uint8_t>& data = extensions[0].data;
    const std::size_t at = length + sizeof(ExtensionHead);
    assert(at + data.size() <= first_bytes.size());
    assert(read_struct<ExtensionHead>(first_bytes.subspan(length)).length == data.size());
    std::memcpy(first_bytes.data() + at, data.data(), data.size());
  }
}

Result<std::vector<std::uint8_t>> Header::serialise() const {
  const std::size_t cluster = static_cast<std::size_t>(layout.cluster_size());
  std::vector<std::uint8_t> out;
  out.reserve(cluster);
  const HeaderV3 head = fixed();
  if (version == 2) {
    append(out, head.v2);
  } else {
    append(out, head);
    out.insert(out.end(), extra_fields.begin(), extra_fields.end());
  }
  for (const Extension& extension : extensions) {
    append(out, ExtensionHead{extension.type, static_cast<std::uint32_t>(extension.data.size())});
    out.insert(out.end(), extension.data.begin(), extension.data.end());
    out.resize(align_up<std::size_t>(out.size(), 8));
    if (extension.type == kExtensionSealed && out.size() > kAtomicHeaderBytes) {
      return Error(Kind::invalid_argument, "the sealed extension leaves the first 512 bytes");
    }
  }
  // When the extensions fill the cluster to its last byte, no end marker fits and none is needed.
  if (out.size() + sizeof(ExtensionHead) <= cluster) append(out, ExtensionHead{kExtensionEnd, 0});
  if (backing_name) {
    // A name keeps its place where it can: rewriting the header then never tears it.
    const std::size_t at =
        backing_offset >= out.size() ? static_cast<std::size_t>(backing_offset) : out.size();
    out.resize(at);
    out.insert(out.end(), backing_name->begin(), backing_name->end());
    if (out.size() <= cluster) {
      HeaderV2 v2;
      std::memcpy(&v2, out.data(), sizeof v2);
      v2.backing_file_offset = at;
      v2.backing_file_size = static_cast<std::uint32_t>(backing_name->size());
      std::memcpy(out.data(), &v2, sizeof v2);
    }
  }
  if (out.size() > cluster) {
    return Error(Kind::invalid_argument, "the header needs " + text(out.size()) +
                                             " bytes and the cluster has " + text(cluster) +
                                             ": use larger clusters or a shorter backing name");
  }
  out.resize(cluster);
  return out;
}

Result<std::uint64_t> header_cluster_size(Bytes first_bytes) {
  if (first_bytes.size() < sizeof(Be32)) {
    return Error(Kind::invalid_argument, "not a qcow2 image: the file is too short");
  }
  if (read_struct<Be32>(first_bytes) != kMagic) {
    return Error(Kind::invalid_argument, "not a qcow2 image: no \"QFI\\xfb\" at its start");
  }
  if (first_bytes.size() < sizeof(HeaderV2)) return corrupt("truncated");
  const auto v2 = read_struct<HeaderV2>(first_bytes);
  if (v2.version != 2 && v2.version != 3) {
    return Error(Kind::unsupported, "qcow2 version " + text(v2.version) + " (2 and 3 are known)");
  }
  if (v2.cluster_bits < kClusterBitsMin || v2.cluster_bits > kClusterBitsMax) {
    return corrupt("cluster bits " + text(v2.cluster_bits) + " (expected 9 to 21)");
  }
  return std::uint64_t{1} << v2.cluster_bits;
}

Result<Header> parse_header(Bytes bytes, std::uint64_t file_size, bool allow_sealed) {
  Parser parser{bytes, file_size, {}, {}};
  // Features come before the tables: an unknown one may change what those fields mean.
  Error error = parser.fixed_fields();
  if (!error) error = parser.version3_fields();
  if (!error) error = parser.backing();
  if (!error) error = parser.parse_extensions();
  if (!error) error = parser.features(allow_sealed);
  if (!error) error = parser.tables();
  if (error) return error;
  return std::move(parser.header);
}

}  // namespace pqblk::format::qcow2
