// The io_uring engine.
//
// Room io/. Operations become entries as they are submitted and reach the kernel in one system call
// per turn of the loop, the same call that reaps and waits. The ring is made disabled and enabled
// on the thread that runs it, so that the kernel may rely on a single issuer and defer completion
// work until that thread asks for it.

#include <liburing.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cassert>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/units.h"
#include "io/engines.h"
#include "io/loop.h"

namespace pqblk::io {

namespace {

constexpr unsigned kFilesMax = 64;            // registered files of one ring
constexpr std::size_t kFixedBuffersMax = 64;  // registered buffers of one ring
// Bytes. One that large comes out of long work (a seal, a copy): it does not wait for the same work
// of everyone else who is ready, during which the device would run dry.
constexpr std::uint64_t kLargeTransfer = 256 * kKiB;
// What the completions of one reap start goes to the kernel in groups of so many entries. Of one
// while the processor waits for the device now and then: a system call costs time that nobody
// needs, and the device has its next work at once instead of with the last of the batch. Of some
// when completions were there at each of the last entries: then the system calls are what is dear.
constexpr unsigned kGroupIdle = 1;
constexpr unsigned kGroupBusy = 8;
constexpr unsigned kBusyEntries = 64;                   // in a row
constexpr std::size_t kFixedBufferBytesMax = 1U << 30;  // the kernel's bound for one buffer
constexpr std::size_t kTransferBytesMax = 1U << 30;     // of one entry; longer ones are resubmitted
constexpr unsigned kSqpollIdleMs = 50;
constexpr unsigned kFeatures = IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;  // Linux 5.11

// Setup flags from the best to what the oldest kernel with kFeatures knows.
struct Variant {
  unsigned flags;
  const char* text;
};
constexpr unsigned kCommon = IORING_SETUP_R_DISABLED | IORING_SETUP_CLAMP;
constexpr Variant kVariants[] = {
    {kCommon | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
         IORING_SETUP_TASKRUN_FLAG,
     "io_uring (single issuer, deferred work)"},  // Linux 6.1
    {kCommon | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN |
         IORING_SETUP_TASKRUN_FLAG,
     "io_uring (single issuer, cooperative work)"},  // Linux 6.0
    {kCommon | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
     "io_uring (cooperative work)"},  // Linux 5.19
    {kCommon, "io_uring"},
};
// A polling kernel thread does the completion work itself and refuses the cooperative flags.
constexpr Variant kSqpollVariants[] = {
    {kCommon | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_SQPOLL,
     "io_uring (kernel submission thread, single issuer)"},
    {kCommon | IORING_SETUP_SQPOLL, "io_uring (kernel submission thread)"},
};

// The ring is this process's only way to its data; going on without it would lose writes silently.
[[noreturn]] void ring_broken(const char* what, int err) {
  std::fprintf(stderr, "pqblk: io_uring: %s: %s\n", what, std::strerror(err));
  std::abort();
}

class Uring final : public Loop {
 public:
  explicit Uring(const QueueOptions& options) : Loop(options) {}
  ~Uring() override {
    if (ring_.ring_fd >= 0) io_uring_queue_exit(&ring_);
  }
  std::string_view engine() const override { return "io_uring"; }

  Error open(bool sqpoll);

 protected:
  void attach() override;
  void detach() override;
  void start(Op& op) override;
  void exchange(std::uint64_t wait_ns) override;
  void on_register_buffers(std::span<const iovec> buffers) override;
  void on_register_file(const File& file) override;
  void on_unregister_file(const File& file) override;

 private:
  struct FixedFile {
    std::uint64_t id = 0;
    int fd = -1;
  };

  int set_up(std::span<const Variant> variants, io_uring_params& params);
  io_uring_sqe* next_entry();
  void prepare_transfer(Op& op, io_uring_sqe& entry);
  void use_fixed_file(const File& file, io_uring_sqe& entry);
  int fixed_buffer_of(const Op& op) const;
  void arm_wake();
  void enter(std::uint64_t wait_ns);
  bool kernel_has_work() const;
  void submit_early();
  void reap();

