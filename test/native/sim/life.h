// One life of an image: opened in a world of its own, read, written, and left by a crash or a
// close.
//
// Room test/sim. A Life joins a World, a Backend and a Model. The runner starts one activity after
// the other (open, verify, a workload, close) and steps the world; at any step it may take a crash
// image. A life always ends in peace: finish() lets all coroutines end and closes the backend, also
// after the crash from which another life goes on.
#pragma once

#include <coroutine>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "sim/model.h"
#include "sim/subject.h"
#include "sim/world.h"

namespace pqblk::sim {

enum class OpType : std::uint8_t {
  write,
  write_fua,
  write_cluster,  // all sectors of the cluster that `sector` is in
  zero,
  zero_unmap,
  discard,
  read,
  flush,
  extent,
  checkpoint,  // these three only where the subject has them
  checkpoint_full,
  relocate,  // the cluster of `sector`
  count_
};
std::string_view op_type_name(OpType type);

struct OpSpec {
  OpType type = OpType::read;
  std::uint64_t sector = 0;
  std::uint64_t count = 1;
  std::string text() const;
};

// Exclusive ranges of sectors, first come first served, as the disk's range locks are.
class SectorLocks {
 public:
  explicit SectorLocks(std::uint64_t sectors) : busy_(sectors) {}
  bool is_free(std::uint64_t first, std::uint64_t count) const;
  struct Acquire : ReadyNode {
    SectorLocks& locks;
    std::uint64_t first, count;
    Executor* home = Executor::current();
    Acquire(SectorLocks& l, std::uint64_t f, std::uint64_t n) : locks(l), first(f), count(n) {}
    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> h);
    void await_resume() const noexcept {}
  };
  Acquire acquire(std::uint64_t first, std::uint64_t count) { return {*this, first, count}; }
  void release(std::uint64_t first, std::uint64_t count);

 private:
  bool blocked(const Acquire& by, std::size_t waiters_before) const;
  void take(std::uint64_t first, std::uint64_t count, bool value);
  std::vector<bool> busy_;
  std::deque<Acquire*> waiters_;
};

struct LifeOptions {
  std::uint32_t queues = 2;  // of the guest; the service queue comes on top
  WorldOptions world;
  bool check_closed = true;  // the subject's check, where it has one
};

class Life {
 public:
  Life(const Subject& subject, Device image, Model model, Choices& choices,
       const LifeOptions& options);
  ~Life();
  Life(const Life&) = delete;
  Life& operator=(const Life&) = delete;

  // ---- activities; each is over when busy() is false ----
  void open();
  void verify();  // reads everything and settles the model
  // Runs the operations in order, `clients` at a time.
  void run_program(std::vector<OpSpec> program, std::uint32_t clients);
  // Draws `operations` of them from the choices instead.
  void run_random(std::uint32_t operations, std::uint32_t clients);
  void close();

  bool busy() const { return active_ > 0 && failure_.empty(); }
  // One event. A world that stands still while an activity is not over has hung: a failure.
  void step();
  void run() {
    while (busy()) step();
  }
  // Ends everything in peace: no further operations begin, the backend is closed and destroyed.
  // After a failure nothing more happens: what is suspended then stays so for ever.
  void finish();

  bool is_open() const { return backend_ != nullptr; }
  bool closed_well() const { return closed_well_; }  // close() succeeded
  const std::string& failure() const { return failure_; }
  World& world() { return *world_; }
  Model& model() { return model_; }
  const Device& device() { return world_->device(*file_); }
  // Grows with every change that a crash could tell apart.
  std::uint64_t changes() const { return world_->changes() + model_changes_; }

 private:
  Task<void> do_open();
  Task<void> do_verify();
  Task<void> do_close();
  Task<void> client(std::uint32_t number);
  Task<Error> run_op(image::QueueContext& q, const OpSpec& op);
  Task<Error> write(image::QueueContext& q, const OpSpec& op);
  Task<Error> zero(image::QueueContext& q, const OpSpec& op);
  Task<Error> read(image::QueueContext& q, const OpSpec& op);
  Task<Error> extent(image::QueueContext& q, const OpSpec& op);
  Task<Error> flush(image::QueueContext& q);
  Task<Error> relocate(image::QueueContext& q, const OpSpec& op);
  bool next_op(OpSpec& op);
  OpSpec random_op();
  OpSpec within_disk(OpSpec op) const;
  void check_closed();
  void start(SimQueue& queue, Task<void> activity);
  void fail(std::string what);
  bool excusable(const Error& error) const;
  image::QueueContext& service() { return *contexts_.back(); }

  const Subject& subject_;
  Choices& choices_;
  const LifeOptions options_;
  std::unique_ptr<World> world_;
  std::vector<std::unique_ptr<image::QueueContext>> contexts_;
  io::File* file_ = nullptr;
  std::unique_ptr<image::Backend> backend_;
  Model model_;
  SectorLocks locks_;
  std::vector<OpSpec> program_;
  std::size_t next_ = 0;
  std::uint32_t random_left_ = 0;
  std::uint32_t active_ = 0;
  std::uint64_t model_changes_ = 0;
  bool closed_ = false;
  bool closed_well_ = false;
  bool finished_ = false;  // else coroutines may be suspended, and are left where they are
  std::string failure_;
};

}  // namespace pqblk::sim
