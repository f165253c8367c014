#include "sealed/log_scan.h"

#include <algorithm>
#include <map>

#include "crypto/kdf.h"

namespace pqblk::sealed {
namespace {

Error bad(const char* what) { return Error(Kind::corrupt, std::string("log block: ") + what); }

template <class T>
T load(const std::uint8_t* at) {
  T raw;
  std::memcpy(&raw, at, sizeof raw);
  return raw;
}

bool slot_in_disk(const SealedGeometry& g, Slot slot) {
  return slot.value / g.table_entries() < g.l1_entries();
}

// One record; returns its size, or 0 when it is malformed.
std::size_t parse_record(std::span<const std::uint8_t> bytes, std::uint32_t payload_pages,
                         const SealedGeometry& g, LogRecord& out) {
  if (bytes.size() < 8) return 0;
  switch (static_cast<RecordType>(bytes[0])) {
    case RecordType::w:
    case RecordType::wd: {
      if (bytes.size() < sizeof(RecordW)) return 0;
      const auto raw = load<RecordW>(bytes.data());
      const bool inline_data = static_cast<RecordType>(raw.type) == RecordType::wd;
      out.type = static_cast<RecordType>(raw.type);
      out.sector = {raw.sector};
      out.entry = raw.entry;
      out.place = raw.payload;
      const bool ok = out.sector.value < g.sectors() && raw.entry.state() == State::data &&
                      raw.entry.is_valid() &&
                      (inline_data ? raw.payload < payload_pages : raw.payload == 0);
      return ok ? sizeof raw : 0;
    }
    case RecordType::z: {
      if (bytes.size() < sizeof(RecordZ)) return 0;
      const auto raw = load<RecordZ>(bytes.data());
      out.type = RecordType::z;
      out.sector = {raw.first};
      out.count = raw.count;
      out.entry = Entry::zero();
      const bool ok =
          raw.count != 0 && raw.first < g.sectors() && raw.count <= g.sectors() - raw.first;
      return ok ? sizeof raw : 0;
    }
    case RecordType::map: {
      if (bytes.size() < sizeof(RecordMap)) return 0;
      const auto raw = load<RecordMap>(bytes.data());
      out.type = RecordType::map;
      out.slot = {raw.slot};
      out.new_entry = raw.new_entry;
      out.old_entry = raw.old_entry;
      const bool entry_kind = static_cast<MapKind>(raw.kind) == MapKind::entry;
      const bool names_nothing = l2_host(raw.new_entry) == 0 && (raw.new_entry & kL2Zero) == 0;
      const bool ok = slot_in_disk(g, out.slot) && raw.kind <= 1 &&
                      !(entry_kind && names_nothing) && entry_kind == g.is_entry_slot(out.slot) &&
                      l2_host(raw.new_entry) % g.cluster_size() == 0 &&
                      l2_host(raw.old_entry) % g.cluster_size() == 0;
      return ok ? sizeof raw : 0;
    }
  }
  return 0;
}

}  // namespace

Result<BlockView> parse_block(std::span<const std::uint8_t> pages, std::uint64_t pages_to_end,
                              const SealedGeometry& geometry) {
  if (pages.size() < kPage) return bad("shorter than a page");
  BlockView view;
  view.raw = load<LogBlockRaw>(pages.data());
  const LogBlockRaw& raw = view.raw;
  if (std::memcmp(raw.magic, kBlockMagic, 4) != 0) return bad("no magic");
  const bool skip = raw.flags == kBlockSkip;
  if (raw.flags != 0 && !skip) return bad("unknown flags");
  view.header_pages = raw.header_pages;
  if (view.header_pages == 0 || view.header_pages > kBlockHeaderPagesMax)
    return bad("header pages");
  if (pages.size() < view.header_pages * kPage) return bad("cut short");
  if (raw.record_bytes > view.header_pages * kPage - sizeof raw) return bad("record bytes");
  if (!skip && raw.payload_pages > kBlockPayloadPagesMax) return bad("payload pages");
  if (skip && (raw.record_count != 0 || raw.record_bytes != 0)) return bad("skip with records");
  const std::uint64_t total = std::uint64_t{view.header_pages} + raw.payload_pages;
  if (total > pages_to_end || (skip && total != pages_to_end)) return bad("length");
  view.total_pages = static_cast<std::uint32_t>(total);
  view.payload_pages = skip ? 0 : raw.payload_pages.get();
  auto records = pages.subspan(sizeof raw, raw.record_bytes);
  for (std::uint32_t i = 0; i < raw.record_count; ++i) {
    LogRecord record;
    const std::size_t size = parse_record(records, view.payload_pages, geometry, record);
    if (size == 0) return bad("malformed record");
    record.sequence = raw.sequence;
    view.records.push_back(record);
    records = records.subspan(size);
  }
  if (!records.empty()) return bad("bytes after the last record");
  return view;
}

SectorAad::SectorAad(const Uuid& uuid, Sector s, std::uint32_t session, State state) {
  std::memcpy(bytes, uuid.data(), 16);
  const Be64 sector = s.value;
  std::memcpy(bytes + 16, &sector, 8);
  const Be32 id = session;
  std::memcpy(bytes + 24, &id, 4);
  bytes[28] = static_cast<std::uint8_t>(state);
  bytes[29] = bytes[30] = bytes[31] = 0;
  const Be32 version = kFormatVersion;
  std::memcpy(bytes + 32, &version, 4);
}

Error open_sector(Sessions& sessions, const Uuid& uuid, Sector s, const Entry& entry,
                  const std::uint8_t* ciphertext, std::uint8_t* plain, KeyLease& keys) {
  if (Error e = sessions.find(entry.session(), keys)) {
    if (e.kind() != Kind::wrong_key) return e;
    return Error(Kind::integrity, e.message());
  }
  crypto::Nonce nonce;
  crypto::Tag tag;
  std::copy(std::begin(entry.nonce), std::end(entry.nonce), nonce.begin());
  std::copy(std::begin(entry.tag), std::end(entry.tag), tag.begin());
  const SectorAad aad(uuid, s, entry.session(), State::data);
  if (keys->sector.open(nonce, aad.span(), ciphertext, plain, kSectorSize, tag)) return {};
  return Error(Kind::integrity, "the tag of a sector does not hold");
}

Result<bool> sector_opens(Sessions& sessions, const Uuid& uuid, Sector s, const Entry& entry,
                          const std::uint8_t* ciphertext, std::uint8_t* scratch, KeyLease& keys) {
  Error e = open_sector(sessions, uuid, s, entry, ciphertext, scratch, keys);
  crypto::wipe(scratch, kSectorSize);
  if (e && e.kind() != Kind::integrity) return e;
  return e.ok();
}

namespace {

// A window over the ring, so that small blocks do not cost a read each.
class RingReader {
 public:
  RingReader(io::Queue& io, const io::File& file, const Extension& extension)
      : io_(io),
        file_(file),
        ring_at_(extension.log_offset + kLogHeadBytes),
        ring_pages_((extension.log_length - kLogHeadBytes) / kPage),
        window_(kWindowPages * kPage) {}

