// The key area, and moving to another epoch of the data key (docs/rotation.md). See
// sealed_backend.h.
//
// An entry names its session and a session its epoch, so re-encryption is ordinary writing: every
// sector of another epoch is read and written again, whole clusters to fresh places. There is no
// second mechanism, and nothing to recover beyond what every write recovers.

#include <algorithm>

#include "image/sealed_backend.h"
#include "sealed/planted_faults.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT

namespace {
constexpr std::uint64_t kEntrySlotsLooked = 4096;  // by one call of next_written
constexpr int kResealAttemptsMax = 64;
}  // namespace

struct SealedBackend::RekeyRun {
  Sector first;
  std::uint32_t count = 0;
};

struct SealedBackend::OldVersions {
  Sector first;
  const Resolved* r = nullptr;
  CipherRef cipher;                  // what was loaded of them; then the new ciphertext
  std::optional<std::uint32_t> bad;  // the one whose tag did not hold
};

Task<Error> SealedBackend::change_key_area(QueueContext& q, const KeyAreaChange& change) {
  if (options_.read_only) co_return Error(Kind::read_only, "the disk is open read-only");
  if (log_->failed()) co_return log_->error();
  AsyncMutex::Guard lock = co_await key_area_lock_.lock();
  Error e = co_await sealed::replace_key_area(q.io, file_, change);
  if (e.kind() == Kind::io_error) log_->fail(e);  // a sync of its own: see Log::sync
  co_return e;
}

// Between reading a key and asking for it any time may have passed: the key area may have lost it
// meanwhile, and hold another one of the same number.
Task<Error> SealedBackend::begin_epoch(QueueContext& q, DataKey key,
                                       const std::vector<std::uint8_t>& key_area_state) {
  if (options_.read_only) co_return Error(Kind::read_only, "the disk is open read-only");
  if (Error e = require_no_data_beyond()) co_return e;
  AsyncMutex::Guard unchanged = co_await key_area_lock_.lock();
  if (Error e = co_await require_key_area(q, key_area_state)) co_return e;
  AsyncMutex::Guard lock = co_await session_lock_.lock();
  if (Error e = sessions_->use_epoch(std::move(key))) co_return e;
  const std::uint32_t session = session_.load(std::memory_order_acquire);
  if (session == 0) co_return Error();  // the first writer begins one
  if (sessions_->epoch_of(session) == epoch()) co_return Error();
  co_return co_await replace_session(q);
}

Task<Result<std::uint64_t>> SealedBackend::next_written(QueueContext& q, std::uint64_t at,
                                                        std::uint64_t to) {
  const std::uint64_t end = div_ceil<std::uint64_t>(to, kSectorSize);
  std::uint64_t s = at >> kSectorShift;
  for (std::uint64_t looked = 0; s < end && looked < kEntrySlotsLooked; ++looked) {
    const Slot slot = geometry_.entry_slot({s});
    std::uint64_t raw = 0;
    if (!mapping_now(slot, raw)) {
      Result<std::uint64_t> got = co_await mapping(q.io, slot);
      if (!got) co_return got.take_error();
      raw = *got;
      if (looked % 256 == 255) co_await yield();  // a long look at memory holds up nobody
    }
    if (l2_host(raw) != 0) break;
    s = geometry_.end_sector_of_entry_slot(slot).value;
  }
  co_return std::min(s, end) << kSectorShift;
}

bool SealedBackend::of_other_epoch(const Entry& entry) {
  if (entry.state() != State::data) return false;
  return sessions_->epoch_of(entry.session()) != epoch();
}

