// Checkpoint: the overlay's frozen half goes home, then the log's tail moves past it.
// See sealed_backend.h.
//
// Order (docs/write-protocol.md): freeze; wait until every record up to the cut is complete; one
// fdatasync makes them covered (I2); data, then entries, home; sync; mappings home (I7); sync;
// forget the frozen half; tail durable; only then are log space and clusters free again (I2, I3).

#include <algorithm>
#include <cassert>

#include "base/aligned.h"
#include "base/task_group.h"
#include "image/op_group.h"
#include "image/sealed_backend.h"
#include "sealed/planted_faults.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT
namespace qcow2 = format::qcow2;

namespace {
constexpr std::size_t kHomeWritesAtOnce = 256;
constexpr std::size_t kHomeRunMax = 256;          // sectors in one write home
constexpr std::size_t kHomeSectorsAtOnce = 2048;  // about: 8 MiB, read back from the log
constexpr std::size_t kEntryPagesPinned = 256;
constexpr std::size_t kEntryLoadsAtOnce = 64;
constexpr std::uint64_t kEntryWriteMax = 256 * kKiB;
}  // namespace

// A page of entries that some frozen sectors change, and which of them.
struct SealedBackend::HomePage {
  std::uint64_t number = 0;
  std::uint64_t host = 0;
  std::size_t first = 0, end = 0;  // in HomeWork::sectors
  EntryCache::Pin pin;
};

struct SealedBackend::HomeWork {
  std::vector<Overlay::FrozenSector> sectors;  // sorted
  std::vector<Overlay::FrozenSlot> slots;      // sorted
  std::vector<HostOffset> dropped;
};

// As of the cut, without waiting; false: home_mapping() has it.
bool SealedBackend::frozen_mapping_now(Slot slot, std::uint64_t& raw) {
  if (const auto version = overlay_.frozen_slot(slot)) {
    raw = version->entry;
    return true;
  }
  return home_mapping_now(slot, raw);
}

namespace {
struct PendingRun {
  std::uint64_t host = 0;
  std::size_t first = 0, count = 0;  // in HomeWork::sectors
};
}  // namespace

// Ciphertext that lives in the log (or, in recovery, in an old cluster) goes to its home place, by
// the mapping as it was at the cut.
Task<Error> SealedBackend::write_home_data(QueueContext& q, HomeWork& work) {
  std::vector<PendingRun> runs;
  std::size_t looked = 0;
  for (std::size_t i = 0; i < work.sectors.size(); ++i) {
    const auto& [sector, version] = work.sectors[i];
    if (version->place == 0 || version->entry.state() != State::data) continue;
    const Slot slot = geometry_.data_slot(geometry_.cluster_of(sector));
    std::uint64_t raw = 0;
    if (!frozen_mapping_now(slot, raw)) {
      Result<std::uint64_t> loaded = co_await home_mapping(q.io, slot);
      if (!loaded) co_return loaded.take_error();
      raw = *loaded;
    }
    if (++looked % 64 == 0) co_await yield();  // a long look at memory holds up nobody
    if (l2_host(raw) == 0) {
      co_return Error(Kind::corrupt,
                      "sector " + std::to_string(sector.value) + " has no home cluster");
    }
    const std::uint64_t host = l2_host(raw) + geometry_.offset_in_cluster(sector);
    const bool joins = !runs.empty() && runs.back().first + runs.back().count == i &&
                       runs.back().host + runs.back().count * kSectorSize == host &&
                       runs.back().count < kHomeRunMax;
    if (joins) {
      ++runs.back().count;
    } else {
      runs.push_back({host, i, 1});
    }
  }
  for (std::size_t begin = 0, end = 0; begin < runs.size(); begin = end) {
    std::size_t count = 0;
    while (end < runs.size() && end - begin < kHomeWritesAtOnce && count < kHomeSectorsAtOnce) {
      count += runs[end++].count;
    }
    OpGroup reads(q.io), writes(q.io);
    std::vector<CipherRef> held;
    for (std::size_t i = begin; i < end; ++i) {
      std::vector<iovec> iov;
      for (std::size_t k = 0; k < runs[i].count; ++k) {
        const Version& v = *work.sectors[runs[i].first + k].version;
        const bool in_memory = static_cast<bool>(v.cipher);
        held.push_back(in_memory ? v.cipher : take_cipher(pool_, kSectorSize));
        std::uint8_t* const at = held.back().data();
        if (!in_memory) reads.add(io::OpType::read, file_, v.place, at, kSectorSize);
        iov.push_back({at, kSectorSize});
      }
      writes.add(io::OpType::write, file_, runs[i].host, std::move(iov));
    }
    if (Error e = co_await reads.run()) co_return e;
    if (Error e = co_await writes.run()) co_return e;
  }
  co_return Error();
}

