// The sealed disk on real threads, queues and a real file: random load with verification, and
// kill -9 of the process under load with an immediate reopen.
//
// Each sector belongs to one client, which knows what it must hold; neighbours in the same cluster,
// entry page and log block belong to others. Everyone reads everyone's sectors.
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "base/aligned.h"
#include "effort.h"
#include "io/queue_thread.h"
#include "sealed/sealed_file.h"
#include "sim/model.h"
#include "storage/file.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint32_t kQueues = 3;
constexpr std::uint32_t kClients = 9;
constexpr std::uint64_t kShared = 18 * kClients;  // sectors dealt out two by two
constexpr std::uint64_t kOwn = 48;                // neighbouring sectors of one client
constexpr std::uint64_t kSectors = kShared + kClients * kOwn;
constexpr std::uint32_t kClusterSize = 16 * 1024;
constexpr std::uint64_t kRunMax = 32;  // sectors of one request: whole clusters move

// What each sector may hold; in memory that outlives a killed child.
struct Board {
  struct Cell {
    std::atomic<std::uint32_t> issued, acked;
  };
  std::array<Cell, kSectors> sectors;
  std::atomic<std::uint64_t> operations;
};
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);
// Versions are numbered in order; one of every kZeroEvery is a zero or discard.
constexpr std::uint32_t kZeroEvery = 5;
bool is_zero(std::uint32_t version) { return version % kZeroEvery == 0; }