  io_uring ring_{.ring_fd = -1};
  bool work_is_flagged_ = false;  // IORING_SQ_TASKRUN tells whether the kernel has work for us
  unsigned busy_entries_ = 0;     // into the kernel, since one at which nothing had completed
  bool wake_armed_ = false;
  std::uint64_t wake_count_ = 0;  // where the armed read of the eventfd lands
  std::vector<iovec> fixed_buffers_;
  std::vector<FixedFile> fixed_files_;  // by slot; empty when the kernel has no table for us
  std::vector<std::int16_t> slot_of_fd_;
};

int Uring::set_up(std::span<const Variant> variants, io_uring_params& params) {
  int r = -EINVAL;
  for (const Variant& variant : variants) {
    params = {};
    params.flags = variant.flags;
    params.sq_thread_idle = kSqpollIdleMs;
    r = io_uring_queue_init_params(depth(), &ring_, &params);
    facts_.engine = variant.text;
    if (r != -EINVAL) break;
  }
  if (r < 0) ring_.ring_fd = -1;
  return r;
}

Error Uring::open(bool sqpoll) {
  if (Error e = open_event()) return e;
  io_uring_params params{};
  const int r = sqpoll ? set_up(kSqpollVariants, params) : set_up(kVariants, params);
  if (r < 0) return Error(Kind::unsupported, uring_refusal(-r)).at("open io_uring");
  if ((params.features & kFeatures) != kFeatures) {
    return Error(Kind::unsupported, "this kernel's io_uring is too old; Linux 5.11 is needed");
  }
  work_is_flagged_ = (params.flags & IORING_SETUP_TASKRUN_FLAG) != 0;
  if (io_uring_register_files_sparse(&ring_, kFilesMax) == 0) fixed_files_.resize(kFilesMax);
  return {};
}

void Uring::attach() {
  // By hand: liburing 2.3 declares io_uring_enable_rings() but does not export it.
  if (::syscall(__NR_io_uring_register, ring_.ring_fd, IORING_REGISTER_ENABLE_RINGS, nullptr, 0) <
      0) {
    ring_broken("enabling the ring (a queue runs once, on one thread)", errno);
  }
  // Saves the descriptor look-up on each entry; where the kernel cannot, nothing changes.
  io_uring_register_ring_fd(&ring_);
}

// Only this thread may speak to the ring. Giving files back here, not when the ring is torn down
// (which the kernel does later, in the background), lets their locks go with close().
void Uring::detach() {
  if (!fixed_files_.empty()) io_uring_unregister_files(&ring_);
  if (!fixed_buffers_.empty()) io_uring_unregister_buffers(&ring_);
  fixed_files_.clear();
  slot_of_fd_.clear();
  fixed_buffers_.clear();
  io_uring_unregister_ring_fd(&ring_);
}

// ---- submission ----

io_uring_sqe* Uring::next_entry() {
  for (;;) {
    if (io_uring_sqe* entry = io_uring_get_sqe(&ring_)) return entry;
    // Full before the turn's end: hand over what is there. Completions are not looked at here.
    ++facts_.kernel_entries;
    const int r = io_uring_submit(&ring_);
    if (r < 0 && r != -EINTR && r != -EAGAIN && r != -EBUSY) ring_broken("submit", -r);
    if ((ring_.flags & IORING_SETUP_SQPOLL) != 0) io_uring_sqring_wait(&ring_);
  }
}

void Uring::start(Op& op) {
  if (op.type == OpType::truncate) return call_directly(op);  // rare and short
  io_uring_sqe& entry = *next_entry();
  switch (op.type) {
    case OpType::read:
    case OpType::write:
      prepare_transfer(op, entry);
      break;
    case OpType::fdatasync:
      io_uring_prep_fsync(&entry, op.file->fd, IORING_FSYNC_DATASYNC);
      break;
    case OpType::fallocate:
      io_uring_prep_fallocate(&entry, op.file->fd, fallocate_flags(op),
                              static_cast<off_t>(op.offset), static_cast<off_t>(op.length));
      break;
    case OpType::poll:
      io_uring_prep_poll_add(&entry, op.poll_fd, static_cast<unsigned>(op.poll_events));
      break;
    case OpType::truncate:
    case OpType::nop:
      io_uring_prep_nop(&entry);
      break;
  }
  if (op.file != nullptr) use_fixed_file(*op.file, entry);
  io_uring_sqe_set_data(&entry, &op);
  const bool moves = op.type == OpType::read || op.type == OpType::write;
  if (moves && op.length >= kLargeTransfer) submit_early();
}

void Uring::prepare_transfer(Op& op, io_uring_sqe& entry) {
  const int fd = op.file->fd;
  const std::uint64_t at = op.offset + op.done;
  const bool reading = op.type == OpType::read;
  if (op.iov_count > 1) {
    if (reading) {
      io_uring_prep_readv(&entry, fd, op.iov, transfer_count(op), at);
    } else {
      io_uring_prep_writev(&entry, fd, op.iov, transfer_count(op), at);
    }
    return;
  }
  static constexpr iovec nothing{};
  const iovec& buffer = op.iov_count == 1 ? *op.iov : nothing;
  const auto bytes = static_cast<unsigned>(std::min(buffer.iov_len, kTransferBytesMax));
  const int index = fixed_buffer_of(op);
  if (index >= 0) {
    ++facts_.fixed_buffer_ops;
    if (reading) {
      io_uring_prep_read_fixed(&entry, fd, buffer.iov_base, bytes, at, index);
    } else {
      io_uring_prep_write_fixed(&entry, fd, buffer.iov_base, bytes, at, index);
    }
  } else if (reading) {
    io_uring_prep_read(&entry, fd, buffer.iov_base, bytes, at);
  } else {
    io_uring_prep_write(&entry, fd, buffer.iov_base, bytes, at);
  }
}

int Uring::fixed_buffer_of(const Op& op) const {
  if (fixed_buffers_.empty() || op.iov_count != 1) return -1;
  const auto inside = [&op](const iovec& buffer) {
    const auto offset = static_cast<std::uintptr_t>(static_cast<char*>(op.iov->iov_base) -
                                                    static_cast<char*>(buffer.iov_base));
    return offset < buffer.iov_len && op.iov->iov_len <= buffer.iov_len - offset;
  };
  if (op.buffer_index >= 0) {
    const auto index = static_cast<std::size_t>(op.buffer_index);
    assert(index < fixed_buffers_.size() && inside(fixed_buffers_[index]));
    return op.buffer_index;
  }
  for (std::size_t i = 0; i < fixed_buffers_.size(); ++i) {
    if (inside(fixed_buffers_[i])) return static_cast<int>(i);
  }
  return -1;
}

void Uring::use_fixed_file(const File& file, io_uring_sqe& entry) {
  const auto fd = static_cast<std::size_t>(file.fd);
  if (fd >= slot_of_fd_.size() || slot_of_fd_[fd] < 0) return;
  const int slot = slot_of_fd_[fd];
  // The descriptor number alone does not name the file: it may have been closed and used again.
  if (fixed_files_[static_cast<std::size_t>(slot)].id != file.id) return;
  ++facts_.fixed_file_ops;
  entry.fd = slot;
  entry.flags |= IOSQE_FIXED_FILE;
}

// ---- completion ----

void Uring::arm_wake() {
  if (wake_armed_) return;
  io_uring_sqe& entry = *next_entry();
  io_uring_prep_read(&entry, event_fd(), &wake_count_, sizeof wake_count_, 0);
  io_uring_sqe_set_data(&entry, nullptr);
  wake_armed_ = true;
}

void Uring::exchange(std::uint64_t wait_ns) {
  if (wait_ns > 0) arm_wake();
  enter(wait_ns);
  reap();
}

// Or completions that found no room.
bool Uring::kernel_has_work() const {
  constexpr unsigned kWork = IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW;
  return (IO_URING_READ_ONCE(*ring_.sq.kflags) & kWork) != 0;
}

void Uring::enter(std::uint64_t wait_ns) {
  int r = 0;
  const bool kernel_works = kernel_has_work();
  const bool idle = !kernel_works && io_uring_cq_ready(&ring_) == 0;
  busy_entries_ = idle ? 0 : std::min(busy_entries_ + 1, kBusyEntries);
  if (wait_ns == 0) {
    if (io_uring_sq_ready(&ring_) == 0 && work_is_flagged_ && !kernel_works) return;
    r = io_uring_submit_and_get_events(&ring_);
  } else if (wait_ns == kForever) {
    r = io_uring_submit_and_wait(&ring_, 1);
  } else {
    constexpr std::uint64_t kNsPerSecond = 1'000'000'000;
    __kernel_timespec limit{.tv_sec = static_cast<std::int64_t>(wait_ns / kNsPerSecond),
                            .tv_nsec = static_cast<long long>(wait_ns % kNsPerSecond)};
    io_uring_cqe* cqe = nullptr;
    r = io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &limit, nullptr);
  }
  ++facts_.kernel_entries;
  // EBUSY, EAGAIN: short of memory or of completion space; what was not taken stays in the ring.
  if (r < 0 && r != -EINTR && r != -ETIME && r != -EAGAIN && r != -EBUSY) ring_broken("enter", -r);
}

// What completions started goes on its way while the rest of them is worked through: each may mean
// microseconds of decryption, during which the device would run dry.
void Uring::submit_early() {
  const int r = io_uring_submit(&ring_);
  ++facts_.kernel_entries;
  if (r < 0 && r != -EINTR && r != -EAGAIN && r != -EBUSY) ring_broken("submit", -r);
}

void Uring::reap() {
  // A completion may start operations and even enter the kernel: only what is here now is taken.
  const unsigned ready = io_uring_cq_ready(&ring_);
  const unsigned head = *ring_.cq.khead;
  const unsigned mask = *ring_.cq.kring_mask;
  const unsigned group = busy_entries_ < kBusyEntries ? kGroupIdle : kGroupBusy;
  for (unsigned i = 0; i < ready; ++i) {
    const io_uring_cqe& cqe = ring_.cq.cqes[(head + i) & mask];
    if (auto* op = static_cast<Op*>(io_uring_cqe_get_data(&cqe))) {
      settle(*op, cqe.res);
      // What the last one starts leaves with the next entry, unless it is much.
      const unsigned enough = i + 1 < ready ? group : kGroupBusy;
      if (io_uring_sq_ready(&ring_) >= enough) submit_early();
    } else {
      wake_armed_ = false;
    }
  }
  io_uring_cq_advance(&ring_, ready);
}

// ---- registration ----

void Uring::on_register_buffers(std::span<const iovec> buffers) {
  if (!fixed_buffers_.empty()) io_uring_unregister_buffers(&ring_);
  fixed_buffers_.clear();
  facts_.buffers_registered = false;
  if (buffers.empty() || buffers.size() > kFixedBuffersMax) return;
  for (const iovec& buffer : buffers) {
    if (buffer.iov_len > kFixedBufferBytesMax) return;
  }
  const int r =
      io_uring_register_buffers(&ring_, buffers.data(), static_cast<unsigned>(buffers.size()));
  if (r < 0) return;  // RLIMIT_MEMLOCK, or memory that cannot be pinned
  fixed_buffers_.assign(buffers.begin(), buffers.end());
  facts_.buffers_registered = true;
}

void Uring::on_register_file(const File& file) {
  if (file.id == 0 || file.fd < 0) return;
  const auto fd = static_cast<std::size_t>(file.fd);
  for (std::size_t slot = 0; slot < fixed_files_.size(); ++slot) {
    if (fixed_files_[slot].id == file.id) return;
  }
  for (std::size_t slot = 0; slot < fixed_files_.size(); ++slot) {
    if (fixed_files_[slot].id != 0) continue;
    if (io_uring_register_files_update(&ring_, static_cast<unsigned>(slot), &file.fd, 1) != 1)
      return;
    if (slot_of_fd_.size() <= fd) slot_of_fd_.resize(fd + 1, -1);
    slot_of_fd_[fd] = static_cast<std::int16_t>(slot);
    fixed_files_[slot] = {file.id, file.fd};
    ++facts_.files_registered;
    return;
  }
}

void Uring::on_unregister_file(const File& file) {
  if (file.id == 0) return;
  for (std::size_t slot = 0; slot < fixed_files_.size(); ++slot) {
    if (fixed_files_[slot].id != file.id) continue;
    const int none = -1;
    io_uring_register_files_update(&ring_, static_cast<unsigned>(slot), &none, 1);
    std::int16_t& entry = slot_of_fd_[static_cast<std::size_t>(fixed_files_[slot].fd)];
    if (entry == static_cast<std::int16_t>(slot)) entry = -1;
    fixed_files_[slot] = {};
    --facts_.files_registered;
    return;
  }
}

}  // namespace

Result<std::unique_ptr<Queue>> make_uring(const QueueOptions& options) {
  auto queue = std::make_unique<Uring>(options);
  if (Error e = queue->open(options.sqpoll)) return e;
  return std::unique_ptr<Queue>(std::move(queue));
}

}  // namespace pqblk::io
