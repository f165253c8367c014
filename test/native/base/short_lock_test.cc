// ShortLock: who holds it is alone, however long the others wait.
#include "base/short_lock.h"

#include <doctest/doctest.h>

#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

using pqblk::ShortLock;

TEST_CASE("a short lock lets one thread in at a time") {
  constexpr int kThreads = 4, kRounds = 20000;
  ShortLock lock;
  std::uint64_t sum = 0;  // without the lock, increments would be lost (and TSan would say so)
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kRounds; ++i) {
        std::lock_guard guard(lock);
        ++sum;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(sum == std::uint64_t{kThreads} * kRounds);
}

TEST_CASE("a short lock that is held for long is waited for") {
  ShortLock lock;
  lock.lock();
  CHECK_FALSE(lock.try_lock());
  bool entered = false;  // guarded by the lock
  std::thread other([&] {
    std::lock_guard guard(lock);
    entered = true;
  });
  // Long enough that the other one sleeps; however long it takes to come that far, it is kept out.
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK_FALSE(entered);
  lock.unlock();
  other.join();
  CHECK(entered);
  CHECK(lock.try_lock());
  lock.unlock();
}