struct SharedBoard {
  SharedBoard()
      : board(static_cast<Board*>(::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE,
                                         MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {
    REQUIRE(board != MAP_FAILED);
  }
  ~SharedBoard() { ::munmap(board, sizeof(Board)); }
  Board* board;
};

// What the clients drive: a Disk, or the sealed backend by itself.
class Target {
 public:
  virtual ~Target() = default;
  virtual Error write(std::uint32_t queue, std::uint64_t sector, iovec data, bool fua) = 0;
  virtual Error read(std::uint32_t queue, std::uint64_t sector, iovec data) = 0;
  virtual Error zero(std::uint32_t queue, std::uint64_t sector, std::uint64_t count, bool discard,
                     bool unmap) = 0;
  virtual Error flush(std::uint32_t queue) = 0;
};

class DiskTarget final : public Target {
 public:
  explicit DiskTarget(image::Disk& disk) : disk_(disk) {}
  Error write(std::uint32_t queue, std::uint64_t sector, iovec data, bool fua) override {
    Waited w(image::RequestType::out, sector, data.iov_len, &data);
    w.request.fua = fua;
    return w.run(disk_, queue);
  }
  Error read(std::uint32_t queue, std::uint64_t sector, iovec data) override {
    return Waited(image::RequestType::in, sector, data.iov_len, &data).run(disk_, queue);
  }
  Error zero(std::uint32_t queue, std::uint64_t sector, std::uint64_t count, bool discard,
             bool unmap) override {
    Waited w(discard ? image::RequestType::discard : image::RequestType::write_zeroes, sector,
             count * kSectorSize, nullptr);
    w.request.zero_flags = unmap ? image::kZeroUnmap : 0u;
    return w.run(disk_, queue);
  }
  Error flush(std::uint32_t queue) override {
    return Waited(image::RequestType::flush, 0, 0, nullptr).run(disk_, queue);
  }

 private:
  struct Waited {
    image::Request request;
    std::binary_semaphore done{0};
    Waited(image::RequestType type, std::uint64_t sector, std::uint64_t length, iovec* iov) {
      request.type = type;
      request.offset = sector * kSectorSize;
      request.length = length;
      request.iov = iov;
      request.iov_count = iov != nullptr ? 1 : 0;
      request.context = this;
      request.complete = [](image::Request& r) { static_cast<Waited*>(r.context)->done.release(); };
    }
    Error run(image::Disk& disk, std::uint32_t queue) {
      disk.submit(queue, &request);
      done.acquire();
      return std::move(request.error);
    }
  };
  image::Disk& disk_;
};

// Clients never overlap, so the backend needs no range locks here.
class BackendTarget final : public Target {
 public:
  BackendTarget(const std::string& path, image::SealedOptions options) {
    for (unsigned i = 0; i <= kQueues; ++i) {
      auto thread = io::QueueThread::start(io::QueueOptions{}, i);
      REQUIRE(thread);
      threads_.push_back(std::move(*thread));
      contexts_.push_back(std::make_unique<image::QueueContext>(threads_.back()->queue(), i));
    }
    auto file = storage::open_file(path, {});
    REQUIRE_MESSAGE(file, file.error().to_string());
    file_ = *file;
    auto opened = threads_.back()->run_sync(
        [&] { return image::SealedBackend::open(*contexts_.back(), file_, std::move(options)); });
    REQUIRE_MESSAGE(opened, opened.error().to_string());
    backend_ = std::move(*opened);
  }
  ~BackendTarget() override {
    const Error e = threads_.back()->run_sync([&] { return backend_->close(*contexts_.back()); });
    CHECK_MESSAGE(!e, e.to_string());
    for (auto& thread : threads_) thread->stop();
    backend_.reset();
    storage::close_file(file_);
  }
  image::SealedBackend& backend() { return *backend_; }
  Error write(std::uint32_t queue, std::uint64_t sector, iovec data, bool fua) override {
    return on(queue, [&](image::QueueContext& q) {
      return backend_->write(q, {sector * kSectorSize}, {{&data, 1}, 0, data.iov_len}, fua);
    });
  }
  Error read(std::uint32_t queue, std::uint64_t sector, iovec data) override {
    return on(queue, [&](image::QueueContext& q) {
      return backend_->read(q, {sector * kSectorSize}, {{&data, 1}, 0, data.iov_len});
    });
  }
  Error zero(std::uint32_t queue, std::uint64_t sector, std::uint64_t count, bool discard,
             bool unmap) override {
    return on(queue, [&](image::QueueContext& q) {
      const GuestOffset at{sector * kSectorSize};
      if (discard) return backend_->discard(q, at, count * kSectorSize);
      return backend_->write_zeroes(q, at, count * kSectorSize, unmap ? image::kZeroUnmap : 0u);
    });
  }
  Error flush(std::uint32_t queue) override {
    return on(queue, [&](image::QueueContext& q) { return backend_->flush(q); });
  }

 private:
  template <class F>
  Error on(std::uint32_t queue, F&& f) {
    return threads_[queue]->run_sync([&] { return f(*contexts_[queue]); });
  }
  std::vector<std::unique_ptr<io::QueueThread>> threads_;
  std::vector<std::unique_ptr<image::QueueContext>> contexts_;
  io::File file_;
  std::unique_ptr<image::SealedBackend> backend_;
};

// Empty when the sector holds a version from `low` to `high`.
std::string judge(const std::uint8_t* data, std::uint64_t sector, std::uint32_t low,
                  std::uint32_t high) {
  const auto says = [&](const std::string& what) {
    return "sector " + std::to_string(sector) + " " + what + ", expected versions " +
           std::to_string(low) + " to " + std::to_string(high);
  };
  const sim::Seen first = sim::look_at_block(data);
  for (std::uint32_t b = 0; b < sim::kBlocksPerSector; ++b) {
    const sim::Seen seen = sim::look_at_block(data + b * sim::kPatternBlock);
    if (seen.what != first.what || seen.version != first.version) return says("is a mix");
    if (seen.what == sim::Seen::What::garbage) return says("is garbage");
    if (seen.what == sim::Seen::What::data && (seen.sector != sector || seen.block != b)) {
      return says("holds another's data");
    }
  }
  if (first.what == sim::Seen::What::data) {
    return first.version >= low && first.version <= high
               ? ""
               : says("holds version " + std::to_string(first.version));
  }
  for (std::uint32_t v = low; v <= high; ++v) {
    if (is_zero(v)) return "";
  }
  return says("is zero");
}

class Client {
 public:
  Client(Target& target, Board& board, std::uint32_t number, std::uint64_t seed)
      : target_(target),
        board_(board),
        number_(number),
        random_(seed * kClients + number),
        memory_(kRunMax * kSectorSize) {}

  // Until `stop`, or until something is wrong.
  std::string run(const std::atomic<bool>& stop) {
    std::string wrong;
    while (wrong.empty() && !stop.load(std::memory_order_relaxed)) {
      wrong = step();
      board_.operations.fetch_add(1, std::memory_order_relaxed);
    }
    return wrong;
  }

 private:
  std::uint64_t pick(std::uint64_t n) { return random_() % n; }

  std::string step() {
    const std::uint64_t what = pick(16);
    if (what == 0) return flush();
    if (what < 6) return read();
    std::uint64_t first = 0, count = 1;
    if (pick(3) == 0) {
      count = 1 + pick(kRunMax);
      first = kShared + number_ * kOwn + pick(kOwn - count + 1);
    } else {
      count = 1 + pick(2);
      first = 2 * (number_ + kClients * pick(kShared / 2 / kClients));
      first += pick(3 - count);
    }
    return change(first, count);
  }

  std::string change(std::uint64_t first, std::uint64_t count) {
    // All sectors of a request get one version: the next after any that they had.
    std::uint32_t version = 0;
    for (std::uint64_t s = first; s < first + count; ++s) {
      version = std::max(version, board_.sectors[s].issued.load(std::memory_order_relaxed));
    }
    ++version;
    for (std::uint64_t s = first; s < first + count; ++s) {
      board_.sectors[s].issued.store(version, std::memory_order_seq_cst);
    }
    Error error;
    if (is_zero(version)) {
      error = target_.zero(queue(), first, count, pick(2) == 0, pick(2) == 0);
    } else {
      for (std::uint64_t i = 0; i < count; ++i) {
        sim::fill_sector(memory_.data() + i * kSectorSize, first + i, version);
      }
      error = target_.write(queue(), first, {memory_.data(), count * kSectorSize}, pick(12) == 0);
    }
    if (error) return "write: " + error.to_string();
    for (std::uint64_t s = first; s < first + count; ++s) {
      board_.sectors[s].acked.store(version, std::memory_order_seq_cst);
    }
    return "";
  }

  std::string read() {
    const std::uint64_t count = 1 + pick(4);
    const std::uint64_t first = pick(kSectors - count + 1);
    std::array<std::uint32_t, 4> low{};
    for (std::uint64_t i = 0; i < count; ++i) {
      low[i] = board_.sectors[first + i].acked.load(std::memory_order_seq_cst);
    }
    if (Error e = target_.read(queue(), first, {memory_.data(), count * kSectorSize})) {
      return "read: " + e.to_string();
    }
    for (std::uint64_t i = 0; i < count; ++i) {
      const auto high = board_.sectors[first + i].issued.load(std::memory_order_seq_cst);
      std::string wrong = judge(memory_.data() + i * kSectorSize, first + i, low[i], high);
      if (!wrong.empty()) return wrong;
    }
    return "";
  }

  std::string flush() {
    Error e = target_.flush(queue());
    return e ? "flush: " + e.to_string() : "";
  }

  std::uint32_t queue() const { return number_ % kQueues; }

  Target& target_;
  Board& board_;
  const std::uint32_t number_;
  std::mt19937_64 random_;
  AlignedBuffer memory_;
};

struct Image {
  explicit Image(const char* name)
      : path((std::filesystem::exists("/dev/shm") ? "/dev/shm/" : "/tmp/") + std::string(name) +
             "." + std::to_string(::getpid())) {
    constexpr std::uint64_t kLogBytes = 256 * kKiB;  // wraps many times
    image::CreateSpec spec = sealed_file_spec(path, kSectors * kSectorSize, kLogBytes);
    spec.cluster_size = kClusterSize;
    make_sealed_file(spec);
  }
  ~Image() { std::filesystem::remove(path); }

  Result<std::unique_ptr<image::Disk>> open(bool non_volatile) const {
    image::OpenOptions o = sealed_file_options(path, non_volatile);
    o.cache = image::Cache::writeback;
    o.queues = kQueues;
    o.limits.pending_data = 64 * kKiB;
    o.limits.entry_cache = 64 * kKiB;
    return image::Disk::open(std::move(o));
  }
  const std::string path;
};

// All clients at once, until `stop`. Returns what was wrong.
std::string load(Target& target, Board& board, std::uint64_t seed, const std::atomic<bool>& stop) {
  std::array<std::string, kClients> wrong;
  std::vector<std::thread> threads;
  for (std::uint32_t i = 0; i < kClients; ++i) {
    threads.emplace_back([&, i] { wrong[i] = Client(target, board, i, seed).run(stop); });
  }
  for (std::thread& t : threads) t.join();
  std::string all;
  for (const std::string& w : wrong) all += w.empty() ? "" : w + "\n";
  return all;
}

std::string verify(Target& target, Board& board) {
  AlignedBuffer memory(kSectorSize);
  for (std::uint64_t s = 0; s < kSectors; ++s) {
    if (Error e = target.read(0, s, {memory.data(), kSectorSize})) return e.to_string();
    auto& cell = board.sectors[s];
    std::string wrong = judge(memory.data(), s, cell.acked.load(), cell.issued.load());
    if (!wrong.empty()) return wrong;
    // From here on the sector holds what was seen, and later versions are newer than any issued.
    const sim::Seen seen = sim::look_at_block(memory.data());
    if (seen.what == sim::Seen::What::data)
      cell.acked.store(static_cast<std::uint32_t>(seen.version));
  }
  return "";
}

std::uint32_t milliseconds(std::uint32_t quick) {
  return soak_seconds() != 0 ? soak_seconds() * 500 : quick;
}

std::string load_for(std::uint32_t ms, Target& target, Board& board, std::uint64_t seed) {
  std::atomic<bool> stop{false};
  std::thread timer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(ms));
    stop.store(true);
  });
  std::string wrong = load(target, board, seed, stop);
  timer.join();
  return wrong;
}

