// The sealed image behind the Backend interface: joins the QCOW2 tables, the overlay and log, the
// entry cache, the cipher and the I/O.
//
// Room image/. One class, its parts in several files:
//   sealed_backend.cc     open, close, sessions, flush, resize, extents, statistics
//   sealed_read.cc        resolve sectors, read, authenticate
//   sealed_write.cc       write classes N, O1, O2
//   sealed_overwrite.cc   the shortest way for one sector of class O1 or O2
//   sealed_zero.cc        discard and write-zeroes
//   sealed_checkpoint.cc  the overlay's frozen half goes home
//   sealed_recovery.cc    folding a log that was left behind
//   sealed_beyond.cc      data beyond the size of the disk
//   sealed_rekey.cc       the key area, and moving to another epoch of the data key
// docs/write-protocol.md names the invariants (I1 to I9) that comments refer to.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "base/front_table.h"
#include "base/sync.h"
#include "format/qcow2/metadata.h"
#include "image/backend.h"
#include "sealed/backend_api.h"
#include "sealed/cipher_pool.h"
#include "sealed/entry_cache.h"
#include "sealed/extension.h"
#include "sealed/log.h"
#include "sealed/log_scan.h"
#include "sealed/nonce.h"
#include "sealed/overlay.h"
#include "sealed/sessions.h"

namespace pqblk::image {

struct SealedOptions {
  bool read_only = false;
  // A disk that has data beyond its size as well: it takes no write before it was resized.
  bool to_resize = false;
  sealed::VolumeKeys keys;  // moved in
  sealed::Uuid expected_uuid{};
  // Of a header backup: entries that the disk's session table has lost. Only to look, read_only.
  std::vector<std::uint8_t> backup_sessions;
  Limits limits;
  std::uint64_t overlay_sectors_max = 256 * 1024;               // a checkpoint is due at half of it
  std::uint64_t session_sectors_max = sealed::kLaneSectorsMax;  // of one lane; tests lower it
  // Whole clusters are sent to fresh places only from this many bytes on: below, the log is
  // cheaper.
  std::uint64_t relocate_bytes_min = 64 * kKiB;
  // When nobody has written for so long, or up to twice that, the log goes home. 0: never.
  std::uint64_t rest_ns = 30'000'000'000;
  // Opens the backing image that the header names, already allowed by the caller's policy; null
  // when there is none. `expected` is the backing volume's UUID when the policy demands one.
  std::unique_ptr<Backend> backing;
  bool allow_unauthenticated_backing = false;
  bool for_check = false;  // corrupt images too; nothing is written
  // After a crash, clusters that nothing names are taken back at open when the tables to be read
  // for that are no larger, and the file has no more clusters than these tables could name.
  std::uint64_t reclaim_table_bytes_max = 32 * kMiB;
};

// How a sector is written (docs/write-protocol.md):
//   n   the place holds nothing valid: data home at once, record in parallel
//   o1  overwrite on a device that allows it: record durable, then data in place
//   o2  every other overwrite: the ciphertext goes into the log, home later
enum class WriteClass : std::uint8_t { n, o1, o2 };

struct RecoveryReport {
  std::uint64_t blocks = 0, records = 0, sectors = 0, copied = 0, damaged = 0;
  std::uint64_t reclaimed = 0;                 // clusters that a killed opener had reserved
  std::vector<std::uint64_t> damaged_sectors;  // the first kDamagedNamed
};
inline constexpr std::size_t kDamagedNamed = 64;

class SealedBackend final : public Backend {
 public:
  // `service` runs the checkpoints; `file` is locked by the caller; both outlive the result.
  static Task<Result<std::unique_ptr<SealedBackend>>> open(QueueContext& service,
                                                           const io::File& file,
                                                           SealedOptions options);
  ~SealedBackend() override;

