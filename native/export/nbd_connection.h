// One NBD client in its transmission phase: requests in, replies out, on one queue of a disk.
//
// Room export/. Everything happens on that queue's thread, except where "any thread" is said. A
// request owns its slot and the slot its memory until the reply is sent, so a client that vanishes
// leaves nothing behind that I/O in flight could still write to. Memory is bounded: when the slots
// or bytes of a connection are used up, its socket is not read.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "export/nbd_negotiation.h"
#include "export/nbd_protocol.h"
#include "export/nbd_stream.h"
#include "image/disk.h"
#include "image/stats.h"
#include "io/operation.h"

namespace pqblk::exports::nbd {

inline constexpr std::uint32_t kSlotsMax = 256;             // requests of one connection at once
inline constexpr std::size_t kSlotMemoryMax = kPayloadMax;  // bytes of data they hold together
inline constexpr std::size_t kReceiveBytes = 256 * kKiB;    // headers and small payloads at once
inline constexpr std::size_t kBuffersKept = 4 * kMiB;       // free data buffers of a connection
inline constexpr std::size_t kKeptBufferMax = 1 * kMiB;     // larger ones go back at once
inline constexpr std::uint32_t kPiecesPerSend = 512;        // iovecs
inline constexpr std::uint32_t kRoundsPerTurn = 4;          // receives before others get a turn
inline constexpr std::uint32_t kStatusStepsMax = 4096;      // extents looked at for one reply

struct ConnectionCounters {                        // written by the queue's thread
  std::array<image::Counter, kCommands> commands;  // by Command, when they are answered
  image::Counter errors, refused;                  // failed by the disk, not allowed by us
  image::Counter received_bytes, sent_bytes;
};

class Connection;

// What a connection needs of its server. All of it from any thread.
class ConnectionOwner {
 public:
  virtual io::Queue& service() = 0;  // its thread may block for a while
  virtual void report(const std::string& text) = 0;
  virtual void failed(const Error& error, const std::string& what) = 0;
  virtual void ended(Connection& connection) = 0;  // the last call; destroys it
 protected:
  ~ConnectionOwner() = default;
};

class Connection {
 public:
  // `fast_zero`: zeroing costs the disk metadata only. `early`: what the client sent after its last
  // option.
  Connection(ConnectionOwner& owner, image::Disk& disk, std::uint32_t queue,
             std::unique_ptr<Stream> stream, const Agreement& agreement, bool fast_zero,
             std::span<const std::uint8_t> early);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // ---- any thread, while the owner keeps it ----
  void start();
  void stop();  // reads no more requests, answers what it has, ends
  void cut();   // ends as soon as its I/O is done
  // For how long a client that owes us something has been silent, and one that owes nothing. ns.
  std::uint64_t stalled_ns(std::uint64_t now) const { return silence(now, Waiting::client); }
  std::uint64_t idle_ns(std::uint64_t now) const { return silence(now, Waiting::idle); }
  const ConnectionCounters& counters() const { return counters_; }
  std::uint32_t queue() const { return queue_; }
  bool encrypted() const { return stream_->encrypted(); }

 private:
  // For whom the connection waits: its disk, a client in mid-message, or a client without wishes.
  enum class Waiting : std::uint8_t { disk, client, idle };
  struct Slot {
    image::Request request;
    iovec buffer{};
    Connection* connection = nullptr;
    Command command = Command::read;
    std::uint16_t flags = 0;
    std::uint64_t cookie = 0, offset = 0;
    std::uint32_t length = 0;
    std::uint8_t* data = nullptr;
    std::size_t capacity = 0;
    std::array<std::uint8_t, 96> head{};  // of the reply
    std::uint32_t head_size = 0, body_size = 0;
    Slot* next = nullptr;
  };
  struct Socket : io::Op {  // a poll of the socket
    Connection* connection = nullptr;
    bool armed = false;
  };

  void begin();
  void arm(Socket& poll, short events);
  static void socket_ready(io::Op& op);
  void turn();
  void receive();
  void take_payload(std::size_t arrived);
  void parse();
  bool parse_one();
  void accept(const RequestHeader& header);
  Errno check(Slot& slot) const;
  void launch(Slot& slot);
  static void completed(image::Request& request);
  void complete(Slot& slot);
  Task<void> block_status(Slot& slot);
  Error find_extents(const Slot& slot, std::vector<StatusEntry>& entries);
  void answer(Slot& slot);
  void answer_read(Slot& slot);
  void answer_error(Slot& slot, Errno error, std::string_view why);
  void send_later(Slot& slot);
  void flush();
  void sent(std::size_t bytes);
  void drop_output();
  void read_no_more() { reading_ = false; }
  void end_when_done();
  bool has_room(std::size_t bytes) const;
  Slot& take_slot();
  void release(Slot& slot);
  bool take_memory(Slot& slot, std::size_t bytes);
  void progress();
  std::uint64_t silence(std::uint64_t now, Waiting waiting) const;
  template <class T>
  static void set_head(Slot& slot, const T& head);

  ConnectionOwner& owner_;
  image::Disk& disk_;
  const std::uint32_t queue_;
  const std::unique_ptr<Stream> stream_;
  const Agreement agreement_;
  const bool fast_zero_;
  ConnectionCounters counters_;

  std::unique_ptr<std::uint8_t[]> received_;  // kReceiveBytes
  std::size_t begin_ = 0, end_ = 0;           // what of it is not parsed yet
  Slot* filling_ = nullptr;                   // a write whose payload is arriving
  std::size_t filled_ = 0;
  std::uint64_t skip_ = 0;  // payload of a refused write, still to be thrown away
  bool reading_ = true;
  bool paused_ = false;  // the next request waits for slots or memory
  bool broken_ = false;  // nothing can be sent any more

  Socket poll_in_, poll_out_;
  image::Deferred turn_later_;
  std::vector<std::unique_ptr<Slot>> slots_;
  Slot* free_slots_ = nullptr;
  std::uint32_t used_slots_ = 0;
  std::size_t used_memory_ = 0;
  std::array<std::vector<std::uint8_t*>, 9> free_buffers_;  // powers of two from 4 KiB
  std::size_t free_bytes_ = 0;
  std::uint32_t in_flight_ = 0;  // in the disk, or looking for extents
  Slot* out_head_ = nullptr;     // replies, in the order of completion
  Slot** out_end_ = &out_head_;
  std::size_t sent_of_head_ = 0;

  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> progress_ns_;
  std::atomic<Waiting> waiting_{Waiting::idle};
};

}  // namespace pqblk::exports::nbd
