// Sealed reads: where the newest version of a sector is, fetch, authenticate, deliver.
// See sealed_backend.h.

#include <algorithm>

#include "base/task_group.h"
#include "image/op_group.h"
#include "image/sealed_backend.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT
namespace qcow2 = format::qcow2;

namespace {
// A mismatch is looked into again while the sector's version changes under the reader.
constexpr int kReadAttemptsMax = 64;

bool same_version(const Version& a, const Version& b) {
  return a.entry == b.entry && a.place == b.place &&
         static_cast<bool>(a.cipher) == static_cast<bool>(b.cipher);
}

constexpr std::size_t sectors(std::uint64_t n) { return n * kSectorSize; }

Error corrupt_mapping(Slot slot) {
  return Error(Kind::corrupt, "the L2 entry of slot " + std::to_string(slot.value) +
                                  " contradicts the specification");
}

// Raw entries a sealed image may have; compressed clusters are not among them.
bool acceptable(const qcow2::L2Entry& entry) {
  return entry.kind != qcow2::EntryKind::corrupt && entry.kind != qcow2::EntryKind::compressed;
}
}  // namespace

bool SealedBackend::mapping_now(Slot slot, std::uint64_t& raw) {
  SlotVersion version;
  if (overlay_.find_slot(slot, version)) {
    raw = version.entry;
    return true;
  }
  return home_mapping_now(slot, raw);
}

bool SealedBackend::home_mapping_now(Slot slot, std::uint64_t& raw) {
  qcow2::L2Entry entry;
  if (!meta_->tables().cached_entry(slot, entry) || !acceptable(entry)) return false;
  raw = entry.raw;
  return true;
}

// The same, and faster for a cluster that is simply there.
bool SealedBackend::mapping_now(const QueueContext& q, Slot slot, std::uint64_t& raw) {
  SlotVersion version;
  if (overlay_.find_slot(slot, version)) {
    raw = version.entry;
    return true;
  }
  return meta_->tables().plain_entry(slot, q.index, raw) || mapping_now(slot, raw);
}

Task<Result<std::uint64_t>> SealedBackend::home_mapping(io::Queue& io, Slot slot) {
  Result<qcow2::L2Entry> entry = co_await meta_->tables().entry(io, slot);
  if (!entry) co_return entry.take_error();
  if (!acceptable(*entry)) co_return corrupt_mapping(slot);
  co_return entry->raw;
}

Task<Result<std::uint64_t>> SealedBackend::mapping(io::Queue& io, Slot slot) {
  SlotVersion version;
  if (overlay_.find_slot(slot, version)) co_return version.entry;
  Result<std::uint64_t> home = co_await home_mapping(io, slot);
  // The overlay may have gained this slot while the table was loading.
  if (overlay_.find_slot(slot, version)) co_return version.entry;
  co_return home;
}

// All in memory: no suspension. The overlay is asked before the home entry, so that a checkpoint
// which ends in between has already put the same entry home.
bool SealedBackend::resolve_one_now(Sector s, Resolved& out) {
  if (!overlay_.find(s, out.version)) {
    out.version = Version{};
    const EntryPlace place = geometry_.entry_place(s);
    const std::uint32_t index = EntryCache::index_in_page(place.offset);
    if (!entries_->peek(entries_->page_at(place), index, 1, &out.version.entry)) return false;
  }
  if (!out.version.entry.is_valid()) return false;  // see resolve_run()
  out.host = out.version.place;
  if (out.version.cipher || out.host != 0 || out.version.entry.state() != State::data) return true;
  std::uint64_t raw = 0;
  if (!mapping_now(geometry_.data_slot(geometry_.cluster_of(s)), raw)) return false;
  if (l2_host(raw) != 0) out.host = l2_host(raw) + geometry_.offset_in_cluster(s);
  return true;
}

