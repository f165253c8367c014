// One I/O queue: a thread, its run loop, and asynchronous operations on files.
//
// Room io/: knows files as descriptors with facts, and memory as spans; it knows nothing of images,
// keys or guests. Implementations: io_uring, Linux AIO, a thread pool, and (under test/) the
// simulator. All of them share the operation state machine in operation.cc: short and interrupted
// transfers are resubmitted here, reads past the end of the file are filled with zeros, and an
// operation completes exactly once. A queue's operations may be submitted from its own thread only.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/task.h"

namespace pqblk::io {

// What the kernel told about an open file; made by storage/ (or by the simulator), passive here.
struct File {
  int fd = -1;
  std::uint64_t id = 0;  // of this open within the process; 0: made by hand, never registered
  std::string path;      // for messages only
  bool direct = false;   // opened with O_DIRECT
  bool read_only = false;
  // A completed write over what was written and synced before survives power loss (or tmpfs: kill
  // -9). The first one to a block of a file does not before the next fdatasync: see
  // keeps_new_blocks().
  bool non_volatile = false;
  bool atomic_4k = false;  // a 4096-byte aligned write is not torn by power loss
  bool block_device = false;
  bool in_memory = false;          // tmpfs: a transfer is a memory copy and waits for no device
  std::uint64_t size = 0;          // bytes when opened (a block device's capacity)
  std::uint32_t memory_align = 1;  // of buffers, bytes; 1 when buffered
  std::uint32_t offset_align = 1;  // of offsets and lengths, bytes

  // Whether that is true of any block. On a file system a block's first write changes its extent,
  // in memory and in a journal that the write does not wait for.
  bool keeps_new_blocks() const { return non_volatile && (block_device || in_memory); }
};

enum class OpType : std::uint8_t {
  read,
  write,
  fdatasync,
  fallocate,
  truncate,
  nop,
  poll,  // waits, maybe for ever, until a socket or the like is ready; no part of the ring's depth
};

enum class FallocateMode : std::uint8_t {
  allocate,  // reserve space, extend the file
  punch,     // deallocate, keep size; reads as zeros afterwards
  zero,      // zero a range, keep it allocated where the file system can
};

class Queue;

// One operation in flight. It owns nothing: the submitter keeps buffers and the Op itself alive
// until it completes. `completed` runs on the queue's thread; coroutines use the awaitables below.
struct Op : ReadyNode {
  OpType type = OpType::nop;
  FallocateMode mode = FallocateMode::allocate;
  const File* file = nullptr;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;  // fallocate, truncate (new size); else the sum of iov
  int poll_fd = -1;          // poll: a descriptor that stays open until the operation completes
  short poll_events = 0;     // poll: POLLIN, POLLOUT; errors and hang-ups complete it in any case
  iovec* iov = nullptr;      // read, write: advanced in place on short transfers
  std::uint32_t iov_count = 0;
  iovec single{};                    // storage for the common one-buffer case
  int buffer_index = -1;             // registered buffer of this queue that holds `single`, or -1
  int result = 0;                    // 0, or a negative errno, once complete
  std::uint64_t done = 0;            // bytes transferred so far
  std::uint16_t retries = 0;         // of operation.cc: completions without progress
  std::uint8_t stage = 0;            // of operation.cc: step of an emulated operation
  void (*completed)(Op&) = nullptr;  // null: resume `handle`
};

// What the engine got from the kernel, and counts since it was made.
struct QueueFacts {
  std::string engine;                  // for people: "io_uring (single issuer, deferred work)"
  std::uint64_t operations = 0;        // submitted
  std::uint64_t resubmitted = 0;       // short or interrupted transfers that went on
  std::uint64_t kernel_entries = 0;    // system calls that submitted, reaped or waited
  std::uint64_t sleeps = 0;            // of those, the ones that could block
  std::uint64_t fixed_buffer_ops = 0;  // transfers through a registered buffer
  std::uint64_t fixed_file_ops = 0;    // transfers through a registered file
  bool buffers_registered = false;
  std::uint32_t files_registered = 0;
};

class Queue : public Executor {
 public:
  // Submission is batched: nothing reaches the kernel before the run loop's next turn.
  virtual void submit(Op& op) = 0;
  // Runs until stop(); the calling thread becomes this queue's thread, for good.
  virtual void run() = 0;
  // Any thread. run() returns once no operation is in flight and nothing is ready to run. A
  // coroutine that still sleeps (post_after) then is never resumed: its owner ends it before.
  virtual void stop() = 0;
  virtual std::string_view engine() const = 0;  // "io_uring", "aio", "threads", "simulator"
  // Called on the queue's thread once for each turn of the loop, before it would block, to let
  // owners submit what they gathered (the log's open block). May be empty.
  std::function<void()> before_wait;
  // Wakes a blocked run loop from any thread (used with poll_hook below).
  virtual void wake() = 0;
  // Called once for each turn of the loop (own thread): picks up requests handed over by others.
  // Returns true when it did something.
  std::function<bool()> poll_hook;

