// Gate: when it has drained, nobody is inside, and it has what those who left did.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/sync.h"

using namespace pqblk;  // NOLINT

namespace {

constexpr auto kDuration = std::chrono::milliseconds(1500);

// Of a thread that waits for one thing at a time.
class Home final : public Executor {
 public:
  Home() { current() = this; }
  ~Home() override { current() = nullptr; }
  void post(ReadyNode&) override { woken_.store(true, std::memory_order_release); }
  std::uint64_t now_ns() override { return 0; }
  void wait() {
    while (!woken_.exchange(false, std::memory_order_acquire)) std::this_thread::yield();
  }

 private:
  std::atomic<bool> woken_{false};
};

// Some hold on inside, so that a closer has to wait; the others leave late, while it closes again.
void come_and_go(Gate& gate, std::atomic<int>& inside, const std::atomic<bool>& stop, bool hold) {
  while (!stop.load(std::memory_order_relaxed)) {
    if (!gate.enter()) continue;
    inside.fetch_add(1, std::memory_order_relaxed);
    for (int k = 0; hold && k < 4; ++k) std::this_thread::yield();
    inside.fetch_sub(1, std::memory_order_relaxed);
    gate.leave();
  }
}

}  // namespace

TEST_CASE("nobody is inside a gate that has drained, however soon it closes again") {
  Home home;
  Gate gate;
  std::atomic<int> inside{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> users;
  for (int i = 0; i < 6; ++i) {
    users.emplace_back([&, i] { come_and_go(gate, inside, stop, i % 2 == 0); });
  }
  std::uint64_t rounds = 0, wrong = 0;
  const auto until = std::chrono::steady_clock::now() + kDuration;
  while (std::chrono::steady_clock::now() < until) {
    gate.close();
    Gate::Drained drained = gate.drained();
    if (drained.await_suspend(std::noop_coroutine())) home.wait();
    ++rounds;
    if (inside.load(std::memory_order_relaxed) != 0) ++wrong;
    gate.reopen();
  }
  stop = true;
  for (std::thread& user : users) user.join();
  CHECK(rounds > 0);
  CHECK_MESSAGE(wrong == 0, wrong << " of " << rounds << " rounds");
}
