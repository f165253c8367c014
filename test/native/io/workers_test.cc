// The pool of helper threads: as many as there is to do, and no longer than that.

#include "io/workers.h"

#include <doctest/doctest.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "io/queue_thread.h"

namespace pqblk::io {

namespace {

using std::chrono::milliseconds;

std::size_t helper_threads() {
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(entry.path() / "comm"), name);
    count += name == "pqblk-io" ? 1 : 0;
  }
  return count;
}

// Whether `condition` comes true within ten seconds.
bool comes_true(const std::function<bool()>& condition) {
  for (int i = 0; i < 10'000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return false;
}

// A pool with operations that go on until they are let go; the test's thread plays the owner.
class Bench {
 public:
  explicit Bench(milliseconds linger) : pool_(thread_->queue(), kThreads, linger) {}
  ~Bench() { ::close(gate_); }

  void perform(std::size_t count) {
    NodeList<Op> batch;
    for (std::size_t i = 0; i < count; ++i) {
      Op& op = ops_.at(i);
      op = Op();
      op.type = OpType::poll;
      op.poll_fd = gate_;
      op.poll_events = POLLIN;
      begin(op);
      batch.push(op);
    }
    pool_.perform_all(batch);
  }
  void finish(std::size_t count) {
    REQUIRE(::eventfd_write(gate_, 1) == 0);
    std::size_t done = 0;
    std::uint64_t resubmitted = 0;
    CHECK(comes_true([&] {
      NodeList<Op> some = pool_.collect(resubmitted);
      while (some.pop() != nullptr) ++done;
      return done == count;
    }));
    std::uint64_t drained = 0;
    REQUIRE(::eventfd_read(gate_, &drained) == 0);
  }

  static constexpr std::uint32_t kThreads = 8;

 private:
  std::unique_ptr<QueueThread> thread_ =
      std::move(*QueueThread::start({.engine = EngineType::threads, .depth = 1}));
  int gate_ = ::eventfd(0, EFD_CLOEXEC);
  std::vector<Op> ops_ = std::vector<Op>(32);
  Workers pool_;
};

}  // namespace

TEST_CASE(
    "threads are made for what waits, up to the bound, and all but one end when nothing comes") {
  Bench bench(milliseconds(50));
  for (const std::size_t count : {1U, 3U, 20U, 2U}) {
    CAPTURE(count);
    bench.perform(count);
    const std::size_t wanted = std::min<std::size_t>(count, Bench::kThreads);
    CHECK(comes_true([&] { return helper_threads() == wanted; }));
    bench.finish(count);
    CHECK(comes_true([] { return helper_threads() == 1; }));
  }
}

TEST_CASE("under steady work of one operation at a time one thread stays") {
  Bench bench(milliseconds(100));
  bench.perform(Bench::kThreads);
  CHECK(comes_true([] { return helper_threads() == Bench::kThreads; }));
  bench.finish(Bench::kThreads);
  CHECK(comes_true([&] {
    bench.perform(1);
    bench.finish(1);
    return helper_threads() == 1;
  }));
}

TEST_CASE("a burst that comes again and again keeps its threads") {
  Bench bench(milliseconds(200));
  const auto end = std::chrono::steady_clock::now() + milliseconds(1000);
  while (std::chrono::steady_clock::now() < end) {
    bench.perform(Bench::kThreads);
    CHECK(comes_true([] { return helper_threads() == Bench::kThreads; }));
    bench.finish(Bench::kThreads);
    std::this_thread::sleep_for(milliseconds(1));
    CHECK(helper_threads() == Bench::kThreads);
  }
}

TEST_CASE("a pool ends while its threads come and go") {
  for (int i = 0; i < 300; ++i) {
    Bench bench(milliseconds(i % 3));
    bench.perform(4);
    bench.finish(4);
    if (i % 2 == 0) std::this_thread::sleep_for(milliseconds(1));
  }
  CHECK(comes_true([] { return helper_threads() == 0; }));  // the kernel's list may lag
}

}  // namespace pqblk::io
