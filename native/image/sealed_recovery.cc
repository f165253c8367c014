// Recovery: a log that was left behind is folded into one final version of each sector, and that
// goes home by the checkpoint's own code. See sealed_backend.h and docs/format.md section 6.
//
// Nothing is changed before everything has been folded and checked. A crash during recovery is an
// ordinary crash: the log is still there, and every candidate it named still is where it was.

#include <algorithm>
#include <map>
#include <unordered_map>

#include "base/aligned.h"
#include "format/qcow2/check.h"
#include "image/sealed_backend.h"
#include "sealed/planted_faults.h"
#include "storage/file.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT
namespace qcow2 = format::qcow2;

namespace {

constexpr std::uint64_t kFillBytes = kMiB;  // of one write into holes

struct Candidate {
  Entry entry = Entry::never();
  std::uint64_t place = 0;  // of an inline ciphertext
  bool covered = false;
  bool self_evident = false;  // never, zero, inline: valid without looking at the medium
};

struct SlotFold {
  std::uint64_t final_entry = 0;
  std::uint64_t old_entry = 0;    // of the last MAP
  std::uint64_t first_old = 0;    // of the first MAP in the log
  std::uint64_t alternative = 0;  // old cluster of a last MAP that is not covered
  bool uncovered = false;
};

}  // namespace

struct SealedBackend::Fold {
  std::map<std::uint64_t, std::vector<Candidate>> sectors;  // oldest first
  std::map<std::uint64_t, SlotFold> slots;
  AlignedBuffer cipher{kSectorSize};
  AlignedBuffer scratch{kSectorSize};
};

Task<Error> SealedBackend::fold(QueueContext& q, const LogScan& scan, Fold& fold) {
  static_cast<void>(q);
  for (const LogRecord& r : scan.records) {
    const bool covered = r.sequence <= scan.covered;
    switch (r.type) {
      case RecordType::w: {
        auto& list = fold.sectors[r.sector.value];
        if (covered) list.clear();  // nothing older than the newest covered version counts
        list.push_back({r.entry, 0, covered, false});
        break;
      }
      case RecordType::wd:
        fold.sectors[r.sector.value] = {{r.entry, r.place, covered, true}};
        break;
      case RecordType::z:
        for (std::uint64_t i = 0; i < r.count; ++i) {
          fold.sectors[r.sector.value + i] = {{Entry::zero(), 0, covered, true}};
        }
        break;
      case RecordType::map: {
        auto [at, first] = fold.slots.try_emplace(r.slot.value);
        SlotFold& s = at->second;
        if (first) s.first_old = r.old_entry;
        s.final_entry = r.new_entry;
        s.old_entry = r.old_entry;
        s.uncovered = !covered;
        s.alternative = covered ? 0 : l2_host(r.old_entry);
        if (geometry_.is_entry_slot(r.slot) && (r.new_entry & kL2Zero) != 0) {
          const auto begin = geometry_.first_sector_of_entry_slot(r.slot).value;
          const auto end = geometry_.end_sector_of_entry_slot(r.slot).value;
          fold.sectors.erase(fold.sectors.lower_bound(begin), fold.sectors.lower_bound(end));
        }
        break;
      }
    }
  }
  co_return Error();
}

Task<Result<bool>> SealedBackend::opens_at(QueueContext& q, Sector s, const Entry& entry,
                                           std::uint64_t host) {
  if (host == 0) co_return false;
  if (sessions_->lacks_key(entry.session())) {
    co_return Error(Kind::wrong_key, "the log cannot be folded: a version of sector " +
                                         std::to_string(s.value) +
                                         " is of an epoch whose data key is missing");
  }
  QueueContext::Buffer buffer = q.buffer(2 * kSectorSize);
  const std::uint64_t at = host + geometry_.offset_in_cluster(s);
  if (Error e = co_await q.io.read(file_, at, buffer.data(), kSectorSize)) co_return e;
  KeyLease keys;
  co_return sector_opens(*sessions_, extension_.uuid, s, entry, buffer.data(),
                         buffer.data() + kSectorSize, keys);
}

