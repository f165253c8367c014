#include "sim/choices.h"

#include <cassert>
#include <cstdlib>

namespace pqblk::sim {

std::uint64_t RandomChoices::bits(Why) {
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}

std::uint32_t RandomChoices::choose(std::uint32_t count, Why why) {
  assert(count >= 1);
  return static_cast<std::uint32_t>(((bits(why) >> 32) * count) >> 32);
}

std::uint32_t ExhaustiveChoices::choose(std::uint32_t count, Why why) {
  assert(count >= 1);
  if (count == 1) return 0;
  const auto kind = static_cast<std::size_t>(why);
  if (used_[kind] >= limits_[kind]) return 0;
  if (at_ == script_.size()) script_.push_back({0, count, why});
  const Answer& answer = script_[at_++];
  if (answer.count != count || answer.why != why) {
    diverged_ = true;
    return 0;
  }
  if (answer.value != 0) ++used_[kind];
  return answer.value;
}

bool ExhaustiveChoices::next() {
  ++paths_;
  script_.resize(at_);
  while (!script_.empty() && script_.back().value + 1 == script_.back().count) script_.pop_back();
  again();
  if (script_.empty()) return false;
  ++script_.back().value;
  changed_ = script_.size() - 1;
  return true;
}

void ExhaustiveChoices::again() {
  at_ = 0;
  used_.fill(0);
}

std::string ExhaustiveChoices::script() const {
  std::string text;
  for (std::size_t i = 0; i < at_; ++i) {
    if (!text.empty()) text += ' ';
    text += std::to_string(script_[i].value) + "/" + std::to_string(script_[i].count);
  }
  return text;
}

SeedPlan seed_plan(std::uint64_t first, std::uint64_t count) {
  if (const char* seed = std::getenv("PQBLK_SIM_SEED")) {
    return {std::strtoull(seed, nullptr, 0), 1, true};
  }
  return {first, count, false};
}

}  // namespace pqblk::sim