// Clusters whose sectors all hold data go as a whole, so that write() relocates them: data is then
// written once. Of others only the sectors that need it.
std::vector<SealedBackend::RekeyRun> SealedBackend::runs_to_rekey(Sector first,
                                                                  const std::vector<Resolved>& r) {
  std::vector<RekeyRun> runs;
  const auto add = [&](std::size_t from, std::size_t to) {
    const Sector s{first.value + from};
    if (!runs.empty() && runs.back().first.value + runs.back().count == s.value) {
      runs.back().count += static_cast<std::uint32_t>(to - from);
    } else {
      runs.push_back({s, static_cast<std::uint32_t>(to - from)});
    }
  };
  for (std::size_t from = 0; from < r.size();) {
    const std::uint64_t cluster = geometry_.cluster_of({first.value + from}).value;
    const std::uint64_t cluster_begin = cluster * geometry_.sectors_per_cluster();
    const std::uint64_t cluster_end =
        std::min(cluster_begin + geometry_.sectors_per_cluster(), geometry_.sectors());
    const std::size_t to = std::min<std::size_t>(r.size(), cluster_end - first.value);
    const auto begin = r.begin() + static_cast<std::ptrdiff_t>(from);
    const auto end = r.begin() + static_cast<std::ptrdiff_t>(to);
    const bool any = std::any_of(
        begin, end, [this](const Resolved& x) { return of_other_epoch(x.version.entry); });
    const bool all_data = std::all_of(
        begin, end, [](const Resolved& x) { return x.version.entry.state() == State::data; });
    if (any && all_data && to - from == cluster_end - cluster_begin) {
      add(from, to);
    } else if (any) {
      for (std::size_t i = from; i < to; ++i) {
        if (of_other_epoch(r[i].version.entry)) add(i, i + 1);
      }
    }
    from = to;
  }
  return runs;
}

// Opens each sector and seals it again, in the memory that it was loaded into: no plaintext leaves
// the nearest cache.
Error SealedBackend::reseal_sectors(QueueContext& q, OldVersions& old, Sector first,
                                    std::span<Entry> entries, CipherRef& cipher) {
  const auto skipped = static_cast<std::uint32_t>(first.value - old.first.value);
  cipher = old.cipher.at(std::size_t{skipped} * kSectorSize);
  alignas(64) std::array<std::uint8_t, kSectorSize> plain;
  KeyLease keys;
  Error e;
  for (std::uint32_t i = 0; i < entries.size() && !e; ++i) {
    const Sector s{first.value + i};
    std::uint8_t* const place = cipher.data() + std::size_t{i} * kSectorSize;
    e = open_sector(q, s, old.r[skipped + i], place, plain.data(), keys);
    if (e.kind() == Kind::integrity) old.bad = skipped + i;
    if (!e) e = seal_sector(q, s, plain.data(), place, entries[i]);
  }
  crypto::wipe(plain.data(), plain.size());
  return e;
}

// Writes what the sectors hold once more; they all hold data, and `r` says where. Other writers are
// kept out, but a checkpoint may move a version while it is loaded: then it is looked up again.
// `unreadable` with an io_error: the medium does not give them out, and nothing else has failed.
Task<Error> SealedBackend::reseal(QueueContext& q, RekeyRun run, Resolved* r, bool& unreadable) {
  OldVersions old{run.first, r, {}, {}};
  const WriteSource source{run.first, {}, &old};
  bool made_room = false;
  for (int attempt = 0; attempt < kResealAttemptsMax; ++attempt) {
    if (attempt != 0) {
      if (Error e = co_await resolve(q.io, run.first, run.count, r)) co_return e;
    }
    old.cipher = take_cipher(pool_, std::size_t{run.count} * kSectorSize);
    old.bad.reset();
    Error e = co_await load_ciphertext(q, run.count, r, old.cipher.data());
    if (e.kind() == Kind::io_error && run.count == 1 && attempt == 0)
      continue;  // it may have moved
    unreadable = e.kind() == Kind::io_error;
    if (e) co_return e;
    e = co_await write_once(q, source, run.count);
    if (old.bad) {
      const Sector s{run.first.value + *old.bad};
      bool stale = false;
      if (Error bad = co_await mismatch(q.io, s, r[*old.bad], stale)) co_return bad;
      co_await yield();
      continue;
    }
    if (e.kind() != Kind::no_space || made_room) co_return e;
    made_room = true;  // relocated clusters are free only after a checkpoint (I3)
    if ((e = co_await checkpoint(q))) co_return e;
  }
  co_return Error(Kind::io_error, "a sector moved faster than it could be read")
      .at("rekey", run.first.value << kSectorShift);
}