// Decides one sector and puts the outcome into the overlay when home must change.
Task<Error> SealedBackend::choose_sector(QueueContext& q, Fold& fold, Sector s) {
  const Slot data_slot = geometry_.data_slot(geometry_.cluster_of(s));
  const auto slot = fold.slots.find(data_slot.value);
  const bool remapped = slot != fold.slots.end() && slot->second.uncovered;
  std::uint64_t final_host = 0;
  if (slot != fold.slots.end()) {
    final_host = l2_host(slot->second.final_entry);
  } else {
    Result<std::uint64_t> raw = co_await home_mapping(q.io, data_slot);
    if (!raw) co_return raw.take_error();
    final_host = l2_host(*raw);
  }
  std::vector<Candidate> candidates;
  const auto listed = fold.sectors.find(s.value);
  if (listed != fold.sectors.end()) candidates = listed->second;
  const bool grounded =
      !candidates.empty() && (candidates.front().covered || candidates.front().self_evident);
  if (!grounded) {
    Candidate base;
    const auto span = fold.slots.find(geometry_.entry_slot(s).value);
    const bool span_zero = span != fold.slots.end() && ((span->second.final_entry & kL2Zero) != 0 ||
                                                        (span->second.old_entry & kL2Zero) != 0);
    const bool span_fresh = span != fold.slots.end() && span->second.old_entry == 0;
    if (span_zero) {
      base.entry = Entry::zero();
    } else if (!span_fresh) {
      Result<EntryCache::Pin> pin = co_await entries_->pin(q.io, entries_->page_of(s));
      if (!pin) co_return pin.take_error();
      pin->read(EntryCache::index_in_page(geometry_.entry_offset(s)), 1, &base.entry);
    }
    base.self_evident = base.entry.state() != State::data;
    if (planted(Fault::zero_base_as_damage) && base.entry.state() == State::zero)
      base.self_evident = false;
    base.covered = true;
    candidates.insert(candidates.begin(), base);
  }
  for (auto c = candidates.rbegin(); c != candidates.rend(); ++c) {
    Version version;
    version.entry = c->entry;
    version.place = c->place;
    bool valid = c->self_evident;
    // A covered version alone, under a settled mapping, is redone without looking.
    if (!valid && c->covered && candidates.size() == 1 && !remapped) valid = true;
    if (!valid) {
      Result<bool> here = co_await opens_at(q, s, c->entry, final_host);
      if (!here) co_return here.take_error();
      valid = *here;
      if (!valid && remapped) {
        const std::uint64_t old = slot->second.alternative;
        Result<bool> there = co_await opens_at(q, s, c->entry, old);
        if (!there) co_return there.take_error();
        valid = *there;
        if (valid) version.place = old + geometry_.offset_in_cluster(s);
      }
    }
    if (!valid) continue;
    if (version.place != 0 && c->place == 0) ++recovery_.copied;
    ++recovery_.sectors;
    overlay_.put(s, std::move(version));
    co_return Error();
  }
  // Reported, and left so that a read of it fails: never older data, never zeros.
  ++recovery_.damaged;
  if (recovery_.damaged_sectors.size() < kDamagedNamed)
    recovery_.damaged_sectors.push_back(s.value);
  Version damaged;
  damaged.entry = candidates.back().entry;
  if (damaged.entry.state() == State::data) overlay_.put(s, std::move(damaged));
  co_return Error();
}

Task<Error> SealedBackend::choose(QueueContext& q, Fold& fold) {
  // Every sector of a cluster under an uncovered remap is looked at, also those without a record.
  if (!planted(Fault::skip_remap_check)) {
    for (const auto& [slot, s] : fold.slots) {
      if (geometry_.is_entry_slot({slot}) || !s.uncovered || s.alternative == 0) continue;
      if (l2_host(s.final_entry) == 0) continue;
      const std::uint64_t spc = geometry_.sectors_per_cluster();
      const std::uint64_t first = geometry_.cluster_of_slot({slot}).value * spc;
      for (std::uint64_t i = first; i < std::min(first + spc, mapped_geometry().sectors()); ++i) {
        fold.sectors.try_emplace(i);
      }
    }
  }
  for (const auto& [sector, candidates] : fold.sectors) {
    if (Error e = co_await choose_sector(q, fold, {sector})) co_return e;
  }
  for (const auto& [slot, s] : fold.slots) {
    Result<std::uint64_t> home = co_await home_mapping(q.io, {slot});
    if (!home) co_return home.take_error();
    // An entry cluster that was named home before the crash keeps what it holds there.
    // The medium may be shorter than what the log already names.
    if (l2_host(s.final_entry) != 0) {
      meta_->io().raise_host_end(l2_host(s.final_entry) + geometry_.cluster_size());
    }
    const bool already_home =
        geometry_.is_entry_slot({slot}) && *home == s.final_entry && l2_host(*home) != 0;
    if (already_home) continue;
    overlay_.put_slot({slot}, s.final_entry, s.old_entry, 0);
  }
  co_return Error();
}

