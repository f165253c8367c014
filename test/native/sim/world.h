// The simulated machine: one thread, a virtual clock, queues and files, one event at a time.
//
// Room test/sim. Ready coroutines, turns of the run loops, timers and I/O completions are events;
// Choices picks the next one, so completions come in any order and queues interleave arbitrarily.
// The operations themselves go through io/operation.h, as those of the real engines do.
//
// A crash does not end a world. device(file).power_loss() or .killed() copies what a crash at this
// very moment would leave; another world goes on from there, while this one, which never learns of
// it, runs its coroutines to their natural end. So no frame is ever abandoned or destroyed while it
// is suspended, and one run can be crashed at every one of its steps.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/task.h"
#include "io/queue.h"
#include "sim/choices.h"
#include "sim/device.h"

namespace pqblk::sim {

class World;

class SimQueue final : public io::Queue {
 public:
  SimQueue(World& world, std::uint32_t index) : world_(world), index_(index) {}
  void submit(io::Op& op) override;
  void post(ReadyNode& node) override;
  void post_after(ReadyNode& node, std::uint64_t ns) override;
  void cut_short(ReadyNode& node) override;
  std::uint64_t now_ns() override;
  void run() override;  // runs the whole world until stop() and this queue is idle
  void stop() override { stopping_ = true; }
  void wake() override { turn_due_ = true; }
  std::string_view engine() const override { return "simulator"; }
  std::uint32_t index() const { return index_; }

 private:
  friend class World;
  World& world_;
  const std::uint32_t index_;
  std::deque<ReadyNode*> ready_;
  std::uint32_t in_flight_ = 0;
  bool turn_due_ = false;  // poll_hook and before_wait are to be called
  bool stopping_ = false;
};

// Each is a chance of one in n for an operation; 0: never.
struct FaultRates {
  std::uint32_t read_eio = 0;
  std::uint32_t write_eio = 0;
  std::uint32_t sync_eio = 0;
  std::uint32_t short_transfer = 0;
  std::uint32_t interrupted = 0;                     // EINTR
  std::uint64_t file_size_max = ~std::uint64_t{0};   // ENOSPC beyond
  std::uint64_t fail_operation = ~std::uint64_t{0};  // EIO for the nth operation (from 0), exactly
  std::uint64_t unreadable_at = ~std::uint64_t{0};   // EIO for whatever reads the byte there
};

struct WorldOptions {
  std::uint64_t steps_max = 1'000'000;
  std::uint32_t slow_one_in = 8;  // operations that take up to slow_steps steps (random only)
  std::uint32_t slow_steps = 150;
  // Run what is ready before anything completes: fewer schedules, none of them lost for one queue.
  bool ready_first = false;
  // What was begun last completes first: what is in flight stays so while anything else goes on.
  bool newest_first = false;
  bool check_buffers = true;  // a buffer that changes while it is being written is a failure
  FaultRates faults;
};

struct FileFacts {
  DeviceFacts device;
  bool direct = true;
  bool read_only = false;
  std::uint32_t align = 512;  // of memory, offsets and lengths when direct
};

enum class Outcome : std::uint8_t { done, idle, too_long };

class World {
 public:
  explicit World(Choices& choices, WorldOptions options = {});
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  SimQueue& add_queue();
  SimQueue& queue(std::size_t index) { return *queues_[index]; }
  // The File lives as long as the world.
  io::File& add_file(std::string name, Device device, FileFacts facts = {});
  Device& device(const io::File& file);

  // Starts a coroutine on that queue.
  void spawn(SimQueue& queue, Task<void> task);
  // One event; false when nothing is left to do.
  bool step();
  Outcome run_until(const std::function<bool()>& done);
  // Runs `task` on queue 0 to its end and returns its value; `fallback` when the world hangs.
  template <class T>
  T run(Task<T> task, T fallback);
  // Until nothing is in flight and nothing is ready (timers alone do not count).
  Outcome drain();

