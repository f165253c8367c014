// The thread pool engine: blocking calls on helper threads, for where io_uring is barred.
//
// Room io/. The loop's thread only hands operations over and collects them; it sleeps on its
// eventfd.

#include "io/engines.h"
#include "io/event_wait.h"
#include "io/loop.h"
#include "io/workers.h"

namespace pqblk::io {

namespace {

class Threads final : public Loop {
 public:
  explicit Threads(const QueueOptions& options) : Loop(options), workers_(*this, options.depth) {
    facts_.engine = "threads (blocking calls)";
  }
  std::string_view engine() const override { return "threads"; }
  using Loop::open_event;

 protected:
  void start(Op& op) override {
    if (op.type == OpType::poll) return polls_.add(op);
    batch_.push(op);
  }

  void exchange(std::uint64_t wait_ns) override {
    if (!batch_.empty()) workers_.perform_all(batch_.take());
    NodeList<Op> done = workers_.collect(facts_.resubmitted);
    const bool sleeps = done.empty() && wait_ns > 0;
    NodeList<Op> ready;
    if (sleeps || !polls_.empty()) {
      ++facts_.kernel_entries;
      ready = polls_.wait(event_fd(), sleeps ? wait_ns : 0);
    }
    if (sleeps) done = workers_.collect(facts_.resubmitted);
    while (Op* op = ready.pop()) finished(*op);
    while (Op* op = done.pop()) finished(*op);
  }

 private:
  NodeList<Op> batch_;
  EventWait polls_;
  Workers workers_;
};

}  // namespace

Result<std::unique_ptr<Queue>> make_threads(const QueueOptions& options) {
  auto queue = std::make_unique<Threads>(options);
  if (Error e = queue->open_event()) return e;
  return std::unique_ptr<Queue>(std::move(queue));
}

}  // namespace pqblk::io
