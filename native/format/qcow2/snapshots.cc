#include "format/qcow2/snapshots.h"

#include <algorithm>
#include <cstring>

namespace pqblk::format::qcow2 {
namespace {

struct Cursor {
  std::span<const std::uint8_t> bytes;
  std::size_t at = 0;
  bool take(void* to, std::size_t n) {
    if (n > bytes.size() - at) return false;
    if (n != 0) std::memcpy(to, bytes.data() + at, n);
    at += n;
    return true;
  }
  bool skip(std::size_t n) {
    if (n > bytes.size() - at) return false;
    at += n;
    return true;
  }
};

Error damaged(std::uint32_t index, const std::string& what) {
  return Error(Kind::corrupt, "snapshot " + std::to_string(index) + ": " + what);
}

Error parse_one(Cursor& cursor, const Header& header, std::uint64_t file_size, std::uint32_t index,
                Snapshot& out) {
  SnapshotRecord record;
  if (!cursor.take(&record, sizeof record)) return damaged(index, "truncated entry");
  const std::uint32_t extra = record.extra_data_size;
  if (extra > kSnapshotExtraMax) return damaged(index, "too much extra data");
  if (header.version >= 3 && extra < 16) return damaged(index, "version 3 needs 16 extra bytes");
  Be64 words[2];
  const std::size_t known = std::min<std::size_t>(extra, sizeof words);
  out.vm_state_size = record.vm_state_size;
  if (!cursor.take(words, known) || !cursor.skip(extra - known)) {
    return damaged(index, "truncated extra data");
  }
  if (known >= 8) out.vm_state_size = words[0];
  if (known >= 16) out.disk_size = words[1];
  out.id.resize(record.id_size);
  out.name.resize(record.name_size);
  if (!cursor.take(out.id.data(), out.id.size()) ||
      !cursor.take(out.name.data(), out.name.size())) {
    return damaged(index, "truncated name");
  }
  // The padding of the last entry may lie beyond what was read.
  cursor.at = std::min(align_up<std::size_t>(cursor.at, 8), cursor.bytes.size());

  out.l1_offset = {record.l1_table_offset};
  out.l1_size = record.l1_size;
  out.date_sec = record.date_sec;
  const std::uint64_t l1_bytes = std::uint64_t{out.l1_size} * 8;
  const Layout& layout = header.layout;
  if (l1_bytes > kL1BytesMax) return damaged(index, "L1 table larger than 32 MiB");
  if (out.l1_size != 0 &&
      (!layout.cluster_aligned(out.l1_offset.bytes) || out.l1_offset.bytes == 0 ||
       out.l1_offset.bytes >= file_size || l1_bytes > file_size - out.l1_offset.bytes)) {
    return damaged(index, "its L1 table lies outside the file or off a cluster boundary");
  }
  return Error();
}

}  // namespace

Result<std::vector<Snapshot>> parse_snapshots(std::span<const std::uint8_t> bytes,
                                              const Header& header, std::uint64_t file_size,
                                              std::uint64_t& table_bytes) {
  Cursor cursor{bytes};
  std::vector<Snapshot> out;
  for (std::uint32_t i = 0; i < header.snapshot_count; ++i) {
    Error error = parse_one(cursor, header, file_size, i, out.emplace_back());
    if (error) return error;
  }
  table_bytes = cursor.at;
  return out;
}

Task<Result<std::vector<Snapshot>>> load_snapshots(io::Queue& q, MetaIo& meta, const Header& header,
                                                   std::uint64_t& table_bytes) {
  table_bytes = 0;
  if (header.snapshot_count == 0) co_return std::vector<Snapshot>();
  // The table's length is known only by parsing it: read what a table can take at most, in steps.
  const std::uint64_t file_size = meta.file().size;
  const std::uint64_t rest = file_size - header.snapshots_offset.bytes;
  const std::uint64_t most = std::min(rest, kSnapshotTableBytesMax);
  std::uint64_t length = std::min<std::uint64_t>(
      most, std::uint64_t{header.snapshot_count} * (sizeof(SnapshotRecord) + 64) + 4096);
  for (;;) {
    AlignedBuffer bytes(align_up<std::size_t>(static_cast<std::size_t>(length), meta.piece()));
    Error error = co_await meta.read(q, header.snapshots_offset, bytes.data(), bytes.size());
    if (error) co_return error;
    Result<std::vector<Snapshot>> parsed = parse_snapshots(
        bytes.span().first(static_cast<std::size_t>(length)), header, file_size, table_bytes);
    if (parsed || length == most) co_return parsed;
    length = std::min(most, length * 4);
  }
}

}  // namespace pqblk::format::qcow2
