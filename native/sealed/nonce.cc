#include "sealed/nonce.h"

#include <cassert>
#include <span>

#include "base/endian.h"
#include "crypto/kdf.h"

namespace pqblk::sealed {

std::atomic<NonceTracer> nonce_tracer{nullptr};

Error NonceLane::begin(std::uint16_t lane, std::uint64_t sectors_max) {
  lane_ = lane;
  sectors_max_ = sectors_max;
  counter_ = claimed_ = 0;
  random_left_ = 0;
  if (Error e = refill()) return e;
  active_ = true;
  return {};
}

Error NonceLane::refill() {
  auto bytes = std::span(reinterpret_cast<std::uint8_t*>(random_.data()), sizeof random_);
  if (Error e = crypto::random_bytes(bytes)) return e;
  random_left_ = kBatch;
  return {};
}

Error NonceLane::next(crypto::Nonce& out) {
  assert(active_ && counter_ < claimed_);
  if (random_left_ == 0) {
    if (Error e = refill()) return e;
  }
  Be16 lane = lane_;
  Be64 counter = counter_++;  // consumed here, before any encryption (I4)
  const std::uint32_t random = random_[--random_left_];
  std::memcpy(out.data(), &lane, 2);
  std::memcpy(out.data() + 2, reinterpret_cast<const std::uint8_t*>(&counter) + 2, 6);
  std::memcpy(out.data() + 8, &random, 4);
  return {};
}

}  // namespace pqblk::sealed