  std::uint64_t pages() const { return ring_pages_; }
  // `count` pages from `page`; they do not cross the ring's end.
  Task<Result<const std::uint8_t*>> get(std::uint64_t page, std::uint64_t count) {
    if (page < first_ || page + count > first_ + held_) {
      held_ = 0;
      const std::uint64_t n = std::min(kWindowPages, ring_pages_ - page);
      if (Error e = co_await io_.read(file_, ring_at_ + page * kPage, window_.data(), n * kPage)) {
        co_return e;
      }
      first_ = page;
      held_ = n;
    }
    co_return static_cast<const std::uint8_t*>(window_.data() + (page - first_) * kPage);
  }
  std::uint64_t host(std::uint64_t page) const { return ring_at_ + page * kPage; }

 private:
  static constexpr std::uint64_t kWindowPages = 512;
  io::Queue& io_;
  const io::File& file_;
  const std::uint64_t ring_at_;
  const std::uint64_t ring_pages_;
  AlignedBuffer window_;
  std::uint64_t first_ = 0, held_ = 0;
};

struct Expected {
  std::uint64_t sequence;
  std::array<std::uint8_t, 16> previous_mac;
};

bool mac_holds(const BlockView& view, const std::uint8_t* pages, const SessionKeys& session) {
  const LogBlockRaw& raw = view.raw;
  if (raw.covered >= raw.sequence) return false;
  std::vector<std::uint8_t> message(pages, pages + sizeof raw + raw.record_bytes);
  std::fill_n(message.begin() + offsetof(LogBlockRaw, mac), 16, std::uint8_t{0});
  crypto::Nonce nonce{};
  const Be64 sequence = raw.sequence.get();
  std::memcpy(nonce.data() + 4, &sequence, 8);
  crypto::Tag tag;
  std::copy(std::begin(raw.mac), std::end(raw.mac), tag.begin());
  return session.log->open(nonce, message, nullptr, nullptr, 0, tag);
}

bool authenticates(const BlockView& view, const std::uint8_t* pages, const LogHeader& header,
                   const Expected& expected, const SessionKeys& session) {
  const LogBlockRaw& raw = view.raw;
  if (raw.sequence != expected.sequence || raw.generation != header.generation ||
      raw.session != header.session || std::memcmp(raw.log_uuid, header.log_uuid.data(), 16) != 0 ||
      std::memcmp(raw.previous_mac, expected.previous_mac.data(), 16) != 0) {
    return false;
  }
  return mac_holds(view, pages, session);
}

}  // namespace

Task<Result<LogScan>> scan_log(io::Queue& io, const io::File& file, const Extension& extension,
                               const LogHeader& header, const SealedGeometry& geometry,
                               Sessions& sessions) {
  LogScan scan;
  scan.next = header.tail_sequence;
  if (header.session == 0) co_return std::move(scan);
  Result<std::unique_ptr<SessionKeys>> session = sessions.log_keys(header.session);
  if (!session) {
    if (session.error().kind() != Kind::wrong_key) co_return session.take_error();
    co_return Error(Kind::wrong_key,
                    "the log's session " + std::to_string(header.session) +
                        " is not in the session table, or its epoch's key is missing");
  }
  RingReader ring(io, file, extension);
  AlignedBuffer scratch(kSectorSize);
  Expected expected{header.tail_sequence, header.previous_mac};
  if (header.tail_page >= ring.pages()) co_return Error(Kind::corrupt, "log tail beyond the ring");
  std::uint64_t page = header.tail_page;
  std::uint64_t seen = 0;  // pages; the ring holds no more than once around
  while (seen < ring.pages()) {
    const std::uint64_t to_end = ring.pages() - page;
    Result<const std::uint8_t*> bytes =
        co_await ring.get(page, std::min<std::uint64_t>(to_end, kBlockHeaderPagesMax));
    if (!bytes) co_return bytes.take_error();
    const std::size_t have = std::min<std::uint64_t>(to_end, kBlockHeaderPagesMax) * kPage;
    Result<BlockView> view = parse_block({*bytes, have}, to_end, geometry);
    if (!view || !authenticates(*view, *bytes, header, expected, **session)) break;
    if (view->payload_pages != 0) {
      bytes = co_await ring.get(page, view->total_pages);
      if (!bytes) co_return bytes.take_error();
    }
    KeyLease keys;
    Result<bool> whole = true;
    for (LogRecord& r : view->records) {
      if (r.type != RecordType::wd) continue;
      const std::uint64_t index = view->header_pages + r.place;
      whole = sector_opens(sessions, extension.uuid, r.sector, r.entry, *bytes + index * kPage,
                           scratch.data(), keys);
      if (!whole || !*whole) break;
      r.place = ring.host(page + index);
    }
    if (!whole) co_return whole.take_error();
    if (!*whole) break;
    expected.sequence = view->raw.sequence + 1;
    scan.next = expected.sequence;
    std::copy(std::begin(view->raw.mac), std::end(view->raw.mac), expected.previous_mac.begin());
    scan.covered = std::max(scan.covered, view->raw.covered.get());
    ++scan.blocks;
    seen += view->total_pages;
    page = (page + view->total_pages) % ring.pages();
    scan.records.insert(scan.records.end(), view->records.begin(), view->records.end());
  }
  co_return std::move(scan);
}

namespace {

bool of_log(const LogBlockRaw& raw, const LogHeader& header) {
  return raw.generation == header.generation && raw.session == header.session &&
         std::memcmp(raw.log_uuid, header.log_uuid.data(), 16) == 0;
}

Ahead compare(const LogBlockRaw& raw, const LogHeader& header, const Sessions& sessions) {
  if (raw.generation > header.generation) {
    constexpr std::uint8_t none[16] = {};
    const bool first = std::memcmp(raw.previous_mac, none, sizeof none) == 0;
    // Nobody has written since, so that all of it is there, and none of it is past: whoever puts an
    // old header back beside this block gains nothing by it.
    const bool last_writer = raw.session == sessions.last_id();
    return first && last_writer && raw.generation == header.generation + 1 ? Ahead::begin
                                                                           : Ahead::lost;
  }
  // The very block that the header names may be torn; a later one has come over it.
  return of_log(raw, header) && raw.sequence > header.tail_sequence ? Ahead::round : Ahead::nothing;
}

}  // namespace

Task<Result<LogAhead>> look_ahead(io::Queue& io, const io::File& file, const Extension& extension,
                                  const LogHeader& header, const SealedGeometry& geometry,
                                  Sessions& sessions) {
  LogAhead out;
  AlignedBuffer pages(kBlockHeaderPagesMax * kPage);
  const std::uint64_t ring_at = extension.log_offset + kLogHeadBytes;
  if (Error e = co_await io.read(file, ring_at, pages.data(), pages.size())) co_return e;
  const std::uint64_t ring_pages = (extension.log_length - kLogHeadBytes) / kPage;
  Result<BlockView> view = parse_block(pages.span(), ring_pages, geometry);
  if (!view) co_return out;
  const LogBlockRaw& raw = view->raw;
  const Ahead what = compare(raw, header, sessions);
  if (what == Ahead::nothing) co_return out;
  Result<std::unique_ptr<SessionKeys>> session = sessions.log_keys(raw.session);
  if (!session) {
    if (session.error().kind() == Kind::wrong_key) co_return out;  // of no session that is left
    co_return session.take_error();
  }
  if (!mac_holds(*view, pages.data(), **session)) co_return out;
  out.what = what;
  out.begin.serial = header.serial;
  std::copy(std::begin(raw.log_uuid), std::end(raw.log_uuid), out.begin.log_uuid.begin());
  out.begin.generation = raw.generation;
  out.begin.session = raw.session;
  out.begin.tail_sequence = raw.sequence;
  co_return out;
}

Task<Result<bool>> shows_more(io::Queue& io, const io::File& file, const Extension& extension,
                              const LogHeader& header, std::uint64_t next,
                              const SealedGeometry& geometry, Sessions& sessions) {
  struct Seen {
    std::uint64_t lowest = ~std::uint64_t{0}, covered = 0;
  };
  std::map<std::uint64_t, Seen> newer;  // by generation
  RingReader ring(io, file, extension);
  for (std::uint64_t page = 0; page < ring.pages(); ++page) {
    const std::uint64_t to_end = ring.pages() - page;
    const std::uint64_t count = std::min<std::uint64_t>(to_end, kBlockHeaderPagesMax);
    Result<const std::uint8_t*> bytes = co_await ring.get(page, count);
    if (!bytes) co_return bytes.take_error();
    Result<BlockView> view = parse_block({*bytes, count * kPage}, to_end, geometry);
    if (!view) continue;
    const LogBlockRaw& raw = view->raw;
    const bool later = of_log(raw, header) && raw.covered >= next;
    if (!later && raw.generation <= header.generation) continue;
    Result<std::unique_ptr<SessionKeys>> session = sessions.log_keys(raw.session);
    if (!session && session.error().kind() == Kind::wrong_key) continue;  // of none that is left
    if (!session) co_return session.take_error();
    if (!mac_holds(*view, *bytes, **session)) continue;
    if (later) co_return true;
    Seen& seen = newer[raw.generation];
    seen.lowest = std::min(seen.lowest, raw.sequence.get());
    seen.covered = std::max(seen.covered, raw.covered.get());
  }
  // A sequence goes on from one generation of a process to the next, so what is covered counts only
  // from the first block on that is known to be of this one.
  co_return std::any_of(newer.begin(), newer.end(), [](const auto& generation) {
    return generation.second.covered >= generation.second.lowest;
  });
}

}  // namespace pqblk::sealed