// How many pages from this one on are worth one read: those of the `wanted` sectors from `s` on, or
// of the entry cluster when a stream comes along: it has just used up what the last load brought.
std::uint64_t SealedBackend::pages_to_load(Sector s, std::uint32_t wanted) {
  const std::uint32_t index = EntryCache::index_in_page(geometry_.entry_offset(s));
  const std::uint64_t page = entries_->page_of(s);
  const bool stream = index == 0 && entries_->continues_run(page);
  return stream ? EntryCache::kRunMax : div_ceil<std::uint64_t>(index + wanted, kEntriesPerPage);
}

// `count` sectors of one data cluster whose entries lie in one page, the first of the `wanted` ones
// that will be looked up.
Task<Error> SealedBackend::resolve_run(io::Queue& io, Sector first, std::uint32_t count,
                                       std::uint32_t wanted, Resolved* out) {
  std::array<Version, kEntriesPerPage> versions;
  std::array<bool, kEntriesPerPage> found;
  std::array<Entry, kEntriesPerPage> home;
  const std::uint32_t in_overlay = overlay_.find_range(first, count, versions.data(), found.data());
  if (in_overlay < count) {
    const std::uint64_t page = entries_->page_of(first);
    const std::uint32_t index = EntryCache::index_in_page(geometry_.entry_offset(first));
    if (!entries_->peek(page, index, count, home.data())) {
      Result<EntryCache::Pin> pin = co_await entries_->pin(io, page, pages_to_load(first, wanted));
      if (!pin) co_return pin.take_error();
      // Look again: a version may have appeared, or gone home, while the page was loading.
      overlay_.find_range(first, count, versions.data(), found.data());
      pin->read(index, count, home.data());
    }
  }
  bool need_mapping = false;
  for (std::uint32_t i = 0; i < count; ++i) {
    Resolved& r = out[i];
    r.version = found[i] ? std::move(versions[i]) : Version{};
    if (!found[i]) r.version.entry = home[i];
    if (!r.version.entry.is_valid()) r.version.entry = Entry::malformed();
    r.host = r.version.place;
    need_mapping = need_mapping || (r.version.entry.state() == State::data && r.host == 0);
  }
  if (!need_mapping) co_return Error();
  Result<std::uint64_t> raw =
      co_await mapping(io, geometry_.data_slot(geometry_.cluster_of(first)));
  if (!raw) co_return raw.take_error();
  const std::uint64_t base = l2_host(*raw);
  for (std::uint32_t i = 0; i < count && base != 0; ++i) {
    if (out[i].host == 0) out[i].host = base + geometry_.offset_in_cluster({first.value + i});
  }
  co_return Error();
}

// How many sectors, at most `count`, are of the same data cluster and entry page as `s`.
std::uint32_t SealedBackend::run_from(Sector s, std::uint32_t count) const {
  const std::uint64_t cluster_end =
      (geometry_.cluster_of(s).value + 1) * geometry_.sectors_per_cluster();
  const std::uint64_t page_left =
      kEntriesPerPage - EntryCache::index_in_page(geometry_.entry_offset(s));
  return static_cast<std::uint32_t>(
      std::min({std::uint64_t{count}, cluster_end - s.value, page_left}));
}

Task<Error> SealedBackend::resolve(io::Queue& io, Sector first, std::uint32_t count,
                                   Resolved* out) {
  for (std::uint32_t i = 0; i < count;) {
    const Sector s{first.value + i};
    const std::uint32_t n = run_from(s, count - i);
    if (Error e = co_await resolve_run(io, s, n, count - i, out + i)) co_return e;
    i += n;
  }
  co_return Error();
}

Task<Error> SealedBackend::resolve_readable(io::Queue& io, Sector first, std::uint32_t count,
                                            Resolved* out,
                                            const std::function<void(Sector)>& unreadable) {
  for (std::uint32_t i = 0; i < count;) {
    const Sector s{first.value + i};
    const std::uint32_t n = run_from(s, count - i);
    const Error e = co_await resolve_run(io, s, n, count - i, out + i);
    if (e && e.kind() != Kind::io_error) co_return e;
    // The versions in memory need no page.
    for (std::uint32_t k = i; e && k < i + n; ++k) {
      if (resolve_one_now({first.value + k}, out[k])) continue;
      out[k] = Resolved{};
      unreadable({first.value + k});
    }
    i += n;
  }
  co_return Error();
}

