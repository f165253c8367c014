// Where a simulated run gets its decisions from: a seed, or an enumeration of everything.
//
// Room test/sim. Whatever is not determined by the code under test (which event comes next, which
// unflushed writes a power loss keeps, what a workload does) is asked of a Choices. The same code
// then runs at random over many seeds, or exhaustively: ExhaustiveChoices replays a script of
// earlier answers and extends it depth first until every path was taken.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pqblk::sim {

enum class Why : std::uint8_t { schedule, crash, mix, workload, fault, count_ };

class Choices {
 public:
  virtual ~Choices() = default;
  // 0 <= answer < count; count >= 1. 0 is the quiet default: in order, nothing torn, no fault.
  virtual std::uint32_t choose(std::uint32_t count, Why why) = 0;
  // 64 independent coins; an enumeration knows only all zeros and all ones.
  virtual std::uint64_t bits(Why why) = 0;
  virtual bool exhaustive() const = 0;
  // True once in `n` (an enumeration tries both). n == 0: never.
  bool one_in(std::uint32_t n, Why why) {
    if (n == 0) return false;
    return exhaustive() ? choose(2, why) == 1 : choose(n, why) == n - 1;
  }
};

// splitmix64; small, good enough, the same everywhere.
class RandomChoices : public Choices {
 public:
  explicit RandomChoices(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15U + 1) {}
  std::uint32_t choose(std::uint32_t count, Why why) override;
  std::uint64_t bits(Why why) override;
  bool exhaustive() const override { return false; }

 private:
  std::uint64_t state_;
};

// Always the quiet default: one deterministic run.
class QuietChoices : public Choices {
 public:
  std::uint32_t choose(std::uint32_t, Why) override { return 0; }
  std::uint64_t bits(Why) override { return 0; }
  bool exhaustive() const override { return true; }
};

// Depth-first enumeration:
//   ExhaustiveChoices c;
//   do { run(c); } while (c.next());
// A deviation is an answer other than 0; a limit on the deviations of one kind in a path keeps the
// enumeration of schedules small (almost every race shows itself within two or three of them).
class ExhaustiveChoices : public Choices {
 public:
  static constexpr std::uint32_t kUnlimited = ~std::uint32_t{0};
  ExhaustiveChoices() { limits_.fill(kUnlimited); }
  ExhaustiveChoices& limit(Why why, std::uint32_t deviations) {
    limits_[static_cast<std::size_t>(why)] = deviations;
    return *this;
  }
  std::uint32_t choose(std::uint32_t count, Why why) override;
  std::uint64_t bits(Why why) override { return choose(2, why) == 0 ? 0 : ~std::uint64_t{0}; }
  bool exhaustive() const override { return true; }

  // Prepares the next path; false when all were taken.
  bool next();
  // Prepares to take the same path again.
  void again();
  // False while this path still repeats the one before it: what follows from the answers so far was
  // seen already.
  bool fresh() const { return at_ > changed_ || paths_ == 0; }
  std::uint64_t paths() const { return paths_; }  // finished ones
  // Set when a replay asked other questions than before: the code under test is not deterministic.
  bool diverged() const { return diverged_; }
  std::string script() const;  // the answers of this path, for messages

 private:
  struct Answer {
    std::uint32_t value;
    std::uint32_t count;
    Why why;
  };
  static constexpr std::size_t kKinds = static_cast<std::size_t>(Why::count_);
  std::vector<Answer> script_;
  std::size_t at_ = 0;
  std::size_t changed_ = 0;  // the answer that next() changed
  std::array<std::uint32_t, kKinds> limits_{};
  std::array<std::uint32_t, kKinds> used_{};
  std::uint64_t paths_ = 0;
  bool diverged_ = false;
};

// The seed of run `index`: from PQBLK_SIM_SEED when it is set (then a test runs that seed only).
struct SeedPlan {
  std::uint64_t first = 1;
  std::uint64_t count = 1;
  bool pinned = false;  // PQBLK_SIM_SEED was set
};
SeedPlan seed_plan(std::uint64_t first, std::uint64_t count);

}  // namespace pqblk::sim
