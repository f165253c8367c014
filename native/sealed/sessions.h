// Sessions: the table on disk (two copies) and the keys derived from it.
//
// Room sealed/. Reads and writes the session table only; what is sealed under a session is not its
// business. docs/format.md, section 3.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>

#include "base/aligned.h"
#include "base/error.h"
#include "base/task.h"
#include "crypto/aead.h"
#include "io/queue.h"
#include "sealed/extension.h"
#include "sealed/layout.h"

namespace pqblk::sealed {

struct SessionKeys {
  std::uint32_t id = 0;
  std::uint32_t epoch = 0;
  std::array<std::uint8_t, 32> salt{};
  crypto::AeadKey sector;
  std::optional<crypto::AeadKey> log;  // where the log is written or read under this session
};

// The keys of a session, for whoever does not suspend while they hold them: those that are kept,
// or, where a process keeps too many already, some that were derived for this holder and go with
// it.
class KeyLease {
 public:
  const SessionKeys* operator->() const { return keys_; }  // of the last find() that had an answer

 private:
  friend class Sessions;
  const SessionKeys* keys_ = nullptr;
  std::unique_ptr<SessionKeys> own_;
};

class Sessions {
 public:
  // `keys` and `mac` must outlive this object, which alone uses the data keys from here on. Loads
  // the union of both copies.
  static Task<Result<std::unique_ptr<Sessions>>> load(io::Queue& io, const io::File& file,
                                                      const Extension& extension, VolumeKeys& keys,
                                                      const MacKeys& mac);
  // The same with a third copy, of a backup, which may be shorter than a table: entries that both
  // copies on the disk have lost come back, but for those of epochs that were forgotten. Unless the
  // place is certain, a copy on the disk must show that the table is there: a head or an entry that
  // holds. An empty backup: only that proof.
  static Task<Result<std::unique_ptr<Sessions>>> load_with(io::Queue& io, const io::File& file,
                                                           const Extension& extension,
                                                           VolumeKeys& keys, const MacKeys& mac,
                                                           std::span<const std::uint8_t> backup,
                                                           bool place_certain);
  // The data key of the newest session is at hand: whoever wrote last wrote under it, so that keys
  // without it are of an epoch that is past, or was given up. Error: wrong_key.
  Error require_newest() const;
  // New sessions are of the newest one's epoch, where that is beyond the current epoch of the keys
  // (an opener that found one copy of the key area at a rotation's end, and one before it): it
  // began when both copies had its key. Else keys that lack it would be taken for those of the
  // disk.
  void go_on_in_newest();
  // The table has this session, and the volume keys lack its epoch: what is sealed under it may be
  // whole all the same.
  bool lacks_key(std::uint32_t id) const;
  // Entries that only the backup had.
  std::uint32_t restored() const { return restored_; }
  bool damaged() const { return damaged_; }  // load_with(): neither copy on the disk had a head
  // Writes both copies anew where one of them lacks anything.
  Task<Error> repair_copies(io::Queue& io, const io::File& file);
  // Bytes of an empty table copy, for a new image.
  static AlignedBuffer empty_copy(std::size_t length, const Uuid& uuid, const MacKeys& mac);

  // Keys of a session, derived on first use, and kept unless keys are scarce: any number of
  // sessions works, and those met first are faster. Errors: wrong_key when the table has no such
  // session or the volume keys lack its epoch; any other (no_memory) says nothing about the
  // session, nor about what was sealed under it. Any thread.
  Error find(std::uint32_t id, KeyLease& lease) {
    const SessionKeys* keys = recent_[id % kRecent].load(std::memory_order_acquire);
    if (keys == nullptr || keys->id != id) return find_or_derive(id, lease);
    lease.keys_ = keys;
    return {};
  }
  // Of one's own, with the log's. Errors as find().
  Result<std::unique_ptr<SessionKeys>> log_keys(std::uint32_t id) const;
  // The epoch of a session; 0 when the table has none of this id. Any thread.
  std::uint32_t epoch_of(std::uint32_t id) const;

  // The epoch of new sessions. Any thread.
  std::uint32_t epoch() const { return epoch_.load(std::memory_order_acquire); }
  // New sessions are of this epoch from here on; a key that is there already must be the same.
  // Any thread. Errors: invalid_argument (epoch 0), wrong_key.
  Error use_epoch(DataKey key);
  // Sessions and data keys of other epochs leave the table, both copies, and the memory.
  // Precondition: no entry and no log block names one of them, and nobody is reading.
  Task<Error> forget_other_epochs(io::Queue& io, const io::File& file);

  // The highest id that was ever given out: the session of whoever wrote last.
  std::uint32_t last_id() const { return high_water_; }
  bool full() const;
  std::size_t count() const { return entries_.size(); }
  // A new session under the current epoch, durable in both copies on return; its keys are kept,
  // however scarce. Precondition: !full(). Errors: no_memory before anything is written.
  Task<Result<const SessionKeys*>> begin(io::Queue& io, const io::File& file);
  // Writes the whole table to two new places of `length` bytes each and flushes; the caller then
  // makes the header point there. begin() uses the new places from now on.
  Task<Error> move_to(io::Queue& io, const io::File& file, std::uint64_t a, std::uint64_t b,
                      std::uint32_t length);

 private:
  Sessions(const Extension& extension, VolumeKeys& keys, const MacKeys& mac);
  Task<Error> read_copies(io::Queue& io, const io::File& file, bool& any_head);
  Error require_room() const;
  Error absorb(const AlignedBuffer& copy, bool& head_valid, bool any_epoch = true);
  const DataKey* data_key(std::uint32_t epoch) const;
  std::uint32_t newest_epoch() const;  // 0: there is no session
  enum class Use : std::uint8_t { sectors, log_too };
  Error find_or_derive(std::uint32_t id, KeyLease& lease);
  Result<std::unique_ptr<SessionKeys>> derive(const SessionEntryRaw& entry, Use use) const;
  void put_head(AlignedBuffer& image) const;
  Task<Error> write_both(io::Queue& io, const io::File& file, const AlignedBuffer& image,
                         std::size_t first, std::size_t bytes);
  Task<Error> repair(io::Queue& io, const io::File& file);
  AlignedBuffer build_image() const;

  VolumeKeys& keys_;  // its data keys: mutex_
  std::atomic<std::uint32_t> epoch_;
  const MacKeys& mac_;
  const Uuid uuid_;
  const crypto::Suite suite_;
  std::uint64_t place_[2];
  std::uint32_t length_;
  std::uint32_t high_water_ = 0;
  bool needs_repair_ = false;
  std::uint32_t restored_ = 0;
  bool damaged_ = false;
  struct Known {
    SessionEntryRaw raw;
    std::size_t position;  // entry number in the table
    std::unique_ptr<SessionKeys> keys;
  };
  mutable std::mutex mutex_;
  std::unordered_map<std::uint32_t, Known> entries_;
  static constexpr std::size_t kRecent = 16;
  std::array<std::atomic<const SessionKeys*>, kRecent> recent_{};
};

}  // namespace pqblk::sealed