  Geometry geometry() const override;
  std::string_view format() const override { return "sealed"; }
  Task<Error> read(QueueContext& q, GuestOffset at, GuestBuffers data) override;
  Task<Error> write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) override;
  Task<Error> flush(QueueContext& q) override;
  Task<Error> discard(QueueContext& q, GuestOffset at, std::uint64_t length) override;
  Task<Error> write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                           std::uint32_t flags) override;
  Task<Result<Extent>> extent(QueueContext& q, GuestOffset at, std::uint64_t length) override;
  Task<Error> resize(QueueContext& q, std::uint64_t new_size) override;
  Task<Error> close(QueueContext& q) override;
  BackendStats stats() const override;
  BackendFacts facts() const override;

  // Writes everything that is in the log home. Any thread; one runs at a time.
  Task<Error> checkpoint(QueueContext& q);
  const RecoveryReport& recovery() const { return recovery_; }
  const sealed::Extension& extension() const { return extension_; }
  std::uint32_t session_id() const;
  const io::File& file() const { return file_; }
  // For check: the image's metadata and what the overlay says about slots. Quiesced.
  format::qcow2::Metadata& metadata() { return *meta_; }
  sealed::Overlay& overlay() { return overlay_; }
  const sealed::SealedGeometry& sealed_geometry() const { return geometry_; }
  // ---- the key area and epochs of the data key (docs/rotation.md) ----
  // sealed::replace_key_area() on the open file.
  Task<Error> change_key_area(QueueContext& q, const sealed::KeyAreaChange& change);
  // Every new session is under this key: from its return on all that is written is. It is from the
  // key area of this state (sealed::state_of), both of whose copies hold it. Errors: `locked` when
  // that was replaced since, and those of Sessions::use_epoch.
  Task<Error> begin_epoch(QueueContext& q, sealed::DataKey key,
                          const std::vector<std::uint8_t>& key_area_state);
  // Where the first sector in [at, to) may be whose entry cluster exists, bytes; it looks at a
  // bounded part of that, whose end it returns when there is none.
  Task<Result<std::uint64_t>> next_written(QueueContext& q, std::uint64_t at, std::uint64_t to);
  struct Rekeyed {
    std::uint64_t sectors = 0;           // written again
    std::vector<std::uint64_t> damaged;  // of another epoch, and their tag does not hold
    std::vector<std::uint64_t>
        unreadable;  // or the medium does not give them, or their entries, out
  };
  // Writes every sector of the range that is of another epoch again. The caller excludes other
  // writers from the range; offset and length as for read(), the length at most max_transfer.
  Task<Error> rekey(QueueContext& q, GuestOffset at, std::uint64_t length, Rekeyed& out);
  // How many sectors of the range are of another epoch, those with them whose entries the medium
  // does not give out. Any writers may be at work: what is of the current epoch stays so.
  Task<Result<std::uint64_t>> count_other_epochs(QueueContext& q, GuestOffset at,
                                                 std::uint64_t length);
  // Sessions and keys of other epochs are forgotten; then the key area need not hold them any more.
  // Quiesced. `verified`: the epoch; count_other_epochs() has found nothing since it was begun,
  // anywhere. Kind::canceled when it is not the current one any more.
  Task<Error> finish_epoch(QueueContext& q, std::uint32_t verified);
  std::uint32_t epoch() const { return sessions_->epoch(); }

  // Where data ends that lies beyond the size of the disk, because its header is of before it was
  // grown; bytes, 0: there is none. That of clusters that lie there wholly, to the cluster's end.
  // Quiesced.
  Task<Result<std::uint64_t>> end_beyond_size(QueueContext& q);
  // Kind::corrupt, with that size: what an open for writing would be refused with.
  Task<Error> require_within_size(QueueContext& q);

  // Reads and authenticates sectors without giving plaintext out; calls `bad` for each that fails,
  // and `unreadable` for each whose ciphertext or entry the medium does not give out. How many held
  // data and were looked at.
  Task<Result<std::uint64_t>> verify(QueueContext& q, Sector first, std::uint64_t count,
                                     const std::function<void(Sector)>& bad,
                                     const std::function<void(Sector)>& unreadable);

 private:
  struct Resolved {
    sealed::Version version;
    std::uint64_t host = 0;  // of the ciphertext, when it is not in memory
  };
  struct WritePlan;
  struct Fold;
  struct OldVersions;
  // What a write's sectors are to hold: the guest's memory, or what they hold already (rekey).
  struct WriteSource {
    Sector first;
    GuestBuffers data;
    OldVersions* old = nullptr;
  };

  SealedBackend(QueueContext& service, const io::File& file, SealedOptions options);
  Task<Error> load(QueueContext& q);
  Task<Error> load_header(QueueContext& q);
  Task<Error> require_key_area(QueueContext& q, const std::vector<std::uint8_t>& state);
  Task<Error> load_sessions(QueueContext& q);

  // sealed_read.cc
  bool mapping_now(Slot slot, std::uint64_t& raw);
  bool mapping_now(const QueueContext& q, Slot slot, std::uint64_t& raw);
  Task<Result<std::uint64_t>> mapping(io::Queue& io, Slot slot);
  bool home_mapping_now(Slot slot, std::uint64_t& raw);
  Task<Result<std::uint64_t>> home_mapping(io::Queue& io, Slot slot);
  bool resolve_one_now(Sector s, Resolved& out);
  Task<Error> resolve(io::Queue& io, Sector first, std::uint32_t count, Resolved* out);
  Task<Error> resolve_run(io::Queue& io, Sector first, std::uint32_t count, std::uint32_t wanted,
                          Resolved* out);
  std::uint64_t pages_to_load(Sector s, std::uint32_t wanted);
  std::uint32_t run_from(Sector s, std::uint32_t count) const;
  // Likewise for whoever looks at the whole disk: calls `unreadable` for each sector whose entry
  // the medium does not give out, which is as one that was never written then.
  Task<Error> resolve_readable(io::Queue& io, Sector first, std::uint32_t count, Resolved* out,
                               const std::function<void(Sector)>& unreadable);
  Task<Error> load_ciphertext(QueueContext& q, std::uint32_t count, const Resolved* r,
                              GuestBuffers to);
  Task<Error> load_ciphertext(QueueContext& q, std::uint32_t count, const Resolved* r,
                              std::uint8_t* buffer);
  // The same for a look at the medium: sectors that it does not give out are named, and resolve to
  // nothing from here on.
  Task<Error> load_readable(QueueContext& q, Sector first, std::uint32_t count, Resolved* r,
                            std::uint8_t* buffer, const std::function<void(Sector)>& unreadable);
  Error open_sector(const QueueContext& q, Sector s, const Resolved& r, const std::uint8_t* loaded,
                    std::uint8_t* plain, sealed::KeyLease& keys);
  Error open_sectors(QueueContext& q, Sector first, std::uint32_t count, const Resolved* r,
                     GuestBuffers loaded, GuestBuffers data, std::uint32_t& bad);
  enum class Place : std::uint8_t { guests, own };  // the memory that ciphertext is loaded into
  bool takes_ciphertext(const GuestBuffers& data, std::uint32_t count) const;
  Task<Error> try_read(QueueContext& q, Sector first, std::uint32_t count, Resolved* r,
                       const GuestBuffers& data, Place& place, bool& stale);
  Task<Error> fill_unwritten(QueueContext& q, Sector first, std::uint32_t count, const Resolved* r,
                             const GuestBuffers& data);
  Task<Error> mismatch(io::Queue& io, Sector s, const Resolved& r, bool& stale);
  // Not `logged`: the overlay does not have it, and its entry comes from the entry cache, later.
  struct NewestPlace : Resolved {
    bool logged = false;
    std::uint64_t page = 0;  // of the entry cache
    std::uint32_t index = 0;
    FrontTable::Found entry;  // in the entry cache
  };
  bool find_newest(const QueueContext& q, Sector s, NewestPlace& newest);
  bool open_newest(const QueueContext& q, Sector s, NewestPlace& newest,
                   const std::uint8_t* ciphertext, std::uint8_t* plain, const GuestBuffers& data);
  Task<Error> pin_page(io::Queue& io, Sector s, sealed::EntryCache::Pin& out);
  Task<bool> read_beside_entry(QueueContext& q, Sector s, std::uint64_t host, GuestBuffers data);
  Task<Error> read_one(QueueContext& q, Sector s, GuestBuffers data);
  Task<Error> read_resolved(QueueContext& q, Sector first, GuestBuffers data);

  // sealed_write.cc
  WriteClass class_of(Sector s, const sealed::Version& version);
  bool writes_in_place() const { return file_.non_volatile && file_.atomic_4k; }
  Task<Error> write_any(QueueContext& q, Sector first, GuestBuffers data, bool fua);
  bool must_flush_after(bool fua);
  Task<Error> write_once(QueueContext& q, const WriteSource& source, std::uint32_t count);
  Task<Error> write_piece(QueueContext& q, const WriteSource& source, std::uint32_t count,
                          std::uint64_t& last_sequence);
  Task<Error> plan(QueueContext& q, WritePlan& plan);
  Task<Error> plan_cluster(QueueContext& q, WritePlan& plan, std::uint32_t from, std::uint32_t to);
  Task<Error> allocate(QueueContext& q, WritePlan& plan);
  Error seal_sectors(QueueContext& q, WritePlan& plan, const WriteSource& source);
  Error seal_sector(QueueContext& q, Sector s, const std::uint8_t* plain, std::uint8_t* cipher,
                    sealed::Entry& entry);
  Task<Error> append(QueueContext& q, WritePlan& plan, sealed::Log::Receipt& receipt);
  Task<Error> write_home_places(QueueContext& q, WritePlan& plan,
                                const sealed::Log::Receipt& receipt);
  Task<Error> ensure_table(QueueContext& q, Slot slot);
  Task<Error> ensure_entry_cluster(QueueContext& q, Slot entry_slot);
  Task<Result<std::uint64_t>> take_clusters(io::Queue& io, std::uint64_t count, std::uint64_t& got);

  // sealed_overwrite.cc
  struct Overwrite {
    WriteClass cls = WriteClass::o2;
    sealed::State old = sealed::State::data;
    std::uint64_t host = 0;  // home, bytes
    sealed::Entry entry;
    sealed::CipherRef cipher;
    std::uint64_t sequence = 0;  // of the log block of its record
  };
  bool plan_overwrite(const QueueContext& q, Sector s, Overwrite& w);
  bool ask_overlay(Sector s, Overwrite& w);
  bool begin_overwrite(QueueContext& q, Sector s, const GuestBuffers& data, Overwrite& w);
  bool append_overwrite(QueueContext& q, Sector s, Overwrite& w);
  Task<Error> write_one(QueueContext& q, Sector s, GuestBuffers data, bool fua);

  // sealed_zero.cc
  Task<Error> zero_range(QueueContext& q, Sector first, std::uint64_t count, bool unmap);
  Task<Error> zero_span(QueueContext& q, Slot entry_slot, Sector from, Sector to, bool unmap,
                        std::uint64_t& last_sequence);

  // sealed_checkpoint.cc
  struct HomeWork;
  struct HomePage;
  bool may_free_clusters() const;
  Task<void> checkpoint_loop();
  Task<void> reserve_loop();
  Task<void> rest_loop();
  Task<Error> write_home(QueueContext& q);
  Task<Error> write_home_data(QueueContext& q, HomeWork& work);
  Task<Error> find_home_pages(QueueContext& q, const HomeWork& work, std::size_t& at,
                              std::vector<HomePage>& pages);
  Task<Error> pin_neighbours(io::Queue& io, std::span<HomePage> pages);
  Task<Error> pin_home_pages(QueueContext& q, std::span<HomePage> pages);
  Task<Error> write_home_entries(QueueContext& q, HomeWork& work);
  Task<Error> write_fresh_entry_cluster(QueueContext& q, HomeWork& work, Slot slot,
                                        const sealed::SlotVersion& version);
  void fill_entry_cluster(const HomeWork& work, Slot slot, const sealed::SlotVersion& version,
                          std::span<std::uint8_t> content) const;
  Task<Error> refresh_pages(QueueContext& q, HomeWork& work, Slot slot,
                            const sealed::SlotVersion& version);
  Task<Error> write_home_slots(QueueContext& q, HomeWork& work);
  Task<Error> release_clusters(QueueContext& q, HomeWork& work);
  bool frozen_mapping_now(Slot slot, std::uint64_t& raw);
  static void ask(Watermark& asked, const Watermark& ended);
  void ask_checkpoint() { ask(checkpoint_asked_, checkpoint_ended_); }
  void launch_log(QueueContext& q);

  // sealed_recovery.cc
  sealed::SealedGeometry mapped_geometry() const;
  struct FoundLog;
  Task<Error> find_log(QueueContext& q, FoundLog& found);
  Task<Error> end_log(QueueContext& q, const FoundLog& found);
  Task<Error> fill_log(QueueContext& q);
  Task<Error> recover(QueueContext& q);
  Task<Error> reclaim(QueueContext& q);
  Task<Error> fold(QueueContext& q, const sealed::LogScan& scan, Fold& fold);
  Task<Error> choose(QueueContext& q, Fold& fold);
  Task<Error> choose_sector(QueueContext& q, Fold& fold, Sector s);
  Task<Result<bool>> opens_at(QueueContext& q, Sector s, const sealed::Entry& entry,
                              std::uint64_t host);

  // sealed_beyond.cc
  Task<Result<bool>> is_mapped(QueueContext& q, Slot slot);
  Task<Result<bool>> holds_data(QueueContext& q, Sector s, const Resolved& r);
  Task<Result<std::uint64_t>> data_end_in(QueueContext& q, std::uint64_t begin, std::uint64_t end);
  Task<Result<std::uint64_t>> data_end_in_span(QueueContext& q, std::uint64_t first,
                                               std::uint64_t end);
  Error beyond_error(std::uint64_t end) const;
  Task<Error> look_beyond_size(QueueContext& q);
  Error require_no_data_beyond() const;

  // sealed_rekey.cc
  struct RekeyRun;
  bool of_other_epoch(const sealed::Entry& entry);
  std::vector<RekeyRun> runs_to_rekey(Sector first, const std::vector<Resolved>& r);
  Task<Error> rewrite_run(QueueContext& q, RekeyRun run, Resolved* r, Rekeyed& out);
  Task<Error> reseal(QueueContext& q, RekeyRun run, Resolved* r, bool& unreadable);
  Error reseal_sectors(QueueContext& q, OldVersions& old, Sector first,
                       std::span<sealed::Entry> entries, sealed::CipherRef& cipher);

  // sealed_backend.cc
  Task<Error> ensure_session(QueueContext& q);
  Task<Error> begin_session(QueueContext& q);
  Task<Error> rotate_session(QueueContext& q);
  Task<Error> replace_session(QueueContext& q);
  Task<Error> grow_session_table(QueueContext& q);
  Task<Error> enter_writer(QueueContext& q, std::uint64_t sectors);
  sealed::NonceLane& lane(QueueContext& q) { return lanes_[q.index].lane; }
  Error lane_ready(QueueContext& q);
  Task<Error> set_dirty(QueueContext& q, bool dirty);

  QueueContext& service_;
  const io::File& file_;
  SealedOptions options_;
  sealed::Extension extension_;
  sealed::MacKeys mac_;
  sealed::SealedGeometry geometry_;
  std::unique_ptr<format::qcow2::Metadata> meta_;
  std::unique_ptr<sealed::Sessions> sessions_;
  sealed::CipherPool pool_;
  sealed::Overlay overlay_;
  std::unique_ptr<sealed::EntryCache> entries_;
  std::unique_ptr<sealed::Log> log_;
  RecoveryReport recovery_;
  std::uint64_t beyond_end_ = 0;  // open to resize: until then, where data beyond the size ends

  AsyncMutex allocation_;  // mapping of unmapped slots; entry clusters
  AsyncMutex session_lock_;
  AsyncMutex key_area_lock_;               // from comparing what is there to having replaced it
  Gate writers_;                           // closed while a session ends
  std::atomic<std::uint32_t> session_{0};  // id; 0: none yet
  std::atomic<std::uint32_t> next_lane_{0};
  static constexpr std::uint32_t kNoSession = 0;
  static constexpr std::size_t kLanes = format::qcow2::kReaderQueuesMax;
  struct alignas(64) Lane {
    sealed::NonceLane lane;
    std::uint32_t session = 0;
  };
  std::array<Lane, kLanes> lanes_;

  AsyncMutex checkpoint_lock_;
  std::atomic<std::uint32_t> checkpoints_running_{0};  // and waiting for the lock
  Watermark checkpoint_asked_, checkpoint_ended_;
  Watermark reserve_asked_, reserve_ended_;
  Watermark rest_asked_, rest_ended_;
  ReadyNode* nap_ = nullptr;  // of rest_loop(); the service thread's
  std::atomic<bool> closing_{false};
  bool closed_ = false;

  std::atomic<std::uint64_t> integrity_failures_{0}, checkpoints_{0};
  // Of each queue: an atomic addition for each sector would wait until all that was just sealed has
  // left the CPU.
  std::array<OwnCount, kLanes> sealed_counts_, opened_counts_;
};

}  // namespace pqblk::image
