#include "image/header_backup.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "base/aligned.h"
#include "format/qcow2/header_pages.h"
#include "io/queue_thread.h"
#include "sealed/extension.h"
#include "sealed/key_area.h"
#include "sealed/log.h"
#include "sealed/sessions.h"
#include "storage/file.h"

namespace pqblk::image {
namespace {

using namespace sealed;  // NOLINT
namespace qcow2 = format::qcow2;

constexpr std::size_t kFeaturesByte = 79;  // of incompatible_features, with the corrupt bit
constexpr std::uint8_t kCorruptMask = 1u << qcow2::kCorruptBit;
constexpr std::uint8_t kDirtyMask = 1u << qcow2::kDirtyBit;

struct ParsedHeader {
  qcow2::Header header;
  Extension extension;
};

Result<ParsedHeader> sealed_header(Result<qcow2::Header> header) {
  if (!header) return header.take_error();
  const qcow2::Extension* raw = header->find(kExtensionType);
  if (!header->sealed() || raw == nullptr) {
    return Error(Kind::unsupported, "this qcow2 image is not sealed");
  }
  auto extension = parse_extension(raw->data, header->layout.cluster_size());
  if (!extension) return extension.take_error();
  return ParsedHeader{std::move(*header), *extension};
}

Result<ParsedHeader> parse(std::span<const std::uint8_t> bytes, std::uint64_t file_size) {
  return sealed_header(qcow2::parse_header(bytes, file_size, true));
}

Error verify(const ParsedHeader& parsed, const MacKeys& mac, std::span<const std::uint8_t> bytes) {
  return verify_header(mac, bytes.first<kHeaderMacBytes>(),
                       parsed.header.backing_name.value_or(""));
}

std::size_t used_bytes(std::span<const std::uint8_t> bytes) {
  std::size_t n = bytes.size();
  while (n > 0 && bytes[n - 1] == 0) --n;
  return n;
}

Task<Result<qcow2::HeaderPages>> read_start(io::Queue& io, const io::File& file) {
  if (file.size < kPage) co_return Error(Kind::unsupported, "the file is shorter than a header");
  co_return co_await qcow2::read_header_pages(io, file);
}

// The same for a header that may be gone: one whose own page the medium does not give out is. What
// lies behind that page is another thing: without it the header is there all the same.
Task<Result<qcow2::HeaderPages>> read_what_is_left(io::Queue& io, const io::File& file) {
  auto start = co_await read_start(io, file);
  if (!start && start.error().kind() == Kind::io_error) {
    co_return qcow2::HeaderPages{AlignedBuffer(kPage), {}, {}};
  }
  co_return std::move(start);
}

Task<Error> back_up(io::Queue& io, const io::File& file, HeaderBackup& out) {
  auto start = co_await read_start(io, file);
  if (!start) co_return start.take_error();
  const auto size = storage::size_now(file);  // after the read, see disk_info.cc
  if (!size) co_return size.error();
  auto parsed = sealed_header(qcow2::parse_header_pages(*start, *size, true));
  if (!parsed) co_return parsed.take_error();
  const Extension& x = parsed->extension;
  out.uuid = x.uuid;
  const auto cluster = start->bytes.span().first(
      std::min<std::size_t>(start->bytes.size(), parsed->header.layout.cluster_size()));
  out.header.assign(cluster.begin(),
                    cluster.begin() + static_cast<std::ptrdiff_t>(used_bytes(cluster)));
  AlignedBuffer table(x.session_table_length);
  for (const std::uint64_t place : x.session_table) {
    if (Error e = co_await io.read(file, place, table.data(), table.size())) {
      if (e.kind() != Kind::io_error) co_return e;
      continue;
    }
    if (std::memcmp(table.data(), kSessionMagic, 8) != 0) continue;
    out.sessions.assign(table.data(), table.data() + used_bytes(table.span()));
    co_return Error();
  }
  co_return Error(Kind::integrity, "both copies of the session table are damaged");
}

// The backup's header cluster with the zeros that the backup leaves out.
Result<AlignedBuffer> whole_cluster(const HeaderBackup& backup) {
  if (backup.header.size() < kHeaderMacBytes)
    return Error(Kind::corrupt, "no header in the backup");
  auto size = qcow2::header_cluster_size(backup.header);
  if (!size) return size.take_error();
  if (backup.header.size() > *size) return Error(Kind::corrupt, "more than a header in the backup");
  AlignedBuffer bytes(*size);
  std::copy(backup.header.begin(), backup.header.end(), bytes.data());
  return bytes;
}

// In the place of a header that nobody can read, marked corrupt.
Task<Error> write_header(io::Queue& io, const io::File& file, AlignedBuffer& cluster) {
  cluster.data()[kFeaturesByte] |= kCorruptMask;
  if (Error e = co_await io.write(file, 0, cluster.data(), cluster.size())) co_return e;
  co_return co_await io.fdatasync(file);
}

// The header that counts: the disk's own if its MAC holds and it is believed, else the backup's.
struct TrueHeader {
  ParsedHeader parsed;
  AlignedBuffer backup;    // the backup's, a whole cluster
  qcow2::HeaderPages own;  // what the medium does not give out of it is the backup's
  bool readable = false;
};

void fill_unreadable(qcow2::HeaderPages& pages, const AlignedBuffer& backup) {
  for (const std::uint64_t at : pages.unreadable) {
    if (at + kPage > backup.size()) break;
    std::memcpy(pages.bytes.data() + at, backup.data() + at, kPage);
  }
}

// Does the header on the disk say, with nothing to vouch for it, that it is of this volume?
bool claims(const qcow2::HeaderPages& pages, const Uuid& uuid) {
  const std::uint8_t* at = pages.bytes.data() + kExtensionAt + offsetof(ExtensionRaw, uuid);
  return std::equal(uuid.begin(), uuid.end(), at);
}

// Whether the name that the MAC covers reaches what cannot be read, as the header itself says.
bool name_unreadable(const qcow2::HeaderPages& pages) {
  qcow2::HeaderV2 raw;
  std::memcpy(&raw, pages.bytes.data(), sizeof raw);
  const std::uint64_t offset = raw.backing_file_offset;
  return !pages.unreadable.empty() && offset != 0 && offset < pages.bytes.size() &&
         offset + raw.backing_file_size > pages.unreadable.front();
}

Task<Result<TrueHeader>> true_header(io::Queue& io, const io::File& file,
                                     const HeaderBackup& backup, const MacKeys& mac) {
  auto start = co_await read_what_is_left(io, file);
  if (!start) co_return start.take_error();
  const auto size = storage::size_now(file);  // after the read, see disk_info.cc
  if (!size) co_return size.error();
  auto cluster = whole_cluster(backup);
  if (!cluster) co_return cluster.take_error();
  fill_unreadable(*start, *cluster);
  auto present = parse(start->bytes.span(), *size);
  // Without its MAC it says nothing, not even of which volume it is. One that is marked was put
  // back, and no check has believed it yet.
  const bool holds = present && !verify(*present, mac, start->bytes.span());
  if (holds && !present->header.has(qcow2::kCorruptBit)) {
    co_return TrueHeader{std::move(*present), std::move(*cluster), std::move(*start), true};
  }
  // The MAC covers a name that may lie where nobody can read: perhaps nothing else is amiss.
  if (!holds && name_unreadable(*start) && claims(*start, backup.uuid)) co_return start->why;
  auto chosen = parse(cluster->span(), *size);
  if (!chosen) co_return chosen.take_error();
  if (Error e = verify(*chosen, mac, cluster->span())) co_return e;
  co_return TrueHeader{std::move(*chosen), std::move(*cluster), std::move(*start), false};
}

// Behind a header that can be read: pages that cannot, from the backup.
Task<Error> write_unreadable(io::Queue& io, const io::File& file, TrueHeader& header) {
  if (header.own.unreadable.empty()) co_return Error();
  for (const std::uint64_t at : header.own.unreadable) {
    if (Error e = co_await io.write(file, at, header.own.bytes.data() + at, kPage)) co_return e;
  }
  co_return co_await io.fdatasync(file);
}

// The session table where the header has it: the proof that this file is the volume. Where nothing
// is left of it the log's own header is, which stays where it was made. `by_log` says so.
Task<Result<std::unique_ptr<Sessions>>> prove(io::Queue& io, const io::File& file,
                                              const TrueHeader& header, const HeaderBackup& backup,
                                              std::span<const std::uint8_t> sessions,
                                              VolumeKeys& keys, const MacKeys& mac, bool& by_log) {
  const Extension& x = header.parsed.extension;
  auto table = co_await Sessions::load_with(io, file, x, keys, mac, sessions, header.readable);
  if (table || header.readable || table.error().kind() != Kind::integrity) co_return table;
  if (auto log = co_await read_log_header(io, file, x, mac)) {
    by_log = true;
    co_return co_await Sessions::load_with(io, file, x, keys, mac, sessions, true);
  }
  auto start = co_await read_what_is_left(io, file);
  if (!start) co_return start.take_error();
  auto present = parse(start->bytes.span(), file.size);
  if (!present || present->extension.uuid == backup.uuid) {
    co_return Error(Kind::integrity, "neither session table nor log is where the header has it")
        .at("find volume");
  }
  co_return Error(Kind::wrong_key, "the backup is of another volume (UUID differs)");
}

Task<Error> look(io::Queue& io, const io::File& file, const HeaderBackup& backup, VolumeKeys& keys,
                 HeaderLook& out) {
  auto mac = derive_mac_keys(keys.integrity, backup.uuid);
  if (!mac) co_return mac.take_error();
  auto header = co_await true_header(io, file, backup, *mac);
  if (!header) co_return header.take_error();
  bool by_log = false;
  auto table = co_await prove(io, file, *header, backup, {}, keys, *mac, by_log);
  if (!table) co_return table.take_error();
  const Error newest = (*table)->require_newest();
  auto area = co_await read_key_area(io, file, header->parsed.extension);
  if (!area) co_return area.take_error();
  out = {header->readable, !newest.ok(), std::move(*area)};
  co_return Error();
}

Task<Error> restore(io::Queue& io, const io::File& file, const HeaderBackup& backup,
                    bool with_sessions, VolumeKeys& keys, HeaderRestored& out) {
  auto mac = derive_mac_keys(keys.integrity, backup.uuid);
  if (!mac) co_return mac.take_error();
  auto header = co_await true_header(io, file, backup, *mac);
  if (!header) co_return header.take_error();
  auto table =
      co_await prove(io, file, *header, backup, backup.sessions, keys, *mac, out.by_log_alone);
  if (!table) co_return table.take_error();
  if (!header->readable) {
    if (Error e = co_await write_header(io, file, header->backup)) co_return e;
    out.header = true;
  } else if (Error e = co_await write_unreadable(io, file, *header)) {
    co_return e;
  }
  out.sessions = (*table)->restored();
  out.sessions_lost = (*table)->damaged();
  if (with_sessions) co_return co_await (*table)->repair_copies(io, file);
  co_return Error();
}

// But for the marks, which a check may change itself.
bool is_same_header(std::span<const std::uint8_t> header, std::span<const std::uint8_t> page) {
  if (header.size() > page.size()) return false;
  for (std::size_t i = 0; i < header.size(); ++i) {
    const std::uint8_t changing = i == kFeaturesByte ? kCorruptMask | kDirtyMask : 0;
    if (((header[i] ^ page[i]) & ~changing) != 0) return false;
  }
  return true;
}

Task<Error> clear(io::Queue& io, const io::File& file, std::span<const std::uint8_t> checked) {
  AlignedBuffer page(kPage);
  if (Error e = co_await io.read(file, 0, page.data(), page.size())) co_return e;
  if (!is_same_header(checked, page.span())) {
    co_return Error(Kind::locked, "the header was replaced after it was checked");
  }
  page.data()[kFeaturesByte] &= static_cast<std::uint8_t>(~kCorruptMask);
  if (Error e = co_await io.write(file, 0, page.data(), page.size())) co_return e;
  co_return co_await io.fdatasync(file);
}

template <class Work>
Error with_file(const std::string& path, const storage::OpenOptions& how, Work work) {
  auto file = storage::open_file(path, how);
  if (!file) return file.take_error();
  auto thread = io::QueueThread::start(io::QueueOptions{});
  Error e;
  if (thread) {
    e = (*thread)->run_sync([&] { return work((*thread)->queue(), *file); });
    (*thread)->stop();
  } else {
    e = thread.take_error();
  }
  storage::close_file(*file);
  return e && e.path().empty() ? std::move(e).in(path) : std::move(e);
}

}  // namespace

Result<HeaderBackup> read_header_backup(const std::string& path) {
  storage::OpenOptions how;
  how.read_only = true;
  how.lock = storage::Lock::none;
  HeaderBackup backup;
  Error e = with_file(
      path, how, [&](io::Queue& io, const io::File& file) { return back_up(io, file, backup); });
  if (e) return e;
  return backup;
}

Result<HeaderLook> look_at_header(const std::string& path, const HeaderBackup& backup,
                                  VolumeKeys keys) {
  storage::OpenOptions how;
  how.read_only = true;
  how.lock = storage::Lock::none;
  HeaderLook found;
  Error e = with_file(path, how, [&](io::Queue& io, const io::File& file) {
    return look(io, file, backup, keys, found);
  });
  if (e) return e;
  return found;
}

Result<HeaderRestored> restore_header(const std::string& path, const HeaderBackup& backup,
                                      bool with_sessions, VolumeKeys keys) {
  HeaderRestored restored;
  Error e = with_file(path, {}, [&](io::Queue& io, const io::File& file) {
    return restore(io, file, backup, with_sessions, keys, restored);
  });
  if (e) return e;
  return restored;
}

Error clear_corrupt(const std::string& path, std::span<const std::uint8_t> checked) {
  return with_file(path, {},
                   [&](io::Queue& io, const io::File& file) { return clear(io, file, checked); });
}

}  // namespace pqblk::image