// All that the tables can map. A header of before the disk was grown, put back from a backup, has a
// smaller size than the log knows of: what that says is the disk's all the same.
SealedGeometry SealedBackend::mapped_geometry() const {
  SealedGeometry mapped = geometry_;
  mapped.size = meta_->tables().l1_size() * geometry_.data_clusters() * geometry_.cluster_size();
  return mapped;
}

// The log's area was written when the disk was made; a copy of the disk that was made sparse has
// holes there. What is in them is written: a completed block of the log is durable on a device
// whose cache is not volatile, but not where the file system first has to give it a place.
Task<Error> SealedBackend::fill_log(QueueContext& q) {
  if (!file_.non_volatile || file_.keeps_new_blocks()) co_return Error();
  const std::uint64_t end = std::min(file_.size, extension_.log_offset + extension_.log_length);
  for (std::uint64_t at = extension_.log_offset; at < end;) {
    const storage::Hole hole = storage::next_hole(file_, at, end);
    if (hole.begin == hole.end) break;
    at = align_down<std::uint64_t>(hole.begin, kPage);
    const std::uint64_t stop = std::min(end, align_up<std::uint64_t>(hole.end, kPage));
    AlignedBuffer memory(std::min(kFillBytes, stop - at));
    for (std::uint64_t n = 0; at < stop; at += n) {
      n = std::min<std::uint64_t>(memory.size(), stop - at);
      if (Error e = co_await q.io.read(file_, at, memory.data(), n)) co_return e;
      if (Error e = co_await q.io.write(file_, at, memory.data(), n)) {
        co_return std::move(e).at("fill a hole in the log", at);
      }
    }
  }
  co_return Error();
}

struct SealedBackend::FoundLog {
  LogScan scan;
  bool by_block = false;  // by the first of its blocks, and not by a header
};

// Of a log whose newer header is gone the older one may find all blocks, or not: begun anew or gone
// round since. The ring shows it: of a header that never reached the medium it has no blocks, and
// what was durable once is known from later blocks.
Task<Error> SealedBackend::find_log(QueueContext& q, FoundLog& found) {
  Result<LogHeader> header = co_await read_log_header(q.io, file_, extension_, mac_);
  if (!header) co_return header.take_error();
  const SealedGeometry mapped = mapped_geometry();
  LogAhead ahead;
  if (header->alone()) {
    auto looked = co_await look_ahead(q.io, file_, extension_, *header, mapped, *sessions_);
    if (!looked) co_return looked.take_error();
    ahead = *looked;
  }
  found.by_block = ahead.what == Ahead::begin;
  const LogHeader& from = found.by_block ? ahead.begin : *header;
  log_->adopt(from);
  Result<LogScan> scan = co_await scan_log(q.io, file_, extension_, from, mapped, *sessions_);
  if (!scan) co_return scan.take_error();
  found.scan = std::move(*scan);
  if (!header->alone()) co_return Error();
  std::string why;
  if (ahead.what == Ahead::lost) {
    why = "has blocks of a generation that only it named";
  } else if (ahead.what == Ahead::round && found.scan.blocks == 0) {
    why = "has gone round since the other one was written";
  } else {
    const std::uint64_t next = found.scan.next;
    auto more = co_await shows_more(q.io, file_, extension_, from, next, mapped, *sessions_);
    if (!more) co_return more.take_error();
    if (!*more) co_return Error();
    why = "has blocks that the other one does not lead to";
  }
  const bool unread = header->other_unreadable;
  co_return Error(
      unread ? Kind::io_error : Kind::integrity,
      std::string("a copy of the log's header ") + (unread ? "cannot be read" : "is damaged") +
          ", and the log " + why +
          ": what was written last would be lost; put that page, or the disk, back from a "
          "copy")
      .at("read", extension_.log_offset + (header->serial + 1) % 2 * kPage);
}

