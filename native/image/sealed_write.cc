// Sealed writes of any size and class.
// See sealed_backend.h. The disk's range lock excludes other writers from these sectors throughout.

#include <algorithm>
#include <cassert>

#include "image/op_group.h"
#include "image/sealed_backend.h"
#include "sealed/planted_faults.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT
namespace qcow2 = format::qcow2;

namespace {

constexpr std::uint32_t kNoFresh = ~std::uint32_t{0};

struct Segment {  // neighbouring sectors of one cluster and one class
  std::uint32_t from = 0, to = 0;
  WriteClass cls = WriteClass::n;
  std::uint64_t host = 0;          // of `from`; 0 until allocated
  std::uint32_t fresh = kNoFresh;  // index into WritePlan::fresh: a whole cluster to be mapped
};

struct FreshCluster {
  Slot slot;
  std::uint64_t old_entry = 0;
  std::uint64_t host = 0;
};

}  // namespace

struct SealedBackend::WritePlan {
  Sector first;
  std::uint32_t count = 0;
  std::vector<Segment> segments;
  std::vector<FreshCluster> fresh;    // whole clusters: mapped together with their sectors
  std::vector<Slot> entry_slots;      // that have no entry cluster yet
  std::vector<ClusterIndex> partial;  // unmapped clusters that are written in part
  std::uint32_t inline_sectors = 0;   // class O2
  CipherRef cipher;
  std::vector<Entry> entries;

  std::uint32_t records() const {
    return count + static_cast<std::uint32_t>(fresh.size() + entry_slots.size() + partial.size());
  }
  std::uint32_t log_pages() const {  // allocate() appends each MAP of its own by itself
    const auto maps = static_cast<std::uint32_t>(entry_slots.size() + partial.size());
    return Log::pages_for(records(), inline_sectors, maps + 1);
  }
  bool has(WriteClass cls) const {
    return std::any_of(segments.begin(), segments.end(),
                       [cls](const Segment& s) { return s.cls == cls; });
  }
};

WriteClass SealedBackend::class_of(Sector s, const Version& v) {
  switch (v.entry.state()) {
    case State::never:
      return WriteClass::n;
    case State::zero: {
      // Only once the zero is durable may the place of the version before it be written, and not
      // while that version is still on its way home.
      const bool durable = v.sequence <= log_->durable() || planted(Fault::n_over_unflushed_zero);
      const bool free = v.sequence == 0 || (durable && !overlay_.frozen_holds(s));
      return free ? WriteClass::n : WriteClass::o2;
    }
    case State::data:
      break;
  }
  // A version that lives in the log is being, or will be, written home: not in its way.
  const bool at_home = v.place == 0 || planted(Fault::no_home_write_cancel);
  return writes_in_place() && at_home ? WriteClass::o1 : WriteClass::o2;
}

