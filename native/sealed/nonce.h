// Nonces that never repeat inside a session.
//
// Room sealed/. A nonce is lane (2 bytes) ‖ counter (6) ‖ random (4), from memory only, never from
// disk. Each queue takes a lane of its own at the start of a session and none is given out twice.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "base/error.h"
#include "crypto/aead.h"

namespace pqblk::sealed {

// A session ends before any lane has sealed this many sectors: with 64 lanes, 2^36 in all.
inline constexpr std::uint64_t kLaneSectorsMax = std::uint64_t{1} << 30;

class NonceLane {
 public:
  NonceLane() = default;
  // Starts a lane of a new session. `lane` must never have been used in that session.
  // It serves `sectors_max` nonces, then the session must end.
  Error begin(std::uint16_t lane, std::uint64_t sectors_max = kLaneSectorsMax);
  // True while at least `count` more nonces may be claimed. A lane that is spent needs a new
  // session.
  bool has(std::uint64_t count) const { return active_ && claimed_ + count <= sectors_max_; }
  // Sets `count` nonces aside for the caller, so that requests in flight together cannot all count
  // on the same last ones. What is claimed and then not taken is lost. False: the lane is spent.
  bool claim(std::uint64_t count) {
    if (!has(count)) return false;
    claimed_ += count;
    return true;
  }
  // Precondition: claimed. Kind::no_random when the random source fails: nothing is consumed then.
  Error next(crypto::Nonce& out);

 private:
  Error refill();
  static constexpr std::size_t kBatch = 256;
  bool active_ = false;
  std::uint16_t lane_ = 0;
  std::uint64_t counter_ = 0;
  std::uint64_t claimed_ = 0;
  std::uint64_t sectors_max_ = 0;
  std::size_t random_left_ = 0;
  std::array<std::uint32_t, kBatch> random_{};
};

// Tests trace every nonce under its session key; null in production.
using NonceTracer = void (*)(std::uint32_t session, const std::uint8_t* salt32,
                             const crypto::Nonce& nonce, bool log_key);
extern std::atomic<NonceTracer> nonce_tracer;

}  // namespace pqblk::sealed
