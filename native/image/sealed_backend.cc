// Opening and closing a sealed image, sessions, flush, growth, extents. See sealed_backend.h.

#include "image/sealed_backend.h"

#include <algorithm>
#include <cassert>

#include "base/aligned.h"
#include "sealed/key_area.h"
#include "sealed/planted_faults.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT: this room joins that one
namespace qcow2 = format::qcow2;

namespace {
constexpr std::uint64_t kMaxTransfer = 1 * kMiB;
constexpr std::uint64_t kForever = ~std::uint64_t{0};
}  // namespace

SealedBackend::SealedBackend(QueueContext& service, const io::File& file, SealedOptions options)
    : service_(service),
      file_(file),
      options_(std::move(options)),
      pool_(options_.limits.pending_data),
      overlay_(geometry_) {}

SealedBackend::~SealedBackend() = default;

Task<Result<std::unique_ptr<SealedBackend>>> SealedBackend::open(QueueContext& service,
                                                                 const io::File& file,
                                                                 SealedOptions options) {
  std::unique_ptr<SealedBackend> backend(new SealedBackend(service, file, std::move(options)));
  if (Error e = co_await backend->load(service)) co_return std::move(e).in(file.path);
  co_return std::move(backend);
}

// The header's MAC comes first: nothing else in the image is believed before it holds.
Task<Error> SealedBackend::load_header(QueueContext& q) {
  qcow2::OpenOptions open{.read_only = options_.read_only,
                          .l2_cache_bytes = options_.limits.l2_cache,
                          .allow_sealed = true,
                          .for_check = true};  // the dirty bit is only a hint here
  auto meta = co_await qcow2::Metadata::open(q.io, file_, open);
  if (!meta) co_return meta.take_error();
  meta_ = std::move(*meta);
  const qcow2::Header& header = meta_->header();
  const qcow2::Extension* raw = header.find(kExtensionType);
  if (!header.sealed() || raw == nullptr) {
    co_return Error(Kind::unsupported,
                    "this qcow2 image is not sealed: expected the sealed feature "
                    "bit and its header extension");
  }
  const auto& bits = header.layout.cluster_bits;
  if (bits < kClusterBitsMin || bits > kClusterBitsMax) {
    co_return Error(Kind::unsupported, "cluster size of a sealed disk must be 4 KiB to 2 MiB");
  }
  if (header.has(qcow2::kExtendedL2Bit)) co_return Error(Kind::corrupt, "sealed with extended L2");
  auto extension = parse_extension(raw->data, std::uint64_t{1} << bits);
  if (!extension) co_return extension.take_error();
  extension_ = *extension;
  if (extension_.uuid != options_.expected_uuid) {
    co_return Error(Kind::wrong_key, "the keys belong to another volume (UUID differs)");
  }
  auto mac = derive_mac_keys(options_.keys.integrity, extension_.uuid);
  if (!mac) co_return mac.take_error();
  mac_ = std::move(*mac);
  if (Error e = verify_header(mac_, meta_->first_bytes().first<kHeaderMacBytes>(),
                              header.backing_name.value_or(""))) {
    co_return e;
  }
  if (header.has(qcow2::kCorruptBit) && !options_.read_only && !options_.for_check) {
    co_return Error(
        Kind::corrupt,
        "marked corrupt: its header was put back, and no check has believed it yet; run "
        "`pqblk header restore` again or `pqblk check --repair`, or open it read-only");
  }
  geometry_.cluster_bits = bits;
  geometry_.size = header.size;
  if (header.l1_size < geometry_.l1_entries()) co_return Error(Kind::corrupt, "L1 table too short");
  co_return Error();
}

// The lock keeps the key area as it is from here on. What it was when it was read is another thing:
// under a data key that it has lost meanwhile nothing may be written.
Task<Error> SealedBackend::require_key_area(QueueContext& q,
                                            const std::vector<std::uint8_t>& state) {
  auto area = co_await read_key_area(q.io, file_, extension_);
  if (!area) co_return area.take_error();
  if (state_of(*area) == state) co_return Error();
  co_return Error(Kind::locked,
                  "the key area was replaced after these keys were taken from it: take them anew");
}