// Fetches what is not in memory into the i-th sector of `to`; neighbours on the host go in one
// read.
Task<Error> SealedBackend::load_ciphertext(QueueContext& q, std::uint32_t count, const Resolved* r,
                                           GuestBuffers to) {
  struct Run {
    std::uint32_t from, to;
  };
  std::vector<Run> runs;
  for (std::uint32_t i = 0; i < count; ++i) {
    const bool load =
        r[i].version.entry.state() == State::data && !r[i].version.cipher && r[i].host != 0;
    if (!load) continue;
    const bool joins =
        !runs.empty() && runs.back().to == i && r[i].host == r[i - 1].host + kSectorSize;
    if (joins) {
      runs.back().to = i + 1;
    } else {
      runs.push_back({i, i + 1});
    }
  }
  if (runs.empty()) co_return Error();
  if (runs.size() == 1) {
    const Run run = runs[0];
    std::vector<iovec> pieces = to.part(sectors(run.from), sectors(run.to - run.from)).pieces();
    co_return co_await q.io.readv(file_, r[run.from].host, pieces);
  }
  OpGroup group(q.io);
  for (const Run& run : runs) {
    group.add(io::OpType::read, file_, r[run.from].host,
              to.part(sectors(run.from), sectors(run.to - run.from)).pieces());
  }
  co_return co_await group.run();
}

Task<Error> SealedBackend::load_ciphertext(QueueContext& q, std::uint32_t count, const Resolved* r,
                                           std::uint8_t* buffer) {
  const iovec all{buffer, sectors(count)};
  const GuestBuffers to{{&all, 1}, 0, all.iov_len};
  co_return co_await load_ciphertext(q, count, r, to);
}

// Plaintext of a data sector. `loaded` holds its ciphertext unless that is in memory elsewhere;
// `plain` may be the same place. Errors as those of sealed::open_sector.
Error SealedBackend::open_sector(const QueueContext& q, Sector s, const Resolved& r,
                                 const std::uint8_t* loaded, std::uint8_t* plain, KeyLease& keys) {
  if (r.host == 0 && !r.version.cipher) return Error(Kind::integrity, "a sector is nowhere");
  const std::uint8_t* from = r.version.cipher ? r.version.cipher.data() : loaded;
  opened_counts_[q.index].add();
  return sealed::open_sector(*sessions_, extension_.uuid, s, r.version.entry, from, plain, keys);
}

Task<Error> SealedBackend::mismatch(io::Queue& io, Sector s, const Resolved& r, bool& stale) {
  Resolved now;
  if (Error e = co_await resolve(io, s, 1, &now)) co_return e;
  stale = !same_version(now.version, r.version) || now.host != r.host;
  if (stale) co_return Error();
  integrity_failures_.fetch_add(1, std::memory_order_relaxed);
  co_return Error(Kind::integrity, "the tag of sector " + std::to_string(s.value) +
                                       " does not hold: its ciphertext or entry was changed")
      .at("read", s.value << kSectorShift);
}

// Decrypts and hands out sector by sector: what was just decrypted is still in the nearest cache,
// and so is the guest's memory when its ciphertext was there. No byte of plaintext is in the
// guest's memory before its tag holds. Of the first sector that does not open `bad` is the place.
Error SealedBackend::open_sectors(QueueContext& q, Sector first, std::uint32_t count,
                                  const Resolved* r, GuestBuffers loaded, GuestBuffers data,
                                  std::uint32_t& bad) {
  const QueueContext::Buffer near = q.buffer(kSectorSize);
  KeyLease keys;
  for (std::uint32_t i = 0; i < count; ++i) {
    const std::uint64_t length = std::min<std::uint64_t>(kSectorSize, data.size);
    if (r[i].version.entry.state() == State::data) {
      const std::uint8_t* from = loaded.contiguous(0, kSectorSize);
      if (Error e = open_sector(q, {first.value + i}, r[i], from, near.data(), keys)) {
        bad = i;
        return e;
      }
      data.part(0, length).copy_in(near.data());
    }
    data = data.part(length, data.size - length);
    loaded = loaded.part(kSectorSize, loaded.size - kSectorSize);
  }
  return {};
}