// An entry cluster that is new at home: its content is its base and the frozen entries, written
// whole and synced before the mapping that names it. Cached pages are renewed after that
// (refresh_pages): a reader that still sees the old mapping could load one until then.
void SealedBackend::fill_entry_cluster(const HomeWork& work, Slot slot, const SlotVersion& version,
                                       std::span<std::uint8_t> content) const {
  fill_base(content.data(), content.size(), ((version.entry | version.old) & kL2Zero) != 0);
  const Sector first = geometry_.first_sector_of_entry_slot(slot);
  const Sector end = geometry_.end_sector_of_entry_slot(slot);
  auto at = std::lower_bound(work.sectors.begin(), work.sectors.end(), first,
                             [](const auto& f, Sector s) { return f.sector < s; });
  for (; at != work.sectors.end() && at->sector < end; ++at) {
    std::memcpy(content.data() + geometry_.entry_offset(at->sector), &at->version->entry,
                sizeof(Entry));
  }
}

Task<Error> SealedBackend::write_fresh_entry_cluster(QueueContext& q, HomeWork& work, Slot slot,
                                                     const SlotVersion& version) {
  AlignedBuffer content(geometry_.cluster_size());
  fill_entry_cluster(work, slot, version, content.span());
  for (std::uint64_t offset = 0; offset < content.size(); offset += kEntryWriteMax) {
    const std::uint64_t length = std::min<std::uint64_t>(kEntryWriteMax, content.size() - offset);
    if (Error e = co_await q.io.write(file_, l2_host(version.entry) + offset,
                                      content.data() + offset, length)) {
      co_return e;
    }
  }
  co_return Error();
}

// Precondition: the slot's new mapping is home, so whoever loads a page from now on loads the new
// one.
Task<Error> SealedBackend::refresh_pages(QueueContext& q, HomeWork& work, Slot slot,
                                         const SlotVersion& version) {
  AlignedBuffer content(geometry_.cluster_size());
  fill_entry_cluster(work, slot, version, content.span());
  for (std::uint64_t p = 0; p < entries_->pages_per_cluster(); ++p) {
    auto pin = co_await entries_->pin_if_present(q.io, entries_->first_page(slot) + p);
    if (!pin) co_return pin.take_error();
    if (pin->first) pin->second.replace(content.data() + p * kPage);
  }
  co_return Error();
}

// The next pages, at most kEntryPagesPinned, that hold sectors from the `at`-th on, which moves
// past them. Fresh entry clusters are written whole; under the zero flag there is nothing to write.
Task<Error> SealedBackend::find_home_pages(QueueContext& q, const HomeWork& work, std::size_t& at,
                                           std::vector<HomePage>& pages) {
  pages.clear();
  while (at < work.sectors.size() && pages.size() < kEntryPagesPinned) {
    const Sector s = work.sectors[at].sector;
    const Slot slot = geometry_.entry_slot(s);
    HomePage page;
    page.number = entries_->page_of(s);
    page.first = at;
    while (at < work.sectors.size() && entries_->page_of(work.sectors[at].sector) == page.number) {
      ++at;
    }
    page.end = at;
    if (overlay_.frozen_slot(slot)) continue;
    Result<std::uint64_t> raw = co_await home_mapping(q.io, slot);
    if (!raw) co_return raw.take_error();
    if (l2_host(*raw) == 0) co_return Error(Kind::corrupt, "an entry has no entry cluster");
    page.host = l2_host(*raw) + page.number % entries_->pages_per_cluster() * kPage;
    pages.push_back(std::move(page));
  }
  co_return Error();
}