// A run that cannot be read as a whole is taken sector by sector, to name those that are damaged or
// unreadable; one that finds no room for whole clusters is overwritten in place, through the log.
Task<Error> SealedBackend::rewrite_run(QueueContext& q, RekeyRun run, Resolved* r, Rekeyed& out) {
  bool unreadable = false;
  Error e = co_await reseal(q, run, r, unreadable);
  if (!e) {
    out.sectors += run.count;
    co_return Error();
  }
  const bool lost = unreadable || e.kind() == Kind::integrity;
  if (lost && run.count == 1) {
    // One of the current epoch was to go along with its cluster, and may stay as it is.
    auto& named = unreadable ? out.unreadable : out.damaged;
    if (of_other_epoch(r->version.entry)) named.push_back(run.first.value);
    co_return Error();
  }
  const bool split = lost || e.kind() == Kind::no_space;
  if (!split || run.count == 1) co_return e;
  const std::uint32_t half = run.count / 2;
  const RekeyRun begin{run.first, half};
  e = co_await rewrite_run(q, begin, r, out);
  if (e) co_return e;
  const RekeyRun rest{{run.first.value + half}, run.count - half};
  co_return co_await rewrite_run(q, rest, r + half, out);
}

Task<Error> SealedBackend::rekey(QueueContext& q, GuestOffset at, std::uint64_t length,
                                 Rekeyed& out) {
  const Sector first{at.bytes >> kSectorShift};
  std::vector<Resolved> r(div_ceil<std::uint64_t>(length, kSectorSize));
  const std::function<void(Sector)> unreadable = [&out](Sector s) {
    out.unreadable.push_back(s.value);
  };
  const auto count = static_cast<std::uint32_t>(r.size());
  if (Error e = co_await resolve_readable(q.io, first, count, r.data(), unreadable)) co_return e;
  const std::vector<RekeyRun> runs = runs_to_rekey(first, r);
  for (const RekeyRun& run : runs) {
    Resolved* const of_run = r.data() + (run.first.value - first.value);
    if (Error e = co_await rewrite_run(q, run, of_run, out)) co_return e;
  }
  if (!runs.empty() && overlay_.sectors(false) > options_.overlay_sectors_max / 2) {
    ask_checkpoint();
  }
  co_return Error();
}

Task<Result<std::uint64_t>> SealedBackend::count_other_epochs(QueueContext& q, GuestOffset at,
                                                              std::uint64_t length) {
  const Sector first{at.bytes >> kSectorShift};
  std::vector<Resolved> r(div_ceil<std::uint64_t>(length, kSectorSize));
  std::uint64_t unknown = 0;
  const std::function<void(Sector)> unreadable = [&unknown](Sector) { ++unknown; };
  const auto count = static_cast<std::uint32_t>(r.size());
  if (Error e = co_await resolve_readable(q.io, first, count, r.data(), unreadable)) co_return e;
  co_return unknown +
      static_cast<std::uint64_t>(std::count_if(r.begin(), r.end(), [this](const Resolved& x) {
        return of_other_epoch(x.version.entry);
      }));
}

Task<Error> SealedBackend::finish_epoch(QueueContext& q, std::uint32_t verified) {
  if (options_.read_only) co_return Error(Kind::read_only, "the disk is open read-only");
  if (Error e = require_no_data_beyond()) co_return e;
  // The log's header names a session too: one of the current epoch, from here on.
  if (!planted(Fault::forget_session_of_log)) {
    if (Error e = co_await ensure_session(q)) co_return e;
  }
  // Versions that are in the log only stand before older ones at home: after this, none does.
  if (!planted(Fault::forget_before_checkpoint)) {
    if (Error e = co_await checkpoint(q)) co_return e;
  }
  AsyncMutex::Guard lock = co_await session_lock_.lock();
  if (verified != epoch()) {
    co_return Error(Kind::canceled, "another epoch was begun meanwhile").in(file_.path);
  }
  // begin_epoch() may have failed before the running session could be replaced: what is written
  // under a session that is forgotten would be lost.
  if (!planted(Fault::forget_session_of_log) && sessions_->epoch_of(session_id()) != verified) {
    co_return Error(Kind::canceled, "the epoch was not begun: begin it again").in(file_.path);
  }
  {
    // One copy of the log's header still names the session before: then the other one could never
    // be done without.
    AsyncMutex::Guard no_checkpoint = co_await checkpoint_lock_.lock();
    if (!planted(Fault::forget_session_of_log)) {
      if (Error e = co_await log_->confirm_header(q.io)) co_return e;
      if (Error e = co_await log_->repeat_header(q.io)) co_return e;
    }
  }
  Error e = co_await sessions_->forget_other_epochs(q.io, file_);
  if (e.kind() == Kind::io_error) log_->fail(e);  // see Log::sync
  co_return e;
}

}  // namespace pqblk::image