// Whether ciphertext can be loaded where the plaintext goes: large reads then pass through no other
// memory than a sector's. Whoever shares the guest's memory may change it meanwhile, see read_one;
// and guests may name a page twice in one request, for what they do not want. So a tag that does
// not hold there says nothing yet.
bool SealedBackend::takes_ciphertext(const GuestBuffers& data, std::uint32_t count) const {
  if (count == 1 || data.size != sectors(count)) return false;
  for (const iovec& piece : data.pieces()) {
    const auto address = reinterpret_cast<std::uintptr_t>(piece.iov_base);
    if (address % file_.memory_align != 0 || piece.iov_len % kSectorSize != 0) return false;
  }
  return true;
}

// Sectors without data: zeros, or what the backing image has.
Task<Error> SealedBackend::fill_unwritten(QueueContext& q, Sector first, std::uint32_t count,
                                          const Resolved* r, const GuestBuffers& data) {
  std::uint32_t i = 0;
  while (i < count) {
    const State state = r[i].version.entry.state();
    std::uint32_t end = i + 1;
    while (end < count && r[end].version.entry.state() == state) ++end;
    const std::uint64_t at = std::uint64_t{i} * kSectorSize;
    const std::uint64_t length = std::min<std::uint64_t>((end - i) * kSectorSize, data.size - at);
    if (state == State::never && options_.backing) {
      const GuestBuffers part = data.part(at, length);
      const std::uint64_t offset = (first.value + i) << kSectorShift;
      const std::uint64_t backing_size = options_.backing->geometry().size;
      const std::uint64_t inside =
          offset >= backing_size ? 0 : std::min(length, backing_size - offset);
      if (inside < length) part.part(inside, length - inside).zero();
      if (inside != 0) {
        if (Error e = co_await options_.backing->read(q, {offset}, part.part(0, inside)))
          co_return e;
      }
    } else if (state != State::data) {
      data.part(at, length).zero();
    }
    i = end;
  }
  co_return Error();
}

Task<Error> SealedBackend::try_read(QueueContext& q, Sector first, std::uint32_t count, Resolved* r,
                                    const GuestBuffers& data, Place& place, bool& stale) {
  stale = false;
  if (count != 1 || !resolve_one_now(first, r[0])) {
    if (Error e = co_await resolve(q.io, first, count, r)) co_return e;
  }
  QueueContext::Buffer own;
  iovec all{};
  GuestBuffers loaded = data;
  const bool guests = place == Place::guests && takes_ciphertext(data, count);
  if (!guests) {
    own = q.buffer(sectors(count));
    all = {own.data(), sectors(count)};
    loaded = {{&all, 1}, 0, all.iov_len};
  }
  if (Error e = co_await load_ciphertext(q, count, r, loaded)) co_return e;
  std::uint32_t bad = 0;
  if (Error e = open_sectors(q, first, count, r, loaded, data, bad)) {
    if (e.kind() != Kind::integrity) co_return e;
    if (!guests) co_return co_await mismatch(q.io, {first.value + bad}, r[bad], stale);
    place = Place::own;
    stale = true;
    co_return Error();
  }
  const bool all_data = std::all_of(
      r, r + count, [](const Resolved& x) { return x.version.entry.state() == State::data; });
  if (all_data) co_return Error();
  co_return co_await fill_unwritten(q, first, count, r, data);
}