Task<Error> SealedBackend::load_sessions(QueueContext& q) {
  const std::vector<std::uint8_t>& backup = options_.backup_sessions;
  if (backup.empty()) {
    auto own = co_await Sessions::load(q.io, file_, extension_, options_.keys, mac_);
    if (!own) co_return own.take_error();
    sessions_ = std::move(*own);
  } else {
    auto both =
        co_await Sessions::load_with(q.io, file_, extension_, options_.keys, mac_, backup, true);
    if (!both) co_return both.take_error();
    sessions_ = std::move(*both);
  }
  if (Error e = sessions_->require_newest()) co_return e;
  sessions_->go_on_in_newest();
  co_return Error();
}

Task<Error> SealedBackend::load(QueueContext& q) {
  if (Error e = co_await load_header(q)) co_return e;
  if (!options_.keys.key_area_state.empty()) {
    if (Error e = co_await require_key_area(q, options_.keys.key_area_state)) co_return e;
  }
  if (extension_.backing_policy == BackingPolicy::unauthenticated &&
      !options_.allow_unauthenticated_backing) {
    co_return Error(
        Kind::gate_refused,
        "the backing image is not authenticated: whoever can change it decides what the "
        "guest reads; allow it explicitly to go on");
  }
  if (extension_.backing_policy != BackingPolicy::none && !options_.backing &&
      !options_.for_check) {
    co_return Error(Kind::gate_refused, "the disk has a backing image that was not opened");
  }
  const std::string backing_name = meta_->header().backing_name.value_or("");
  meta_->seal_header = [this, backing_name](std::span<std::uint8_t> bytes) {
    sign_header(mac_, std::span<std::uint8_t, kHeaderMacBytes>(bytes.data(), kHeaderMacBytes),
                backing_name);
  };
  const std::uint64_t cs = geometry_.cluster_size();
  for (int i = 0; i < 2; ++i) {
    meta_->add_region({extension_.key_area[i]}, align_up(kKeyAreaCopyBytes, cs), "key area");
    meta_->add_region({extension_.session_table[i]},
                      align_up<std::uint64_t>(extension_.session_table_length, cs),
                      "session table");
  }
  meta_->add_region({extension_.log_offset}, align_up(extension_.log_length, cs), "log");
  meta_->allocator().use_reserve_mode();
  if (!options_.read_only) {
    if (Error e = co_await fill_log(q)) co_return e;
    // A killed opener's pages may be in the cache only: read nothing that is not on the medium.
    if (!planted(Fault::recovery_without_fdatasync)) {
      if (Error e = co_await q.io.fdatasync(file_)) co_return e;
    }
  }
  if (Error e = co_await load_sessions(q)) co_return e;
  entries_ = std::make_unique<EntryCache>(
      geometry_, file_, options_.limits.entry_cache,
      [this](io::Queue& io, Slot slot) { return home_mapping(io, slot); });
  log_ =
      std::make_unique<Log>(file_, extension_, mac_, overlay_, pool_, options_.limits.pending_data);
  log_->on_pressure = [this] { ask_checkpoint(); };
  meta_->io().sync_by = [this](io::Queue& io) { return log_->sync(io); };
  if (planted(Fault::reclaim_before_recovery)) {
    if (Error e = co_await reclaim(q)) co_return e;
  }
  if (Error e = co_await recover(q)) co_return e;
  if (Error e = co_await look_beyond_size(q)) co_return e;
  if (Error e = co_await reclaim(q)) co_return e;
  if (!options_.read_only) {
    spawn(checkpoint_loop());
    spawn(reserve_loop());
    if (options_.rest_ns != 0) spawn(rest_loop());
  }
  co_return Error();
}

// ---------------------------------------------------------------- sessions

Task<Error> SealedBackend::set_dirty(QueueContext& q, bool dirty) {
  qcow2::Header& header = meta_->header();
  if (header.has(qcow2::kDirtyBit) == dirty) co_return Error();
  header.incompatible ^= qcow2::bit(qcow2::kDirtyBit);
  if (Error e = co_await meta_->write_header_fields(q.io)) {
    header.incompatible ^= qcow2::bit(qcow2::kDirtyBit);  // so that a retry writes it
    co_return e;
  }
  co_return co_await log_->sync(q.io);
}