// What to do with the sectors [from, to) of one cluster. Changes nothing.
Task<Error> SealedBackend::plan_cluster(QueueContext& q, WritePlan& plan, std::uint32_t from,
                                        std::uint32_t to) {
  const Sector s{plan.first.value + from};
  const ClusterIndex cluster = geometry_.cluster_of(s);
  const Slot slot = geometry_.data_slot(cluster);
  std::uint64_t raw = 0;
  if (!mapping_now(slot, raw)) {
    Result<std::uint64_t> got = co_await mapping(q.io, slot);
    if (!got) co_return got.take_error();
    raw = *got;
  }
  const std::uint64_t host = l2_host(raw);
  const std::uint64_t in_disk =
      std::min(geometry_.sectors_per_cluster(),
               geometry_.sectors() - cluster.value * geometry_.sectors_per_cluster());
  const bool whole = to - from == in_disk;
  if (host == 0 && !whole) {
    plan.partial.push_back(cluster);
    plan.segments.push_back({from, to, WriteClass::n, 0, kNoFresh});
    co_return Error();
  }
  if (host != 0 && (raw & kL2Copied) == 0) {  // I9
    co_return Error(Kind::unsupported, "the cluster is shared with a snapshot");
  }
  SlotVersion pending;
  // I3: no relocation while the last MAP is uncovered.
  const bool settled = !overlay_.find_slot(slot, pending) || pending.sequence <= log_->covered() ||
                       planted(Fault::second_relocation_uncovered);
  const bool relocate = host != 0 && whole && settled && !writes_in_place() &&
                        std::uint64_t{plan.count} * kSectorSize >= options_.relocate_bytes_min;
  if (host == 0 || relocate) {
    plan.segments.push_back(
        {from, to, WriteClass::n, 0, static_cast<std::uint32_t>(plan.fresh.size())});
    plan.fresh.push_back({slot, raw, 0});
    co_return Error();
  }
  const std::uint32_t n = to - from;
  Resolved one;
  std::vector<Resolved> many(n > 1 ? n : 0);
  Resolved* r = n > 1 ? many.data() : &one;
  if (n > 1 || !resolve_one_now(s, one)) {
    if (Error e = co_await resolve(q.io, s, n, r)) co_return e;
  }
  for (std::uint32_t i = 0; i < n; ++i) {
    const Version& v = r[i].version;
    const Sector sector{s.value + i};
    const WriteClass cls = class_of(sector, v);
    const std::uint64_t at = host + geometry_.offset_in_cluster(sector);
    Segment* last = plan.segments.empty() ? nullptr : &plan.segments.back();
    if (last != nullptr && last->to == from + i && last->cls == cls && last->fresh == kNoFresh &&
        last->host != 0 && last->host + (last->to - last->from) * kSectorSize == at) {
      ++last->to;
    } else {
      plan.segments.push_back({from + i, from + i + 1, cls, at, kNoFresh});
    }
    plan.inline_sectors += cls == WriteClass::o2 ? 1 : 0;
  }
  co_return Error();
}

Task<Error> SealedBackend::plan(QueueContext& q, WritePlan& plan) {
  std::uint32_t i = 0;
  while (i < plan.count) {
    const Sector s{plan.first.value + i};
    const std::uint64_t cluster_end =
        (geometry_.cluster_of(s).value + 1) * geometry_.sectors_per_cluster();
    const auto n =
        static_cast<std::uint32_t>(std::min<std::uint64_t>(plan.count - i, cluster_end - s.value));
    if (Error e = co_await plan_cluster(q, plan, i, i + n)) co_return e;
    i += n;
  }
  for (std::uint64_t s = plan.first.value; s < plan.first.value + plan.count;) {
    const Slot slot = geometry_.entry_slot({s});
    std::uint64_t raw = 0;
    if (!mapping_now(slot, raw)) {
      Result<std::uint64_t> got = co_await mapping(q.io, slot);
      if (!got) co_return got.take_error();
      raw = *got;
    }
    if (l2_host(raw) == 0) plan.entry_slots.push_back(slot);
    s = geometry_.end_sector_of_entry_slot(slot).value;
  }
  co_return Error();
}

Task<Result<std::uint64_t>> SealedBackend::take_clusters(io::Queue& io, std::uint64_t count,
                                                         std::uint64_t& got) {
  qcow2::Allocator& allocator = meta_->allocator();
  HostOffset at;
  if (allocator.try_take(count, at)) {
    got = count;
  } else {
    Result<qcow2::HostRun> run = co_await allocator.take(io, count, false);
    if (!run) co_return run.take_error();
    got = run->clusters;
    at = run->at;
  }
  if (allocator.low()) ask(reserve_asked_, reserve_ended_);
  co_return at.bytes;
}

// Others see the table before its pointer is on the medium, and would acknowledge what is mapped in
// it: whoever asks for it waits for the lock.
Task<Error> SealedBackend::ensure_table(QueueContext& q, Slot slot) {
  AsyncMutex::Guard lock = co_await allocation_.lock();
  if (meta_->tables().has_table(slot)) co_return Error();
  co_return co_await meta_->tables().ensure_table(q.io, slot);
}