// Pages that follow each other come in one read where they are not in memory.
Task<Error> SealedBackend::pin_neighbours(io::Queue& io, std::span<HomePage> pages) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    Result<EntryCache::Pin> pin = co_await entries_->pin(io, pages[i].number, pages.size() - i);
    if (!pin) co_return pin.take_error();
    pages[i].pin = std::move(*pin);
  }
  co_return Error();
}

// All at once, but for a bound: one after the other each would wait behind what guests have in
// flight, and while the overlay is full guests wait for this.
Task<Error> SealedBackend::pin_home_pages(QueueContext& q, std::span<HomePage> pages) {
  for (std::size_t begin = 0; begin < pages.size();) {
    TaskGroup loads;
    for (std::size_t n = 0; n < kEntryLoadsAtOnce && begin < pages.size(); ++n) {
      std::size_t end = begin + 1;
      while (end < pages.size() && end - begin < EntryCache::kRunMax &&
             pages[end].number == pages[end - 1].number + 1 &&
             pages[end].number % entries_->pages_per_cluster() != 0) {
        ++end;
      }
      loads.start(pin_neighbours(q.io, pages.subspan(begin, end - begin)));
      begin = end;
    }
    if (Error e = co_await loads.join()) co_return e;
  }
  co_return Error();
}

// Neighbouring pages go in one write; a page stays as it is until its write has completed (pinned).
Task<Error> SealedBackend::write_home_entries(QueueContext& q, HomeWork& work) {
  std::vector<HomePage> pages;
  for (std::size_t at = 0; at < work.sectors.size();) {
    if (Error e = co_await find_home_pages(q, work, at, pages)) co_return e;
    if (Error e = co_await pin_home_pages(q, pages)) co_return e;
    OpGroup writes(q.io);
    for (std::size_t i = 0; i < pages.size();) {
      std::vector<iovec> run;
      const std::uint64_t host = pages[i].host;
      do {
        HomePage& page = pages[i++];
        for (std::size_t k = page.first; k < page.end; ++k) {
          const auto& [sector, version] = work.sectors[k];
          page.pin.update(EntryCache::index_in_page(geometry_.entry_offset(sector)),
                          version->entry);
        }
        run.push_back({const_cast<std::uint8_t*>(page.pin.bytes()), kPage});
      } while (i < pages.size() && pages[i].host == host + run.size() * kPage);
      writes.add(io::OpType::write, file_, host, std::move(run));
    }
    if (Error e = co_await writes.run()) co_return e;
  }
  co_return Error();
}

Task<Error> SealedBackend::write_home_slots(QueueContext& q, HomeWork& work) {
  std::vector<qcow2::SlotUpdate> updates;
  for (const auto& [slot, version] : work.slots) {
    if (!geometry_.is_entry_slot(slot) || l2_host(version.entry) == 0) continue;
    if (Error e = co_await write_fresh_entry_cluster(q, work, slot, version)) co_return e;
  }
  if (Error e = co_await log_->sync(q.io)) co_return e;
  for (const auto& [slot, version] : work.slots) updates.push_back({slot, version.entry, 0});
  if (Error e = co_await meta_->tables().store(q.io, updates)) co_return e;
  for (const auto& [slot, version] : work.slots) {
    if (!geometry_.is_entry_slot(slot)) continue;
    if (Error e = co_await refresh_pages(q, work, slot, version)) co_return e;
  }
  co_return Error();
}

// The frozen half, and only it, goes home and is durable there on return.
Task<Error> SealedBackend::write_home(QueueContext& q) {
  HomeWork work;
  work.sectors = overlay_.frozen_sectors();
  work.slots = overlay_.frozen_slots();
  if (Error e = co_await write_home_data(q, work)) co_return e;
  if (Error e = co_await write_home_entries(q, work)) co_return e;
  if (!work.slots.empty()) {
    if (Error e = co_await write_home_slots(q, work)) co_return e;
  }
  if (planted(Fault::trim_live_record)) co_return Error();
  co_return co_await log_->sync(q.io);
}