// New copies are durable before the header names them; the old ones are freed after that.
Task<Error> SealedBackend::grow_session_table(QueueContext& q) {
  const Extension old = extension_;
  const std::uint64_t cs = geometry_.cluster_size();
  const std::uint64_t length = std::uint64_t{old.session_table_length} * 2;
  if (length > kSessionTableMax) {
    co_return Error(Kind::unsupported, "the session table is full: copy the disk to a new one");
  }
  const std::uint64_t clusters = align_up(length, cs) / cs;
  std::uint64_t place[2];
  for (std::uint64_t& at : place) {
    auto run = co_await meta_->allocator().take(q.io, clusters, true);
    if (!run) co_return run.take_error();
    at = run->at.bytes;
    meta_->add_region(run->at, clusters * cs, "session table");
  }
  if (Error e = co_await sessions_->move_to(q.io, file_, place[0], place[1],
                                            static_cast<std::uint32_t>(length))) {
    log_->fail(e);  // the table's place in memory and in the header may differ from here on
    co_return e;
  }
  extension_.session_table[0] = place[0];
  extension_.session_table[1] = place[1];
  extension_.session_table_length = static_cast<std::uint32_t>(length);
  std::vector<std::uint8_t> payload(sizeof(ExtensionRaw));
  build_extension(extension_, std::span<std::uint8_t, sizeof(ExtensionRaw)>(payload.data(),
                                                                            sizeof(ExtensionRaw)));
  meta_->header().set_extension(kExtensionType, std::move(payload));
  Error named = co_await meta_->write_header_fields(q.io);
  if (!named) named = co_await log_->sync(q.io);
  if (named) {
    log_->fail(named);
    co_return named;
  }
  std::vector<HostOffset> freed;
  for (const std::uint64_t at : old.session_table) {
    meta_->remove_region({at});
    for (std::uint64_t i = 0; i < align_up<std::uint64_t>(old.session_table_length, cs); i += cs) {
      freed.push_back({at + i});
    }
  }
  co_return co_await meta_->allocator().free(q.io, freed);
}

// Precondition: session_lock_ is held, no writer is inside, the log is empty.
Task<Error> SealedBackend::begin_session(QueueContext& q) {
  if (Error e = co_await set_dirty(q, true)) co_return e;
  if (sessions_->full()) {
    if (Error e = co_await grow_session_table(q)) co_return e;
  }
  Result<const SessionKeys*> keys = co_await sessions_->begin(q.io, file_);
  if (!keys) {
    if (keys.error().kind() == Kind::io_error) log_->fail(keys.error());  // see Log::sync
    co_return keys.take_error();
  }
  if (Error e = co_await log_->begin_generation(q.io, *keys)) co_return e;
  next_lane_.store(0, std::memory_order_relaxed);
  session_.store((*keys)->id, std::memory_order_release);
  co_return Error();
}

Task<Error> SealedBackend::ensure_session(QueueContext& q) {
  if (session_.load(std::memory_order_acquire) != kNoSession) co_return Error();
  AsyncMutex::Guard lock = co_await session_lock_.lock();
  if (session_.load(std::memory_order_acquire) != kNoSession) co_return Error();
  co_return co_await begin_session(q);
}

// A session ends before its nonces do: writers leave, everything goes home, a new key begins.
Task<Error> SealedBackend::rotate_session(QueueContext& q) {
  AsyncMutex::Guard lock = co_await session_lock_.lock();
  const Lane& mine = lanes_[q.index];
  if (mine.session != session_.load(std::memory_order_relaxed) || mine.lane.has(1024)) {
    co_return Error();  // another queue has done it
  }
  co_return co_await replace_session(q);
}

// Precondition: session_lock_ is held.
Task<Error> SealedBackend::replace_session(QueueContext& q) {
  writers_.close();
  co_await writers_.drained();
  Error e = co_await checkpoint(q);
  if (!e) e = co_await begin_session(q);
  writers_.reopen();
  co_return e;
}

Error SealedBackend::lane_ready(QueueContext& q) {
  Lane& mine = lanes_[q.index];
  const std::uint32_t session = session_.load(std::memory_order_acquire);
  if (mine.session == session) return {};
  const std::uint32_t number = next_lane_.fetch_add(1, std::memory_order_relaxed);
  if (number > 0xffff) return Error(Kind::no_random, "this session has no nonce lane left");
  if (Error e = mine.lane.begin(static_cast<std::uint16_t>(number), options_.session_sectors_max)) {
    return e;
  }
  mine.session = session;
  return {};
}

// On ok the caller is inside writers_ (and leaves it), with nonces for `sectors` at hand.
Task<Error> SealedBackend::enter_writer(QueueContext& q, std::uint64_t sectors) {
  if (options_.read_only) co_return Error(Kind::read_only, "the disk is open read-only");
  if (Error e = require_no_data_beyond()) co_return e;
  for (;;) {
    if (log_->failed()) co_return log_->error();
    if (Error e = co_await ensure_session(q)) co_return e;
    if (!writers_.enter()) {
      co_await yield();
      continue;
    }
    Error e = lane_ready(q);
    if (!e && lane(q).claim(sectors)) co_return Error();
    writers_.leave();
    if (e) co_return e;
    if ((e = co_await rotate_session(q))) co_return e;
  }
}