// Precondition: room for one record is reserved. Nothing refers to the new cluster's old content:
// the MAP says what its entries begin as.
Task<Error> SealedBackend::ensure_entry_cluster(QueueContext& q, Slot entry_slot) {
  AsyncMutex::Guard lock = co_await allocation_.lock();
  Result<std::uint64_t> raw = co_await mapping(q.io, entry_slot);
  if (!raw) co_return raw.take_error();
  if (l2_host(*raw) != 0) co_return Error();
  if (!meta_->tables().has_table(entry_slot)) {
    if (Error e = co_await meta_->tables().ensure_table(q.io, entry_slot)) co_return e;
  }
  std::uint64_t got = 0;
  Result<std::uint64_t> host = co_await take_clusters(q.io, 1, got);
  if (!host) co_return host.take_error();
  {
    Log::Appender appender(*log_);
    appender.map(MapKind::entry, entry_slot, *host | kL2Copied, *raw);
  }
  launch_log(q);
  co_return Error();
}

// Host clusters for everything the plan writes. Those written in part are mapped at once (others
// may write their other sectors); whole ones together with their sectors, in append().
Task<Error> SealedBackend::allocate(QueueContext& q, WritePlan& plan) {
  for (const Slot slot : plan.entry_slots) {
    if (Error e = co_await ensure_entry_cluster(q, slot)) co_return e;
  }
  for (const ClusterIndex cluster : plan.partial) {
    const Slot slot = geometry_.data_slot(cluster);
    AsyncMutex::Guard lock = co_await allocation_.lock();
    Result<std::uint64_t> raw = co_await mapping(q.io, slot);
    if (!raw) co_return raw.take_error();
    std::uint64_t host = l2_host(*raw);
    if (host == 0) {
      std::uint64_t got = 0;
      Result<std::uint64_t> fresh = co_await take_clusters(q.io, 1, got);
      if (!fresh) co_return fresh.take_error();
      host = *fresh;
      Log::Appender appender(*log_);
      appender.map(MapKind::data, slot, host | kL2Copied, *raw);
    }
    launch_log(q);
    for (Segment& s : plan.segments) {
      const Sector sector{plan.first.value + s.from};
      if (s.host == 0 && s.fresh == kNoFresh && geometry_.cluster_of(sector) == cluster) {
        s.host = host + geometry_.offset_in_cluster(sector);
      }
    }
  }
  for (std::size_t i = 0; i < plan.fresh.size();) {
    std::uint64_t got = 0;
    Result<std::uint64_t> host = co_await take_clusters(q.io, plan.fresh.size() - i, got);
    if (!host) {
      for (std::size_t k = 0; k < i; ++k) {
        static_cast<void>(meta_->allocator().recycle({plan.fresh[k].host}));
      }
      co_return host.take_error();
    }
    for (std::uint64_t k = 0; k < got; ++k)
      plan.fresh[i++].host = *host + k * geometry_.cluster_size();
  }
  for (Segment& s : plan.segments) {
    if (s.fresh != kNoFresh) s.host = plan.fresh[s.fresh].host;
  }
  co_return Error();
}

// The nonce is consumed first (I4). `cipher` may be the place of `plain`.
Error SealedBackend::seal_sector(QueueContext& q, Sector s, const std::uint8_t* plain,
                                 std::uint8_t* cipher, Entry& entry) {
  const SessionKeys& keys = *log_->session();
  crypto::Nonce nonce;
  if (Error e = lane(q).next(nonce)) return e;
  if (NonceTracer trace = nonce_tracer.load(std::memory_order_relaxed)) {
    trace(keys.id, keys.salt.data(), nonce, false);
  }
  crypto::Tag tag;
  const SectorAad aad(extension_.uuid, s, keys.id, State::data);
  keys.sector.seal(nonce, aad.span(), plain, cipher, kSectorSize, tag);
  std::copy(tag.begin(), tag.end(), entry.tag);
  std::copy(nonce.begin(), nonce.end(), entry.nonce);
  entry.set(State::data, keys.id);
  sealed_counts_[q.index].add();
  return {};
}

