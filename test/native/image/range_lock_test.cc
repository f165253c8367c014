// Range locks: order among overlapping ranges, no false waiting, exclusion and progress under load.
#include "image/range_lock.h"

#include <doctest/doctest.h>

#include <atomic>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "io/queue_thread.h"

namespace pqblk::image {
namespace {

// Runs posted coroutines when told to: every order of events is the test's own.
class ManualExecutor final : public Executor {
 public:
  ManualExecutor() { Executor::current() = this; }
  ~ManualExecutor() override { Executor::current() = nullptr; }
  void post(ReadyNode& node) override { ready_.push_back(&node); }
  std::uint64_t now_ns() override { return 0; }
  void run() {
    while (!ready_.empty()) {
      ReadyNode* node = ready_.front();
      ready_.pop_front();
      node->handle.resume();
    }
  }

 private:
  std::deque<ReadyNode*> ready_;
};

// A coroutine that takes a range, tells so, and keeps it until release() is called.
struct Holder {
  std::string* log;
  char name;
  std::coroutine_handle<> parked;

  static Task<void> hold(Holder& self, RangeLocks& locks, std::uint64_t at, std::uint64_t length) {
    RangeLocks::Range range(locks, at, length);
    co_await range;
    *self.log += self.name;
    struct Park {
      Holder& holder;
      bool await_ready() const { return false; }
      void await_suspend(std::coroutine_handle<> h) { holder.parked = h; }
      void await_resume() const {}
    };
    co_await Park{self};
  }
  bool held() const { return static_cast<bool>(parked); }
  void release() { std::exchange(parked, {}).resume(); }
};

struct Scene {
  ManualExecutor executor;
  RangeLocks locks;
  std::string log;
  std::deque<Holder> holders;

  Holder& take(char name, std::uint64_t at, std::uint64_t length) {
    Holder& holder = holders.emplace_back(Holder{&log, name, {}});
    spawn(Holder::hold(holder, locks, at, length));
    return holder;
  }
  void release(Holder& holder) {
    holder.release();
    executor.run();
  }
};

TEST_CASE("disjoint ranges never wait, neighbours included") {
  Scene scene;
  for (std::uint64_t i = 0; i < 64; ++i) scene.take('a', i * 512, 512);
  CHECK(scene.log.size() == 64);
  for (Holder& h : scene.holders) scene.release(h);
}

TEST_CASE("overlapping ranges are granted in the order of their arrival") {
  Scene scene;
  Holder& a = scene.take('a', 0, 10);
  Holder& b = scene.take('b', 5, 10);
  Holder& c = scene.take('c', 12, 10);  // overlaps b, which waits
  Holder& d = scene.take('d', 0, 4);    // overlaps a only
  Holder& e = scene.take('e', 30, 1);
  CHECK(scene.log == "ae");
  scene.release(a);
  CHECK(scene.log == "aebd");
  CHECK_FALSE(c.held());
  scene.release(b);
  CHECK(scene.log == "aebdc");
  for (Holder* h : {&c, &d, &e}) scene.release(*h);
}

TEST_CASE("a large waiter is not overtaken by small ranges that keep coming") {
  Scene scene;
  Holder& small = scene.take('s', kLockRegion * 3, 512);
  Holder& large = scene.take('L', 0, kLockRegion * 8);
  Holder& late = scene.take('t', kLockRegion, 512);
  CHECK(scene.log == "s");
  scene.release(small);
  CHECK(scene.log == "sL");
  scene.release(large);
  CHECK(scene.log == "sLt");
  scene.release(late);
}

TEST_CASE("ranges over many regions, over the table's end and over all shards") {
  const std::uint64_t table = kLockRegion * kLockShards;
  for (const std::uint64_t begin : {std::uint64_t{0}, table - 3 * kLockRegion, table * 5 - 1}) {
    for (const std::uint64_t length : {kLockRegion, 6 * kLockRegion, table - 1, 3 * table}) {
      Scene scene;
      Holder& wide = scene.take('w', begin, length);
      Holder& first = scene.take('1', begin, 1);
      Holder& last = scene.take('2', begin + length - 1, 1);
      Holder& outside = scene.take('3', begin + length, 1);
      CHECK(scene.log == "w3");
      scene.release(wide);
      CHECK(scene.log.size() == 4);
      for (Holder* h : {&first, &last, &outside}) scene.release(*h);
    }
  }
}

TEST_CASE("under load from several threads a block has one owner, and everyone gets through") {
  constexpr std::uint64_t kBlock = 64 * kKiB;
  constexpr std::size_t kBlocks = 512 * 4;  // twice around the table
  constexpr int kThreads = 3, kCoroutines = 24, kRounds = 150;
  RangeLocks locks;
  std::vector<std::atomic<int>> owner(kBlocks);
  std::atomic<int> collisions{0}, finished{0};

  struct Worker {
    static Task<void> run(io::Queue& queue, RangeLocks& shared,
                          std::vector<std::atomic<int>>& owners, std::atomic<int>& bad,
                          std::atomic<int>& ended, unsigned seed) {
      co_await resume_on(queue);
      std::mt19937 random(seed);
      for (int round = 0; round < kRounds; ++round) {
        const bool wide = random() % 40 == 0;
        const std::size_t first = random() % (round % 2 == 0 ? kBlocks : 16);
        const std::size_t most = wide ? kBlocks : 9;
        const std::size_t count = std::min<std::size_t>(1 + random() % most, kBlocks - first);
        RangeLocks::Range range(shared, first * kBlock, count * kBlock);
        co_await range;
        for (std::size_t i = first; i < first + count; ++i) bad += owners[i].exchange(1) != 0;
        co_await yield();
        for (std::size_t i = first; i < first + count; ++i) owners[i].store(0);
      }
      ++ended;
    }
  };
  std::vector<std::unique_ptr<io::QueueThread>> threads;
  for (unsigned t = 0; t < kThreads; ++t) {
    auto thread = io::QueueThread::start(io::QueueOptions{}, t);
    REQUIRE(thread);
    threads.push_back(std::move(*thread));
    for (unsigned i = 0; i < kCoroutines; ++i) {
      spawn(Worker::run(threads[t]->queue(), locks, owner, collisions, finished,
                        t * kCoroutines + i));
    }
  }
  while (finished.load() != kThreads * kCoroutines) std::this_thread::yield();
  threads.clear();
  CHECK(collisions.load() == 0);
}

}  // namespace
}  // namespace pqblk::image
