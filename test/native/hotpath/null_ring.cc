#include "hotpath/null_ring.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "io/event_wait.h"
#include "io/loop.h"
#include "io/operation.h"

namespace pqblk::test {

class NullRing final : public io::Loop {
 public:
  NullRing(const io::QueueOptions& options, NullDevice& device) : Loop(options), device_(device) {}
  std::string_view engine() const override { return "null"; }
  using Loop::open_event;
  std::uint64_t now_ns() override {
    if (!device_.counting_clock_) return Loop::now_ns();
    return ticks_.fetch_add(1, std::memory_order_relaxed) * kNsPerTick;
  }

 protected:
  void start(io::Op& op) override {
    if (op.type == io::OpType::poll) return polls_.add(op);
    batch_.push_back({&op, 0});
  }

  void exchange(std::uint64_t wait_ns) override {
    if (batch_.empty()) {
      if (wait_ns == 0 && polls_.empty()) return;
      io::NodeList<io::Op> ready = polls_.wait(event_fd(), wait_ns);
      while (io::Op* op = ready.pop()) finished(*op);
      return;
    }
    answered_.clear();
    answered_.swap(batch_);
    answer_batch();
    for (const Item& item : answered_) settle(*item.op, item.result);
  }

 private:
  struct Item {
    io::Op* op;
    int result;
  };

  void answer_batch() {
    const bool timed = device_.answer_.load(std::memory_order_relaxed) == Answer::content;
    const std::uint64_t begin = timed ? now_ns() : 0;
    for (Item& item : answered_) item.result = device_.answer(*item.op);
    if (!timed) return;
    device_.batches_.push_back(static_cast<double>(now_ns() - begin) /
                               static_cast<double>(answered_.size()));
  }

  static constexpr std::uint64_t kNsPerTick = 100;
  NullDevice& device_;
  std::atomic<std::uint64_t> ticks_{1};
  std::vector<Item> batch_, answered_;
  io::EventWait polls_;
};

NullDevice::~NullDevice() {
  if (content_ != nullptr) ::munmap(const_cast<std::uint8_t*>(content_), size_);
}

Result<std::unique_ptr<io::Queue>> NullDevice::make_ring(const io::QueueOptions& options) {
  auto ring = std::make_unique<NullRing>(options, *this);
  if (Error e = ring->open_event()) return e;
  return std::unique_ptr<io::Queue>(std::move(ring));
}

Error NullDevice::begin(Answer answer, const std::string& path) {
  if (answer == Answer::content) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat facts {};
    if (fd < 0 || ::fstat(fd, &facts) != 0) return Error::from_errno(errno, "open", path);
    size_ = static_cast<std::size_t>(facts.st_size);
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    ::close(fd);
    if (mapped == MAP_FAILED) return Error::from_errno(errno, "mmap", path);
    content_ = static_cast<const std::uint8_t*>(mapped);
  }
  answer_.store(answer, std::memory_order_release);
  return {};
}

double NullDevice::ns_per_operation() const {
  if (batches_.empty()) return 0;
  std::vector<double> sorted = batches_;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  return *middle;
}

int NullDevice::answer(const io::Op& op) const {
  const Answer how = answer_.load(std::memory_order_relaxed);
  if (how == Answer::system_call) return io::perform(op);
  if (op.type == io::OpType::fdatasync) return 0;
  if (op.type != io::OpType::read || op.iov_count != 1) return io::perform(op);
  const std::size_t bytes = op.iov->iov_len;
  if (how == Answer::count) return static_cast<int>(bytes);
  const std::uint64_t at = op.offset + op.done;
  if (at > size_ || bytes > size_ - at) return io::perform(op);
  std::memcpy(op.iov->iov_base, content_ + at, bytes);
  return static_cast<int>(bytes);
}

}  // namespace pqblk::test
