// Who may still be using an old mapping: a cluster that was unmapped is reused or punched only when
// every request that could have looked it up before is done.
//
// Room format/qcow2. Each request enters with its queue's index and leaves on the same queue, whose
// thread alone changes its counts: entering is one store that the CPU orders, leaving a plain one.
// Two phases alternate; flip() starts a new one, and drained() tells when the requests of the phase
// before are gone.
#pragma once

#include <array>
#include <atomic>
#include <cassert>
#include <cstdint>

namespace pqblk::format::qcow2 {

inline constexpr std::uint32_t kReaderQueuesMax = 72;  // 64 queues and the service queues

class Readers {
 public:
  class Inside {
   public:
    Inside(Readers& readers, std::uint32_t queue) : cell_(&readers.enter(queue)) {}
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;
    ~Inside() { leave(*cell_); }

   private:
    std::atomic<std::uint64_t>* cell_;
  };

  // Changes made before flip() are seen by everyone who enters after it. One phase drains at a
  // time: call flip() only when drained().
  void flip() {
    assert(drained());
    phase_.fetch_add(1, std::memory_order_seq_cst);
  }
  bool drained() const {
    const std::uint64_t old = (phase_.load(std::memory_order_seq_cst) + 1) & 1;
    for (const Cell& cell : cells_) {
      if (cell.inside[old].load(std::memory_order_seq_cst) != 0) return false;
    }
    return true;
  }

 private:
  struct alignas(64) Cell {
    std::array<std::atomic<std::uint64_t>, 2> inside{};
  };

  static void leave(std::atomic<std::uint64_t>& cell) {
    cell.store(cell.load(std::memory_order_relaxed) - 1, std::memory_order_release);
  }
  std::atomic<std::uint64_t>& enter(std::uint32_t queue) {
    assert(queue < kReaderQueuesMax);
    for (;;) {
      const std::uint64_t phase = phase_.load(std::memory_order_seq_cst);
      auto& cell = cells_[queue].inside[phase & 1];
      cell.store(cell.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
      // Counted in a phase that ended meanwhile: nobody waits for us there, so enter again.
      if (phase_.load(std::memory_order_seq_cst) == phase) return cell;
      leave(cell);
    }
  }

  std::atomic<std::uint64_t> phase_{0};
  std::array<Cell, kReaderQueuesMax> cells_;
};

}  // namespace pqblk::format::qcow2
