// Fuzzes the pure parsers: header cluster, snapshot table, L2 entries, compressed data.

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "format/qcow2/compressed.h"
#include "format/qcow2/entry.h"
#include "format/qcow2/header.h"
#include "format/qcow2/snapshots.h"

using namespace pqblk;
using namespace pqblk::format::qcow2;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::uint8_t> bytes(data, size);
  for (const bool allow_sealed : {false, true}) {
    for (const std::uint64_t file_size : {std::uint64_t{size}, std::uint64_t{1} << 40}) {
      Result<Header> header = parse_header(bytes, file_size, allow_sealed);
      if (!header) continue;
      // What parses is written again, and then parses to the same bytes.
      Result<std::vector<std::uint8_t>> again = header->serialise();
      if (!again) continue;
      Result<Header> twice = parse_header(*again, file_size, allow_sealed);
      if (!twice) __builtin_trap();
      if (twice->size != header->size || twice->extensions.size() != header->extensions.size()) {
        __builtin_trap();
      }
      std::uint64_t used = 0;
      auto snapshots = parse_snapshots(bytes, *header, file_size, used);
      if (snapshots && used > size) __builtin_trap();
      for (std::size_t at = 0; at + 16 <= size; at += 16) {
        std::uint64_t words[2];
        std::memcpy(words, data + at, sizeof words);
        const L2Entry entry =
            decode_entry(header->layout, header->version, words[0], words[1], file_size);
        const bool has_host =
            entry.kind == EntryKind::data || entry.kind == EntryKind::zero_allocated;
        if (has_host && entry.host.bytes >= file_size) __builtin_trap();
      }
    }
  }
  std::vector<std::uint8_t> cluster(4096);
  for (const Compression type : {Compression::zlib, Compression::zstd}) {
    static_cast<void>(decompress(type, bytes, cluster).ok());
  }
  return 0;
}