// Clusters that nothing at home or in the log names any more. Unmapped ones go back to the file
// system; those replaced by a relocation are soon needed again.
Task<Error> SealedBackend::release_clusters(QueueContext& q, HomeWork& work) {
  std::vector<HostOffset> unmapped, recycled;
  for (const auto& [slot, version] : work.slots) {
    const std::uint64_t old = l2_host(version.first_old);
    if (old == 0 || old == l2_host(version.entry)) continue;
    if (l2_host(version.entry) == 0) {
      unmapped.push_back({old});
    } else {
      recycled.push_back({old});
    }
  }
  recycled.insert(recycled.end(), work.dropped.begin(), work.dropped.end());
  for (const HostOffset at : recycled) {
    if (meta_->allocator().recycle(at)) continue;
    co_return Error(Kind::corrupt, "two L2 entries name one cluster").at("checkpoint", at.bytes);
  }
  if (unmapped.empty()) co_return Error();
  std::sort(unmapped.begin(), unmapped.end());
  const std::uint64_t cs = geometry_.cluster_size();
  for (std::size_t i = 0; i < unmapped.size();) {
    std::size_t end = i + 1;
    while (end < unmapped.size() && unmapped[end].bytes == unmapped[end - 1].bytes + cs) ++end;
    Error e =
        co_await q.io.fallocate(file_, io::FallocateMode::punch, unmapped[i].bytes, (end - i) * cs);
    // A device or file system without holes, or without room for another one, keeps the space; that
    // is no failure.
    const bool kept =
        e.os_errno() == EOPNOTSUPP || e.os_errno() == ENOTTY || e.os_errno() == ENOSPC;
    if (e && !kept) co_return e;
    i = end;
  }
  co_return co_await meta_->allocator().free(q.io, unmapped);
}

// A checkpoint that runs gives clusters back when the overlay knows of them no more.
bool SealedBackend::may_free_clusters() const {
  return overlay_.has_slots() || checkpoints_running_.load(std::memory_order_acquire) != 0;
}

Task<Error> SealedBackend::checkpoint(QueueContext& q) {
  struct Running {
    explicit Running(std::atomic<std::uint32_t>& n) : count(n) { count.fetch_add(1); }
    ~Running() { count.fetch_sub(1); }
    std::atomic<std::uint32_t>& count;
  };
  const Running running(checkpoints_running_);
  AsyncMutex::Guard lock = co_await checkpoint_lock_.lock();
  if (log_->failed()) co_return log_->error();
  if (!log_->active() || overlay_.empty()) co_return Error();
  if (Error e = co_await log_->confirm_header(q.io)) co_return e;
  const Log::Cut cut = log_->freeze();
  HomeWork freed;  // looked up before the frozen half is gone
  freed.slots = overlay_.frozen_slots();
  freed.dropped = overlay_.frozen_dropped();
  if (planted(Fault::reuse_when_log_durable)) {
    if (Error e = co_await log_->wait_durable(q.io, cut.sequence)) co_return e;
    if (Error e = co_await release_clusters(q, freed)) co_return e;
  }
  if (!planted(Fault::checkpoint_before_flush)) {
    if (Error e = co_await log_->wait_complete(cut.sequence)) co_return e;
    while (log_->covered() < cut.sequence) {
      if (Error e = co_await log_->flush(q.io)) co_return e;
    }
    if (log_->failed()) co_return log_->error();  // a failure lifts every watermark
  }
  Error e;
  if (planted(Fault::refcount_lowered_early)) e = co_await release_clusters(q, freed);
  if (planted(Fault::trim_live_record)) e = co_await log_->advance_tail(q.io, cut);
  if (!e) e = co_await write_home(q);
  if (e) {
    log_->fail(e);
    co_return e;
  }
  // Readers find everything at home from here on; the log's pages are reused only after this.
  overlay_.drop_frozen();
  if (!planted(Fault::trim_live_record)) {
    if ((e = co_await log_->advance_tail(q.io, cut))) co_return e;
  }
  checkpoints_.fetch_add(1, std::memory_order_relaxed);
  if (planted(Fault::reuse_when_log_durable) || planted(Fault::refcount_lowered_early) ||
      planted(Fault::early_cluster_reuse)) {
    co_return Error();  // done before
  }
  co_return co_await release_clusters(q, freed);
}

}  // namespace pqblk::image
