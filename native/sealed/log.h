// The log: blocks of records that make every overwrite recoverable (docs/format.md section 6,
// docs/write-protocol.md).
//
// Room sealed/: appends records and keeps the overlay in step with them, writes blocks, and knows
// which of them are written, durable and covered. It never decides what class a write is, and it
// never touches a home place.
//
// Watermarks, all in block sequence numbers:
//   written   every block up to here has completed its write
//   durable   ... and an fdatasync that began later has succeeded (governs O1 and zeroed N)
//   complete  every block up to here is written and so is the data its records speak of
//   covered   `complete` as it was when an fdatasync began that succeeded (permits redo)
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/short_lock.h"
#include "base/sync.h"
#include "base/task.h"
#include "io/queue.h"
#include "sealed/cipher_pool.h"
#include "sealed/extension.h"
#include "sealed/layout.h"
#include "sealed/overlay.h"
#include "sealed/sessions.h"

namespace pqblk::sealed {

// The log header's values (the newest valid copy).
struct LogHeader {
  std::uint64_t serial = 0;
  Uuid log_uuid{};
  std::uint64_t generation = 0;
  std::uint32_t session = 0;
  std::uint64_t tail_page = 0;
  std::uint64_t tail_sequence = 0;
  std::array<std::uint8_t, 16> previous_mac{};
  // The other copy may have been the newer one: the medium does not give it out, or it does not
  // hold.
  bool other_unreadable = false;
  bool other_damaged = false;
  bool alone() const { return other_unreadable || other_damaged; }
};

void build_log_header(const LogHeader& header, const MacKeys& mac, const Uuid& volume,
                      std::span<std::uint8_t, sizeof(LogHeaderRaw)> out);
Task<Result<LogHeader>> read_log_header(io::Queue& io, const io::File& file,
                                        const Extension& extension, const MacKeys& mac);

class Log {
 public:
  // What the references name outlives the log. `retain_max`: bytes of ciphertext kept in memory
  // until written home.
  Log(const io::File& file, const Extension& extension, const MacKeys& mac, Overlay& overlay,
      CipherPool& pool, std::uint64_t retain_max);
  ~Log();

  // ---- life ----
  void adopt(const LogHeader& header) { header_ = header; }  // as found at open
  // Makes a new, empty generation durable: before a session's first record, and at the end of
  // recovery (`session` null: no records can follow).
  Task<Error> begin_generation(io::Queue& io, const SessionKeys* session);
  bool active() const { return session() != nullptr; }
  const SessionKeys* session() const { return session_.load(std::memory_order_acquire); }
  // Waits until every block handed out is written. Quiesced.
  Task<Error> settle();

  // ---- appending ----
  static constexpr std::uint32_t kReceiptBlocks = 12;
  // Which blocks hold an operation's records, and in which of them data is still to complete.
  struct Receipt {
    std::uint64_t last = 0;  // sequence; 0: nothing appended
    std::uint32_t blocks = 0;
    std::array<std::pair<std::uint64_t, std::uint32_t>, kReceiptBlocks> pending{};
    void count(std::uint64_t sequence);
  };
  // Pages an operation's records can take at most, spread over so many appenders.
  static std::uint32_t pages_for(std::uint32_t records, std::uint32_t payload_pages,
                                 std::uint32_t appends);
  std::uint64_t ring_pages() const { return ring_pages_; }

  // Space reserved ahead of an append (I8); given back when it dies.
  class Room {
   public:
    Room() = default;
    Room(Log* log, std::uint32_t pages) : log_(log), pages_(pages) {}
    Room(Room&& o) noexcept
        : log_(std::exchange(o.log_, nullptr)), pages_(std::exchange(o.pages_, 0)) {}
    Room& operator=(Room&& o) noexcept {
      std::swap(log_, o.log_);
      std::swap(pages_, o.pages_);
      return *this;
    }
    ~Room() {
      if (log_ != nullptr) log_->unreserve(pages_);
    }

   private:
    Log* log_ = nullptr;
    std::uint32_t pages_ = 0;
  };
  // Waits for a checkpoint when the log is full. `pages` <= ring_pages() / 4.
  Task<Result<Room>> reserve(std::uint32_t pages);

  // Holds the log's lock: append all records of one operation, then let it go out of scope and
  // call launch(). Overlay and log change together. Needs room reserved before.
  class Appender {
   public:
    explicit Appender(Log& log) : log_(log), guard_(log.mutex_) {}
    ~Appender();
    Appender(const Appender&) = delete;
    Appender& operator=(const Appender&) = delete;
    // Sectors one after the other. Their ciphertext, that of the first at `cipher`, is being
    // written home; it serves readers until it has landed.
    void w(Sector first, std::span<const Entry> entries, const CipherRef& cipher);
    // The ciphertext goes into the log.
    void wd(Sector s, const Entry& entry, CipherRef cipher);
    void z(Sector first, std::uint64_t count);
    // For slots of data clusters and of entry clusters; updates the overlay's mapping.
    // `with_data`: the cluster replaces one whose content still counts, so the MAP may be covered
    // only together with the data that this operation writes there (I3). Readers see the new
    // mapping when the Appender goes, after the sectors that came with it.
    void map(MapKind kind, Slot slot, std::uint64_t new_entry, std::uint64_t old_entry,
             bool with_data = false);
    const Receipt& receipt() const { return receipt_; }
    // Is there room for so many pages more, so that nothing need be reserved before?
    bool fits(std::uint32_t pages) const { return log_.fits_locked(pages); }
    // The log is so full that on_pressure() is due, once the Appender is gone.
    bool pressed() const { return log_.used_pages_locked() > log_.pressure_pages(); }
    // A block was begun: launch() is due. Without it there is nothing to launch.
    bool began_block() const { return began_block_; }

