// The Linux AIO engine, by its raw system calls.
//
// Room io/. AIO is asynchronous for O_DIRECT transfers (and, since Linux 4.18, fdatasync);
// io_submit would block this queue's thread for anything else, so buffered files, fallocate and
// truncate go to helper threads. Completions and wake-ups meet in one eventfd.

#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "io/engines.h"
#include "io/event_wait.h"
#include "io/loop.h"
#include "io/workers.h"

namespace pqblk::io {

namespace {

constexpr unsigned kEventsPerCall = 64;

class Aio final : public Loop {
 public:
  explicit Aio(const QueueOptions& options)
      : Loop(options), blocks_(options.depth), workers_(*this, options.depth) {
    facts_.engine = "Linux AIO";
    free_.reserve(options.depth);
    prepared_.reserve(options.depth);
    for (iocb& block : blocks_) free_.push_back(&block);
  }
  ~Aio() override {
    if (context_ != 0) ::syscall(SYS_io_destroy, context_);
  }
  std::string_view engine() const override { return "aio"; }

  Error open() {
    if (Error e = open_event()) return e;
    if (::syscall(SYS_io_setup, depth(), &context_) == 0) return {};
    const int err = errno;
    std::string cause = std::string("io_setup failed: ") + std::strerror(err);
    if (err == EAGAIN) cause = "the sysctl fs.aio-max-nr leaves no room for more AIO operations";
    if (err == ENOSYS) cause = "this kernel has no AIO, or a seccomp filter hides it (ENOSYS)";
    if (err == EPERM) cause = "a seccomp filter refuses io_setup (EPERM)";
    return Error(Kind::unsupported, std::move(cause)).at("open aio");
  }

 protected:
  void start(Op& op) override {
    if (op.type == OpType::poll) {
      polls_.add(op);
    } else if (asynchronous(op)) {
      prepare(op);
    } else {
      blocking_.push(op);
    }
  }

  void exchange(std::uint64_t wait_ns) override {
    const bool refused = submit_prepared();
    if (!blocking_.empty()) workers_.perform_all(blocking_.take());
    const bool reaped = reap();
    const bool sleeps = !refused && !reaped && wait_ns > 0;
    if (!sleeps && polls_.empty()) return;
    ++facts_.kernel_entries;
    NodeList<Op> ready = polls_.wait(event_fd(), sleeps ? wait_ns : 0);
    while (Op* op = ready.pop()) finished(*op);
    if (sleeps) reap();
  }

 private:
  bool asynchronous(const Op& op) const {
    if (op.type == OpType::fdatasync) return fdsync_works_;
    return (op.type == OpType::read || op.type == OpType::write) && op.file->direct;
  }

  void prepare(Op& op) {
    assert(!free_.empty());  // no more operations are started than the depth
    iocb& block = *free_.back();
    free_.pop_back();
    block = {};
    block.aio_data = reinterpret_cast<std::uint64_t>(&op);
    block.aio_fildes = static_cast<std::uint32_t>(op.file->fd);
    block.aio_flags = IOCB_FLAG_RESFD;
    block.aio_resfd = static_cast<std::uint32_t>(event_fd());
    if (op.type == OpType::fdatasync) {
      block.aio_lio_opcode = IOCB_CMD_FDSYNC;
    } else {
      block.aio_lio_opcode = op.type == OpType::read ? IOCB_CMD_PREADV : IOCB_CMD_PWRITEV;
      block.aio_buf = reinterpret_cast<std::uint64_t>(op.iov);
      block.aio_nbytes = transfer_count(op);
      block.aio_offset = static_cast<std::int64_t>(op.offset + op.done);
    }
    prepared_.push_back(&block);
  }

  static Op& op_of(const iocb& block) { return *reinterpret_cast<Op*>(block.aio_data); }

  // io_submit takes a prefix; the first block it refuses gets the error, the rest goes again. True
  // when an operation got its result here.
  bool submit_prepared() {
    bool refused_any = false;
    std::vector<iocb*>& batch = submitting_;
    batch.swap(prepared_);  // a refused block may start others
    std::size_t at = 0;
    while (at < batch.size()) {
      ++facts_.kernel_entries;
      const long r = ::syscall(SYS_io_submit, context_, batch.size() - at, batch.data() + at);
      if (r > 0) {
        at += static_cast<std::size_t>(r);
        continue;
      }
      const int err = r == 0 ? EAGAIN : errno;
      refused_any = true;
      iocb& refused = *batch[at++];
      Op& op = op_of(refused);
      free_.push_back(&refused);
      if (op.type == OpType::fdatasync && (err == EINVAL || err == EOPNOTSUPP)) {
        fdsync_works_ = false;  // an old kernel or a file system without it
        blocking_.push(op);
      } else {
        settle(op, -err);
      }
    }
    batch.clear();
    return refused_any;
  }

  bool reap() {
    bool any = false;
    NodeList<Op> done = workers_.collect(facts_.resubmitted);
    while (Op* op = done.pop()) {
      any = true;
      finished(*op);
    }
    io_event events[kEventsPerCall];
    for (;;) {
      if (free_.size() + prepared_.size() == blocks_.size()) return any;  // none in the kernel
      timespec now{};
      ++facts_.kernel_entries;
      const long n = ::syscall(SYS_io_getevents, context_, 0L, long{kEventsPerCall}, events, &now);
      if (n < 0 && errno != EINTR) {
        std::fprintf(stderr, "pqblk: io_getevents: %s\n", std::strerror(errno));
        std::abort();
      }
      for (long i = 0; i < n; ++i) {
        free_.push_back(reinterpret_cast<iocb*>(events[i].obj));
        settle(*reinterpret_cast<Op*>(events[i].data), static_cast<int>(events[i].res));
      }
      any = any || n > 0;
      if (n < long{kEventsPerCall}) return any;
    }
  }

  aio_context_t context_ = 0;
  bool fdsync_works_ = true;
  std::vector<iocb> blocks_;
  std::vector<iocb*> free_;
  std::vector<iocb*> prepared_;
  std::vector<iocb*> submitting_;
  NodeList<Op> blocking_;
  EventWait polls_;
  Workers workers_;
};

}  // namespace

Result<std::unique_ptr<Queue>> make_aio(const QueueOptions& options) {
  auto queue = std::make_unique<Aio>(options);
  if (Error e = queue->open()) return e;
  return std::unique_ptr<Queue>(std::move(queue));
}

}  // namespace pqblk::io