  // Registers a long-lived buffer arena or a file with the ring, where the engine can use it; a
  // failure is not an error (the engine goes on without) but is visible in facts(). Callable from
  // any thread, also while the queue runs; the call returns when it is done. A registered file must
  // be unregistered before it is closed: the ring holds its description, and so its lock, open.
  // register_buffers() replaces what was registered before; no operation may be in flight on it.
  virtual void register_buffers(std::span<const iovec> buffers) { static_cast<void>(buffers); }
  virtual void register_file(const File& file) { static_cast<void>(file); }
  virtual void unregister_file(const File& file) { static_cast<void>(file); }
  virtual QueueFacts facts() { return {.engine = std::string(engine())}; }  // any thread

  // ---- awaitables; each returns an Error (ok on success), with the operation and offset set ----
  struct Await : Op {
    Queue& queue;
    explicit Await(Queue& q) : queue(q) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      if (iov == nullptr) {
        iov = &single;
        iov_count = 1;
      }
      queue.submit(*this);
    }
    Error await_resume() const {
      if (result == 0) [[likely]]
        return {};
      return failure();
    }
    Error failure() const;
  };
  Await read(const File& file, std::uint64_t offset, void* data, std::size_t size);
  Await write(const File& file, std::uint64_t offset, const void* data, std::size_t size);
  // The iovec array is the operation's to change until it completes.
  Await readv(const File& file, std::uint64_t offset, std::span<iovec> iov);
  Await writev(const File& file, std::uint64_t offset, std::span<iovec> iov);
  Await fdatasync(const File& file);
  Await fallocate(const File& file, FallocateMode mode, std::uint64_t offset, std::uint64_t length);
  Await truncate(const File& file, std::uint64_t size);
  // Until poll(2) would report one of `events` (POLLIN, POLLOUT), an error or a hang-up. There is
  // no way to take it back: shutdown(2) of a socket or a write to an eventfd completes it.
  Await poll(int fd, short events);
  // co_await sleep(ns): resumes on this queue no earlier than that. Simulated time in the
  // simulator.
  struct Sleep : ReadyNode {
    Queue& queue;
    std::uint64_t ns;
    Sleep(Queue& q, std::uint64_t n) : queue(q), ns(n) {}
    bool await_ready() const noexcept { return ns == 0; }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      queue.post_after(*this, ns);
    }
    void await_resume() const noexcept {}
  };
  Sleep sleep(std::uint64_t ns) { return Sleep(*this, ns); }
  virtual void post_after(ReadyNode& node, std::uint64_t ns) = 0;  // own thread only
  // Own thread only: a sleep that has not ended ends now. Nothing for a node that does not sleep.
  virtual void cut_short(ReadyNode& node) = 0;
};

enum class EngineType : std::uint8_t { automatic, uring, aio, threads };

struct QueueOptions {
  EngineType engine =
      EngineType::automatic;  // automatic: io_uring, else threads; the cause is kept
  std::uint32_t depth = 256;  // operations in the ring at once; more wait inside
  bool sqpoll = false;
  std::uint32_t spin_us = 0;  // poll this long before sleeping when idle
};

// `fallback_cause`, when not null, receives why io_uring was refused (seccomp, sysctl, old kernel).
Result<std::unique_ptr<Queue>> make_queue(const QueueOptions& options,
                                          std::string* fallback_cause = nullptr);

}  // namespace pqblk::io