   private:
    std::uint8_t* record(std::size_t bytes, bool payload);
    Log& log_;
    std::lock_guard<ShortLock> guard_;
    Receipt receipt_;
    bool began_block_ = false;
    struct Mapped {
      Slot slot;
      std::uint64_t new_entry, old_entry, sequence;
    };
    std::vector<Mapped> mapped_;
  };
  // Starts the writes of blocks opened by appenders; call after an Appender is gone, same thread.
  void launch(io::Queue& io);

  // ---- waiting ----
  Task<Error> wait_written(std::uint64_t sequence);  // the condition of every acknowledgement (I6)
  // The same; error() says whether it is so or the log has failed.
  Watermark::Reach reach_written(std::uint64_t sequence) { return written_.reach(sequence); }
  Task<Error> wait_durable(io::Queue& io, std::uint64_t sequence);
  void data_done(const Receipt& receipt);  // all data of an operation has completed
  void data_done(std::uint64_t sequence);  // that of one record of this block
  // One fdatasync, shared by those who came before it was issued.
  Task<Error> flush(io::Queue& io);
  // An fdatasync for others than the log's records. Every one of an open image goes through here or
  // flush(), one at a time: when one fails, the system may have dropped what was written, log
  // blocks among it, and a later one that succeeds says nothing of that. So a failure ends all
  // writing.
  Task<Error> sync(io::Queue& io);
  std::uint64_t durable() const { return durable_.value(); }
  std::uint64_t covered() const { return covered_.value(); }
  std::uint64_t last_sequence() const;

  // ---- checkpoint ----
  struct Cut {
    std::uint64_t sequence = 0;  // of the last block before the cut
    std::uint64_t page = 0;      // virtual page after it
    std::array<std::uint8_t, 16> mac{};
  };
  // Locks are host-local: on shared storage only the header tells that another host writes here
  // too. Then nothing more is written (Kind::locked).
  Task<Error> confirm_header(io::Queue& io);
  // Freezes the overlay and the log at one point. Precondition: the overlay's frozen half is empty.
  Cut freeze();
  Task<Error> wait_complete(std::uint64_t sequence);
  // Makes the tail durable and frees the space before it.
  Task<Error> advance_tail(io::Queue& io, const Cut& cut);
  // Writes the header once more, so that both copies name this session and this tail. No checkpoint
  // runs and no session begins meanwhile.
  Task<Error> repeat_header(io::Queue& io);
  std::uint64_t used_pages() const;
  // A checkpoint is due: on_pressure was called, perhaps in vain while another one was running.
  bool pressed() const;
  std::function<void()> on_pressure;  // asks for a checkpoint; any thread

  // Sticky: after it nothing more is acknowledged.
  void fail(const Error& error);
  Error error() const;
  bool failed() const { return failed_.load(std::memory_order_acquire); }

  std::uint64_t bytes_written() const { return bytes_written_.load(std::memory_order_relaxed); }

 private:
  struct Block;
  friend class Appender;

  // All under mutex_:
  Block& open_block(std::uint32_t record_bytes, bool payload);
  void start_block(bool skip);
  void seal(Block& block);
  void authenticate(Block& block);
  std::uint64_t place_of(std::uint64_t virtual_page) const;
  void one_done(std::uint64_t sequence, std::uint32_t count);
  void advance_marks(std::uint64_t& written, std::uint64_t& complete);
  void unreserve(std::uint32_t pages);
  std::uint64_t used_pages_locked() const;
  bool fits_locked(std::uint32_t pages) const {
    return used_pages_locked() + reserved_pages_ + pages + 2 <= ring_pages_;
  }
  std::uint64_t pressure_pages() const { return ring_pages_ * 3 / 8; }

  Task<void> write_block(io::Queue& io, Block* block);
  Task<Error> write_header(io::Queue& io, const LogHeader& header);
  void release_payload(Block& block);
  void block_written(Block* block);

  const io::File& file_;
  const Extension& extension_;
  const MacKeys& mac_;
  Overlay& overlay_;
  CipherPool& pool_;
  const std::uint64_t retain_max_;
  const std::uint64_t ring_pages_;
  LogHeader header_;
  std::atomic<const SessionKeys*> session_{nullptr};  // set while nothing is appended

  mutable ShortLock mutex_;
  std::deque<std::unique_ptr<Block>> blocks_;  // not yet complete, in order
  std::size_t written_prefix_ = 0;             // of blocks_
  Block* open_ = nullptr;
  std::vector<Block*> to_launch_;
  std::uint64_t next_sequence_ = 1;
  std::uint64_t head_page_ = 0;  // virtual: counts up for ever
  std::uint64_t tail_page_ = 0;  // durable
  std::uint64_t reserved_pages_ = 0;
  std::uint64_t waiting_ = 0;  // for space
  std::array<std::uint8_t, 16> last_mac_{};
  Error error_;
  std::atomic<bool> failed_{false};

  Watermark written_, durable_, complete_, covered_, freed_;
  AsyncMutex flush_lock_;
  std::atomic<std::uint64_t> flush_asked_{0};
  std::uint64_t flush_done_ = 0;  // flush_lock_
  std::atomic<std::uint64_t> bytes_written_{0};
};

}  // namespace pqblk::sealed