// Nothing is left of it. Where a block had to stand in for a header both copies are written, before
// the next session begins: beside the old one that block would be of another than the last writer.
Task<Error> SealedBackend::end_log(QueueContext& q, const FoundLog& found) {
  if (Error e = co_await log_->begin_generation(q.io, nullptr)) co_return e;
  if (!found.by_block) co_return Error();
  co_return co_await log_->repeat_header(q.io);
}

Task<Error> SealedBackend::recover(QueueContext& q) {
  FoundLog found;
  if (Error e = co_await find_log(q, found)) co_return e;
  const LogScan* const scan = &found.scan;
  recovery_.blocks = scan->blocks;
  recovery_.records = scan->records.size();
  if (scan->records.empty()) {
    if (!found.by_block || options_.read_only) co_return Error();
    co_return co_await end_log(q, found);
  }
  Fold state;
  if (Error e = co_await fold(q, *scan, state)) co_return e;
  if (Error e = co_await choose(q, state)) co_return e;
  overlay_.freeze();
  if (options_.read_only) co_return Error();  // served from the log as it stands
  if (planted(Fault::redo_without_fold)) {
    for (const LogRecord& r : scan->records) {
      if (r.type != RecordType::wd) continue;
      Result<std::uint64_t> raw =
          co_await home_mapping(q.io, geometry_.data_slot(geometry_.cluster_of(r.sector)));
      if (!raw) co_return raw.take_error();
      if (l2_host(*raw) == 0) continue;
      AlignedBuffer page(kPage);
      if (Error e = co_await q.io.read(file_, r.place, page.data(), kPage)) co_return e;
      const std::uint64_t at = l2_host(*raw) + geometry_.offset_in_cluster(r.sector);
      if (Error e = co_await q.io.write(file_, at, page.data(), kPage)) co_return e;
    }
  }
  std::vector<HostOffset> freed;
  for (const Overlay::FrozenSlot& f : overlay_.frozen_slots()) {
    Result<std::uint64_t> home = co_await home_mapping(q.io, f.slot);
    if (!home) co_return home.take_error();
    const std::uint64_t old = l2_host(*home);
    if (old != 0 && old != l2_host(f.version.entry)) freed.push_back({old});
  }
  if (Error e = co_await write_home(q)) co_return e;
  overlay_.drop_frozen();
  if (Error e = co_await end_log(q, found)) co_return e;
  if (!freed.empty()) {
    if (Error e = co_await meta_->allocator().free(q.io, freed)) co_return e;
  }
  co_return Error();
}

// What a killed opener had reserved and not used: home alone names clusters now, so what it does
// not name is free. A crash in the middle leaves some of it for the next open. Bounded: a large
// disk waits for `check --repair`.
Task<Error> SealedBackend::reclaim(QueueContext& q) {
  const bool clean = !meta_->header().has(qcow2::kDirtyBit);
  if (clean || options_.read_only || options_.for_check || recovery_.damaged != 0)
    co_return Error();
  const qcow2::Tables& tables = meta_->tables();
  std::uint64_t table_bytes = 0;
  for (std::uint64_t i = 0; i < tables.l1_size(); ++i) {
    if (tables.l1_entry(i) != 0) table_bytes += geometry_.cluster_size();
  }
  const std::uint64_t clusters = meta_->io().host_end() / geometry_.cluster_size();
  const std::uint64_t bound = options_.reclaim_table_bytes_max;
  if (table_bytes > bound || clusters > bound / sizeof(std::uint64_t)) co_return Error();
  const qcow2::CheckOptions how{.repair = true, .leaks_only = true};
  Result<qcow2::CheckReport> report = co_await qcow2::check(q.io, *meta_, how);
  // Without it the disk is as good as with it, unless a sync has failed.
  if (!report) co_return log_->failed() ? log_->error() : Error();
  recovery_.reclaimed = report->leaks_fixed;
  co_return Error();
}

}  // namespace pqblk::image