  std::uint64_t steps() const { return steps_; }
  std::uint64_t now_ns() const { return now_ns_; }
  // Grows with every change that a crash could show: writes begun and ended, syncs ended.
  std::uint64_t changes() const { return changes_; }
  std::uint64_t operations() const { return operations_; }
  std::uint64_t injected() const { return injected_; }  // EIO and ENOSPC given
  // After a failed fdatasync the cache shows what the medium may have lost for ever, and no opener
  // can find out before the next power loss.
  std::uint64_t failed_syncs() const { return failed_syncs_; }
  Choices& choices() { return choices_; }
  WorldOptions& options() { return options_; }
  // A broken rule that the world itself saw (a buffer changed in flight); empty when none.
  const std::string& violation() const { return violation_; }
  std::string pending() const;  // what a hung world waits for
  void trace(const std::string& line) const;
  static bool tracing();  // PQBLK_SIM_TRACE=1, or set_tracing(true)
  static void set_tracing(bool on);

 private:
  friend class SimQueue;
  struct Flight {
    io::Op* op = nullptr;
    SimQueue* queue = nullptr;
    std::uint64_t id = 0;
    std::uint64_t not_before = 0;  // steps
    std::uint64_t length = 0;      // of this transfer, bytes
    int refused = 0;               // a raw result decided at the start
    Device::WriteRef write;
    std::uint64_t sync = 0;
    std::vector<std::uint8_t> early;  // read: content taken before the completion,
    std::vector<bool> early_blocks;   // and which 512-byte blocks of it hold
  };
  struct Timer {
    std::uint64_t due_ns = 0;
    std::uint64_t order = 0;
    SimQueue* queue = nullptr;
    ReadyNode* node = nullptr;
  };
  struct OpenFile {
    std::unique_ptr<io::File> file;
    Device device;
  };
  enum class EventType : std::uint8_t { ready, timer, turn, completion };
  struct Event {
    EventType type;
    std::size_t index;
  };

  void submit(SimQueue& queue, io::Op& op);
  void start(Flight& flight);
  int check(const io::Op& op, std::uint64_t length) const;
  void start_write(Flight& flight);
  void start_fallocate(Flight& flight);
  void collect_ready();
  void collect_events();
  void run_event(Event event);
  void fire_timer(std::size_t index);
  void turn(SimQueue& queue);
  void complete(std::size_t index);
  int take_effect(Flight& flight);
  int finish_write(Flight& flight);
  int finish_read(Flight& flight);
  int finish_sync(Flight& flight);
  void serve_early(const Write& write, const Device& device);
  void check_buffer(const Flight& flight);
  OpenFile& open_file(const io::Op& op);
  std::string text(const Flight& flight) const;

  Choices& choices_;
  WorldOptions options_;
  std::vector<std::unique_ptr<SimQueue>> queues_;
  std::vector<OpenFile> files_;
  std::vector<Flight> flights_;  // in the order of issue
  std::vector<Timer> timers_;
  std::vector<Event> events_;
  std::uint64_t steps_ = 0, now_ns_ = 0, changes_ = 0, operations_ = 0;
  std::uint64_t injected_ = 0, failed_syncs_ = 0;
  std::uint32_t ready_streak_ = 0;  // coroutines resumed in a row
  std::uint64_t next_flight_ = 0, next_timer_ = 0;
  std::string violation_;
};

template <class T>
T World::run(Task<T> task, T fallback) {
  struct Slot {
    std::optional<T> value;
  };
  auto slot = std::make_shared<Slot>();
  spawn(queue(0), [](Task<T> inner, std::shared_ptr<Slot> out) -> Task<void> {
    out->value.emplace(co_await std::move(inner));
  }(std::move(task), slot));
  run_until([&] { return slot->value.has_value(); });
  return slot->value ? std::move(*slot->value) : std::move(fallback);
}

}  // namespace pqblk::sim