std::uint32_t SealedBackend::session_id() const { return session_.load(std::memory_order_acquire); }

// ---------------------------------------------------------------- the rest of the interface

Geometry SealedBackend::geometry() const {
  return {.size = geometry_.size,
          .request_align = kSectorSize,
          .cluster_size = static_cast<std::uint32_t>(geometry_.cluster_size()),
          .max_transfer = kMaxTransfer};
}

Task<Error> SealedBackend::flush(QueueContext& q) {
  if (!log_->active()) co_return log_->error();
  co_return co_await log_->flush(q.io);
}

void SealedBackend::ask(Watermark& asked, const Watermark& ended) {
  if (asked.value() == ended.value()) asked.advance(ended.value() + 1);
}

Task<void> SealedBackend::checkpoint_loop() {
  while (!closing_.load(std::memory_order_acquire)) {
    co_await checkpoint_asked_.reach(checkpoint_ended_.value() + 1);
    if (closing_.load(std::memory_order_acquire)) break;
    Error e = co_await checkpoint(service_);
    if (e) log_->fail(e);
    checkpoint_ended_.advance(checkpoint_asked_.value());
    // Who asked while this one ran was not heard.
    if (!e && log_->pressed()) ask_checkpoint();
  }
  if (nap_ != nullptr) service_.io.cut_short(*nap_);
  checkpoint_ended_.advance(kForever);
}

// Clusters for writers to come, while those of now take what is left: a reservation costs a sync.
// Whoever finds none left asks himself, and meets the error that is passed over here.
Task<void> SealedBackend::reserve_loop() {
  while (!closing_.load(std::memory_order_acquire)) {
    co_await reserve_asked_.reach(reserve_ended_.value() + 1);
    if (closing_.load(std::memory_order_acquire)) break;
    Error e = co_await meta_->allocator().reserve_ahead(service_.io);
    static_cast<void>(e.ok());
    reserve_ended_.advance(reserve_asked_.value());
  }
  reserve_ended_.advance(kForever);
}

// What the log has begun is written; from then on rest_loop() looks when the writers leave off.
void SealedBackend::launch_log(QueueContext& q) {
  log_->launch(q.io);
  ask(rest_asked_, rest_ended_);
}

// Nobody has written for a while: what the log says goes home. Then reads take their shorter way,
// and a crash leaves nothing to fold. A disk that has gone to rest wakes nobody.
Task<void> SealedBackend::rest_loop() {
  while (!closing_.load(std::memory_order_acquire)) {
    co_await rest_asked_.reach(rest_ended_.value() + 1);
    std::uint64_t seen = 0;
    do {
      if (closing_.load(std::memory_order_acquire)) break;
      seen = log_->last_sequence();
      io::Queue::Sleep nap = service_.io.sleep(options_.rest_ns);
      nap_ = &nap;
      co_await nap;
      nap_ = nullptr;
    } while (log_->last_sequence() != seen);
    rest_ended_.advance(rest_asked_.value());
    if (closing_.load(std::memory_order_acquire)) break;
    if (log_->last_sequence() != seen) ask(rest_asked_, rest_ended_);  // who was not heard
    if (overlay_.empty()) continue;
    co_await checkpoint_ended_.reach(checkpoint_asked_.value());  // one that runs knows less
    ask_checkpoint();
  }
  rest_ended_.advance(kForever);
}

Task<Error> SealedBackend::close(QueueContext& q) {
  if (closed_) co_return Error();
  closed_ = true;
  Error result;
  if (!options_.read_only) {
    closing_.store(true, std::memory_order_release);
    checkpoint_asked_.advance(kForever - 1);
    reserve_asked_.advance(kForever - 1);
    rest_asked_.advance(kForever - 1);
    co_await checkpoint_ended_.reach(kForever);
    co_await reserve_ended_.reach(kForever);
    if (options_.rest_ns != 0) co_await rest_ended_.reach(kForever);
    if (session_id() != kNoSession || meta_->header().has(qcow2::kDirtyBit)) {
      if (!log_->failed()) result = co_await checkpoint(q);
      if (!result) result = log_->error();
      if (!result) result = co_await meta_->allocator().release_pool(q.io);
      if (!result) result = co_await log_->sync(q.io);
      if (!result) result = co_await set_dirty(q, false);
    }
  }
  if (options_.backing) {
    Error e = co_await options_.backing->close(q);
    if (!result) result = std::move(e);
  }
  co_return result;
}