void load_and_reopen(bool non_volatile) {
  Image image("pqblk-threads");
  SharedBoard shared;
  for (std::uint64_t round = 0; round < 2; ++round) {
    auto disk = image.open(non_volatile);
    REQUIRE_MESSAGE(disk, disk.error().to_string());
    DiskTarget target(**disk);
    CHECK(verify(target, *shared.board) == "");
    CHECK(load_for(milliseconds(1500), target, *shared.board, round) == "");
    CHECK(verify(target, *shared.board) == "");
    const auto stats = (*disk)->backend_stats();
    CHECK(stats.integrity_failures == 0);
    MESSAGE("operations " << shared.board->operations.load() << ", checkpoints "
                          << stats.checkpoints << ", log bytes " << stats.log_bytes);
    CHECK(!(*disk)->close());
  }
}

// The child never returns.
[[noreturn]] void die_under_load(const Image& image, Board& board, bool non_volatile,
                                 std::uint64_t seed) {
  auto disk = image.open(non_volatile);
  if (!disk) {
    std::fprintf(stderr, "child: %s\n", disk.error().to_string().c_str());
    ::_exit(2);
  }
  DiskTarget target(**disk);
  const std::atomic<bool> never{false};
  std::fprintf(stderr, "child: %s\n", load(target, board, seed, never).c_str());
  ::_exit(3);  // a client has found something wrong
}