// Encrypts into memory of our own: the guest may change its buffer meanwhile, and a retry sends the
// same ciphertext.
Error SealedBackend::seal_sectors(QueueContext& q, WritePlan& plan, const WriteSource& source) {
  plan.entries.resize(plan.count);
  if (source.old != nullptr) {
    return reseal_sectors(q, *source.old, plan.first, plan.entries, plan.cipher);
  }
  const std::uint64_t skipped = (plan.first.value - source.first.value) * kSectorSize;
  plan.cipher = take_cipher(pool_, std::size_t{plan.count} * kSectorSize);
  alignas(64) std::array<std::uint8_t, kSectorSize> gathered;
  bool wiped_needed = false;
  for (std::uint32_t i = 0; i < plan.count; ++i) {
    const std::uint64_t at = std::uint64_t{i} * kSectorSize;
    const std::size_t size = std::min<std::uint64_t>(kSectorSize, source.data.size - skipped - at);
    const std::uint8_t* from =
        size == kSectorSize ? source.data.contiguous(skipped + at, size) : nullptr;
    if (from == nullptr) {
      std::fill(gathered.begin() + static_cast<std::ptrdiff_t>(size), gathered.end(),
                std::uint8_t{0});
      source.data.part(skipped + at, size).copy_out(gathered.data());
      from = gathered.data();
      wiped_needed = true;
    }
    const Sector s{plan.first.value + i};
    if (Error e = seal_sector(q, s, from, plan.cipher.data() + at, plan.entries[i])) return e;
  }
  if (wiped_needed) crypto::wipe(gathered.data(), gathered.size());
  return {};
}

// Every record of the write at one point of the log: a MAP to a fresh cluster and the sectors in it
// become visible to readers together.
Task<Error> SealedBackend::append(QueueContext& q, WritePlan& plan, Log::Receipt& receipt) {
  {
    Log::Appender appender(*log_);
    for (const FreshCluster& f : plan.fresh) {
      appender.map(MapKind::data, f.slot, f.host | kL2Copied, f.old_entry, true);
      if (planted(Fault::early_cluster_reuse) && l2_host(f.old_entry) != 0) {
        static_cast<void>(meta_->allocator().recycle({l2_host(f.old_entry)}));
      }
    }
    for (const Segment& s : plan.segments) {
      const std::span<const Entry> entries(&plan.entries[s.from], s.to - s.from);
      const Sector first{plan.first.value + s.from};
      const CipherRef cipher = plan.cipher.at(std::size_t{s.from} * kSectorSize);
      if (s.cls != WriteClass::o2) {
        appender.w(first, entries, cipher);
        continue;
      }
      for (std::uint32_t i = 0; i < entries.size(); ++i) {
        appender.wd({first.value + i}, entries[i], cipher.at(std::size_t{i} * kSectorSize));
      }
    }
    receipt = appender.receipt();
  }
  launch_log(q);
  co_return Error();
}

Task<Error> SealedBackend::write_home_places(QueueContext& q, WritePlan& plan,
                                             const Log::Receipt& receipt) {
  for (const WriteClass cls : {WriteClass::n, WriteClass::o1}) {
    if (!plan.has(cls)) continue;
    if (cls == WriteClass::o1 && !planted(Fault::data_before_record)) {  // I1
      if (Error e = co_await log_->wait_durable(q.io, receipt.last)) co_return e;
    }
    OpGroup group(q.io);
    std::uint64_t end = 0;
    std::vector<Segment> runs;
    for (const Segment& s : plan.segments) {
      if (s.cls != cls) continue;
      const bool joins = !runs.empty() && runs.back().to == s.from && end == s.host;
      if (joins) {
        runs.back().to = s.to;
      } else {
        runs.push_back(s);
      }
      end = s.host + (s.to - s.from) * kSectorSize;
    }
    for (const Segment& s : runs) {
      group.add(io::OpType::write, file_, s.host, plan.cipher.data() + s.from * kSectorSize,
                (s.to - s.from) * kSectorSize);
    }
    if (Error e = co_await group.run()) {
      log_->fail(e);  // a record without its data: nothing more may be acknowledged
      co_return e;
    }
    for (const Segment& s : runs) {
      overlay_.landed({plan.first.value + s.from}, {&plan.entries[s.from], s.to - s.from});
    }
  }
  log_->data_done(receipt);
  co_return Error();
}