// Where one whole sector's newest version is, with all that says so in memory: nearly every small
// read. An entry at home is taken only after the ciphertext has come, so that the CPU fetches both
// at once; the overlay gives entry and place together.
bool SealedBackend::find_newest(const QueueContext& q, Sector s, NewestPlace& newest) {
  newest.logged = overlay_.find(s, newest.version);
  if (newest.logged) {
    if (newest.version.entry.state() != State::data) return false;
    newest.host = newest.version.place;
    if (newest.version.cipher || newest.host != 0) return true;
  }
  const Slot slot = geometry_.data_slot(geometry_.cluster_of(s));
  std::uint64_t raw = 0;
  if (!mapping_now(q, slot, raw) || l2_host(raw) == 0) return false;
  newest.host = l2_host(raw) + geometry_.offset_in_cluster(s);
  if (newest.logged) return true;
  const EntryPlace entry = geometry_.entry_place(s);
  newest.page = entries_->page_at(entry);
  newest.index = EntryCache::index_in_page(entry.offset);
  return entries_->seek(newest.page, newest.index, newest.entry);
}

// False: not a data sector, or the entry is not that of this ciphertext. Where the overlay had
// nothing, the entry at home now is that version or a newer one. `plain` is private memory, perhaps
// that of the ciphertext.
bool SealedBackend::open_newest(const QueueContext& q, Sector s, NewestPlace& newest,
                                const std::uint8_t* ciphertext, std::uint8_t* plain,
                                const GuestBuffers& data) {
  Entry& entry = newest.version.entry;
  if (!newest.logged) {
    if (!entries_->peek(newest.page, newest.index, newest.entry, q.index, entry)) return false;
    if (entry.state() != State::data) return false;
  }
  KeyLease keys;
  if (open_sector(q, s, newest, ciphertext, plain, keys)) return false;
  data.copy_in(plain);
  return true;
}

Task<Error> SealedBackend::pin_page(io::Queue& io, Sector s, EntryCache::Pin& out) {
  Result<EntryCache::Pin> pin =
      co_await entries_->pin(io, entries_->page_of(s), pages_to_load(s, 1));
  if (!pin) co_return pin.take_error();
  out = std::move(*pin);
  co_return Error();
}

// find_newest() knows all but the entry. What it would be asked for then is fetched beside it, so
// that who reads where nobody has read before waits once. False: read_resolved() has to find out.
Task<bool> SealedBackend::read_beside_entry(QueueContext& q, Sector s, std::uint64_t host,
                                            GuestBuffers data) {
  const QueueContext::Buffer own = q.buffer(kSectorSize);
  EntryCache::Pin pin;  // until it was looked at
  TaskGroup both;
  both.start(pin_page(q.io, s, pin));
  both.start(
      [](io::Queue& io, const io::File& file, std::uint64_t at, std::uint8_t* to) -> Task<Error> {
        co_return co_await io.read(file, at, to, kSectorSize);
      }(q.io, file_, host, own.data()));
  const Error e = co_await both.join();
  if (e) co_return false;
  NewestPlace newest;
  co_return find_newest(q, s, newest) &&
      newest.host == host&& open_newest(q, s, newest, own.data(), own.data(), data);
}

// The page cache copies ciphertext into the guest's memory, the nearest place; a device gets memory
// that the ring knows. Whoever shares the guest's memory may change the ciphertext there before it
// is opened. They harm what they read themselves: plaintext comes from private memory, once its tag
// holds.
Task<Error> SealedBackend::read_one(QueueContext& q, Sector s, GuestBuffers data) {
  NewestPlace newest;
  if (find_newest(q, s, newest)) {
    QueueContext::Buffer own;
    const bool in_memory = static_cast<bool>(newest.version.cipher);
    const bool guests_first = !file_.direct && !in_memory;
    std::uint8_t* at = guests_first ? data.contiguous(0, kSectorSize) : nullptr;
    const bool guests = at != nullptr;
    if (!guests) at = (own = q.buffer(kSectorSize)).data();
    if (!in_memory) {
      if (Error e = co_await q.io.read(file_, newest.host, at, kSectorSize)) {
        data.zero();
        co_return e;
      }
    }
    if (guests) own = q.buffer(kSectorSize);
    if (open_newest(q, s, newest, at, own.data(), data)) co_return Error();
  } else if (newest.host != 0) {
    const bool delivered = co_await read_beside_entry(q, s, newest.host, data);
    if (delivered) co_return Error();
  }
  co_return co_await read_resolved(q, s, data);
}