void kill_and_reopen(bool non_volatile) {
  Image image("pqblk-killed");
  SharedBoard shared;
  // Some kills hit a log that a checkpoint has just emptied: never so few that all may.
  const auto rounds = std::max(static_cast<std::uint32_t>(effort(12)), 6U) + soak_seconds();
  std::uint64_t recovered = 0;
  for (std::uint32_t round = 0; round < rounds; ++round) {
    const std::uint64_t before = shared.board->operations.load();
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) die_under_load(image, *shared.board, non_volatile, 1000 + round);
    // Some work, then death at an arbitrary moment.
    int status = 0;
    while (shared.board->operations.load() < before + 300 + 97 * round) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (::waitpid(child, &status, WNOHANG) == child) {
        FAIL("the child ended by itself: " << status);
      }
    }
    ::kill(child, SIGKILL);
    REQUIRE(::waitpid(child, &status, 0) == child);
    auto disk = image.open(non_volatile);
    REQUIRE_MESSAGE(disk, disk.error().to_string());
    recovered += static_cast<image::SealedBackend&>((*disk)->backend()).recovery().records;
    DiskTarget target(**disk);
    CHECK(verify(target, *shared.board) == "");
    CHECK(!(*disk)->close());
  }
  CHECK(recovered > 0);
  MESSAGE("killed " << rounds << " times after " << shared.board->operations.load()
                    << " operations, " << recovered << " records recovered");
}

}  // namespace

TEST_CASE("many threads and queues read what was written") {
  load_and_reopen(false);
  load_and_reopen(true);
}

TEST_CASE("a process killed under load loses nothing acknowledged") {
  kill_and_reopen(false);
  kill_and_reopen(true);
}

// Sessions end every few hundred sectors and checkpoints never cease, while others write, read and
// flush.
TEST_CASE("sessions rotate under load") {
  Image image("pqblk-rotating");
  SharedBoard shared;
  image::SealedOptions o;
  o.keys = test_keys();
  o.expected_uuid = test_uuid();
  o.overlay_sectors_max = 256;
  o.session_sectors_max = 400;
  o.relocate_bytes_min = kClusterSize;
  o.limits.pending_data = 64 * kKiB;
  o.limits.entry_cache = 64 * kKiB;
  BackendTarget target(image.path, std::move(o));
  CHECK(load_for(milliseconds(2000), target, *shared.board, 7) == "");
  CHECK(verify(target, *shared.board) == "");
  const auto stats = target.backend().stats();
  CHECK(stats.integrity_failures == 0);
  CHECK(target.backend().session_id() > 1);
  MESSAGE("operations " << shared.board->operations.load() << ", sessions "
                        << target.backend().session_id() << ", checkpoints " << stats.checkpoints);
}