Task<Error> SealedBackend::write_piece(QueueContext& q, const WriteSource& source,
                                       std::uint32_t count, std::uint64_t& last_sequence) {
  std::uint32_t done = 0;
  while (done < count) {
    WritePlan p;
    p.first = {source.first.value + done};
    p.count = count - done;
    for (;;) {  // smaller, until the log could hold it four times
      p.segments.clear(), p.fresh.clear(), p.entry_slots.clear(), p.partial.clear();
      p.inline_sectors = 0;
      if (Error e = co_await plan(q, p)) co_return e;
      if (p.log_pages() <= log_->ring_pages() / 4) break;
      p.count = (p.count + 1) / 2;
    }
    Result<Log::Room> room = co_await log_->reserve(p.log_pages());  // I8
    if (!room) co_return room.take_error();
    if (Error e = co_await allocate(q, p)) co_return e;
    if (Error e = seal_sectors(q, p, source)) {
      for (const FreshCluster& f : p.fresh) {
        static_cast<void>(meta_->allocator().recycle({f.host}));
      }
      co_return e;
    }
    Log::Receipt receipt;
    if (Error e = co_await append(q, p, receipt)) co_return e;
    { Log::Room used = std::move(*room); }
    last_sequence = receipt.last;
    if (Error e = co_await write_home_places(q, p, receipt)) co_return e;
    done += p.count;
  }
  co_return Error();
}

Task<Error> SealedBackend::write_once(QueueContext& q, const WriteSource& source,
                                      std::uint32_t count) {
  if (Error e = co_await enter_writer(q, count)) co_return e;
  std::uint64_t last = 0;
  Error e = co_await write_piece(q, source, count, last);
  if (!e) e = co_await log_->wait_written(last);  // I6
  writers_.leave();
  co_return e;
}

Task<Error> SealedBackend::write_any(QueueContext& q, Sector first, GuestBuffers data, bool fua) {
  const WriteSource source{first, data, nullptr};
  const auto count = static_cast<std::uint32_t>(div_ceil<std::uint64_t>(data.size, kSectorSize));
  Error e = co_await write_once(q, source, count);
  // A full file system may get space back from a checkpoint: clusters that were discarded or
  // relocated are free only after it (I3). Nothing of the piece that failed was logged. Where no
  // mapping has changed, every write would pay for one in vain.
  if (e.kind() == Kind::no_space && may_free_clusters()) {
    e = co_await checkpoint(q);
    if (!e) e = co_await write_once(q, source, count);
  }
  if (e) co_return e;
  if (must_flush_after(fua)) co_return co_await log_->flush(q.io);
  co_return Error();
}

// Of any write that was done: asks for a checkpoint when one is due. Whether its place was written
// before, and since when the file system knows, nobody keeps account of.
bool SealedBackend::must_flush_after(bool fua) {
  if (overlay_.sectors(false) > options_.overlay_sectors_max / 2) ask_checkpoint();
  return fua && !file_.keeps_new_blocks();
}

Task<Error> SealedBackend::write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) {
  const Sector first{at.bytes >> kSectorShift};
  return data.size == kSectorSize ? write_one(q, first, data, fua) : write_any(q, first, data, fua);
}

}  // namespace pqblk::image