Task<Error> SealedBackend::read(QueueContext& q, GuestOffset at, GuestBuffers data) {
  const Sector first{at.bytes >> kSectorShift};
  return data.size == kSectorSize ? read_one(q, first, data) : read_resolved(q, first, data);
}

Task<Error> SealedBackend::read_resolved(QueueContext& q, Sector first, GuestBuffers data) {
  const auto count = static_cast<std::uint32_t>(div_ceil<std::uint64_t>(data.size, kSectorSize));
  Resolved one;
  std::vector<Resolved> many;
  if (count > 1) many.resize(count);
  Resolved* r = count > 1 ? many.data() : &one;
  Place place = Place::guests;
  for (int attempt = 0; attempt < kReadAttemptsMax; ++attempt) {
    bool stale = false;
    if (Error e = co_await try_read(q, first, count, r, data, place, stale)) {
      data.zero();  // a read that fails hands out nothing
      co_return e;
    }
    if (!stale) co_return Error();
    co_await yield();
  }
  data.zero();
  co_return Error(Kind::io_error, "a sector changed faster than it could be read")
      .at("read", first.value << kSectorShift);
}

Task<Error> SealedBackend::load_readable(QueueContext& q, Sector first, std::uint32_t count,
                                         Resolved* r, std::uint8_t* buffer,
                                         const std::function<void(Sector)>& unreadable) {
  Error all = co_await load_ciphertext(q, count, r, buffer);
  if (all.kind() != Kind::io_error) co_return all;
  for (std::uint32_t i = 0; i < count; ++i) {
    Error one = co_await load_ciphertext(q, 1, &r[i], buffer + sectors(i));
    if (!one) continue;
    if (one.kind() != Kind::io_error) co_return one;
    unreadable({first.value + i});
    r[i] = Resolved{};
  }
  co_return Error();
}

Task<Result<std::uint64_t>> SealedBackend::verify(QueueContext& q, Sector first,
                                                  std::uint64_t count,
                                                  const std::function<void(Sector)>& bad,
                                                  const std::function<void(Sector)>& unreadable) {
  constexpr std::uint32_t kPiece = 256;
  std::uint64_t looked = 0;
  std::vector<Resolved> r(kPiece);
  QueueContext::Buffer buffer = q.buffer(std::size_t{kPiece} * kSectorSize);
  for (std::uint64_t s = first.value; s < first.value + count; s += kPiece) {
    const auto n =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(kPiece, first.value + count - s));
    if (Error e = co_await resolve_readable(q.io, {s}, n, r.data(), unreadable)) co_return e;
    if (Error e = co_await load_readable(q, {s}, n, r.data(), buffer.data(), unreadable)) {
      co_return e;
    }
    KeyLease keys;
    Error failed;
    for (std::uint32_t i = 0; i < n && !failed; ++i) {
      if (r[i].version.entry.state() != State::data) continue;
      ++looked;
      std::uint8_t* const place = buffer.data() + std::size_t{i} * kSectorSize;
      failed = open_sector(q, {s + i}, r[i], place, place, keys);
      if (failed.kind() != Kind::integrity) continue;
      bad({s + i});
      failed = Error();
    }
    crypto::wipe(buffer.data(), std::size_t{n} * kSectorSize);
    if (failed) co_return failed;
  }
  co_return looked;
}

}  // namespace pqblk::image