// Quiesced by the disk. The header's size and L1 change under the MAC; nothing else moves.
Task<Error> SealedBackend::resize(QueueContext& q, std::uint64_t new_size) {
  if (options_.read_only) co_return Error(Kind::read_only, "the disk is open read-only");
  if (new_size < geometry_.size) {
    co_return Error(Kind::unsupported, "a disk can only grow: asked for " +
                                           std::to_string(new_size) + " bytes, it has " +
                                           std::to_string(geometry_.size));
  }
  if (new_size < beyond_end_) co_return beyond_error(beyond_end_);
  if (new_size % kVirtioSectorSize != 0) {
    co_return Error(Kind::invalid_argument, "the size must be a multiple of 512 bytes");
  }
  if (Error e = co_await ensure_session(q)) co_return e;
  if (Error e = co_await checkpoint(q)) co_return e;
  SealedGeometry grown = geometry_;
  grown.size = new_size;
  const std::uint64_t slots = grown.l1_entries() * grown.table_entries();
  if (Error e = co_await meta_->grow(q.io, new_size, slots)) {
    // Before the header is written nothing has changed; from then on memory and medium may
    // disagree.
    if (!meta_->writable() || meta_->header().size != geometry_.size) log_->fail(e);
    co_return e;
  }
  geometry_.size = new_size;
  beyond_end_ = 0;
  co_return Error();
}

Task<Result<Extent>> SealedBackend::extent(QueueContext& q, GuestOffset at, std::uint64_t length) {
  constexpr std::uint32_t kLook = 256;
  const std::uint64_t first = at.bytes >> kSectorShift;
  const std::uint64_t end = div_ceil<std::uint64_t>(at.bytes + length, kSectorSize);
  std::vector<Resolved> r(kLook);
  std::optional<ExtentKind> kind;
  std::uint64_t s = first;
  while (s < end) {
    const auto n = static_cast<std::uint32_t>(std::min<std::uint64_t>(kLook, end - s));
    if (Error e = co_await resolve(q.io, {s}, n, r.data())) co_return e;
    std::uint32_t i = 0;
    for (; i < n; ++i) {
      const State state = r[i].version.entry.state();
      ExtentKind k = state == State::data ? ExtentKind::data : ExtentKind::hole;
      if (state == State::never && options_.backing) k = ExtentKind::data;
      if (state == State::zero && options_.backing) k = ExtentKind::zero;
      if (!kind) kind = k;
      if (k != *kind) break;
    }
    s += i;
    if (i < n || s - first >= 64 * kMiB / kSectorSize) break;
    co_await yield();  // a long look at memory holds up nobody
  }
  const std::uint64_t bytes = std::min(length, (s << kSectorShift) - at.bytes);
  co_return Extent{bytes, kind.value_or(ExtentKind::hole)};
}

BackendFacts SealedBackend::facts() const {
  constexpr std::size_t kIdBytes = 10;  // 20 hexadecimal digits, as much as a virtio serial holds
  BackendFacts facts;
  facts.suite = crypto::suite_name(extension_.suite);
  facts.aead = crypto::aead_implementation(extension_.suite);
  facts.session_id = session_id();
  constexpr char kDigits[] = "0123456789abcdef";
  for (std::size_t i = 0; i < kIdBytes; ++i) {
    facts.id += kDigits[extension_.uuid[i] >> 4];
    facts.id += kDigits[extension_.uuid[i] & 15];
  }
  return facts;
}

BackendStats SealedBackend::stats() const {
  BackendStats s;
  s.metadata_reads = meta_->io().reads();
  s.metadata_writes = meta_->io().writes();
  s.l2_hits = meta_->tables().cache_hits();
  s.l2_misses = meta_->tables().cache_misses();
  s.entry_hits = entries_->hits();
  s.entry_misses = entries_->misses();
  s.log_bytes = log_->bytes_written();
  s.log_capacity = log_->ring_pages() * kPage;
  s.log_used = log_->used_pages() * kPage;
  s.checkpoints = checkpoints_.load(std::memory_order_relaxed);
  s.integrity_failures = integrity_failures_.load(std::memory_order_relaxed);
  s.sectors_sealed = sum_of(sealed_counts_);
  s.sectors_opened = sum_of(opened_counts_);
  return s;
}

}  // namespace pqblk::image
