// The engine's own formats as subjects: raw, qcow2 and sealed, in the shapes that tests want.
//
// Room test/sim. Small disks with small clusters, logs and caches, so that a run of a few dozen
// requests wraps the log, evicts metadata, allocates tables and ends sessions.
#pragma once

#include <cstdint>

#include "crypto/aead.h"
#include "sim/nonce_trace.h"
#include "sim/subject.h"

namespace pqblk::sim {

inline constexpr FileFacts kVolatileDevice{};
inline constexpr FileFacts kSafeDevice{.device = {.non_volatile = true, .atomic_4k = true},
                                       .align = 4096};

struct SealedShape {
  std::uint32_t cluster_bits = 14;
  std::uint64_t sectors = 48;
  std::uint64_t log_bytes = 256 * 1024;
  crypto::Suite suite = crypto::Suite::aes_256_gcm;
  FileFacts file = kVolatileDevice;
  bool backed = false;                      // over an image that holds version 0 of each sector
  std::uint64_t overlay_sectors = 1 << 20;  // a checkpoint is due at half of it
  std::uint64_t session_sectors = 1 << 20;  // of one lane, before a new session
};
Subject sealed_subject(const SealedShape& shape);
// What the sealed subjects' verdict looks at; reset when a run begins.
NonceTrace& nonce_trace();

struct Qcow2Shape {
  std::uint32_t cluster_bits = 12;
  std::uint64_t sectors = 48;
  std::uint32_t refcount_bits = 16;
  bool extended_l2 = false;
};
Subject qcow2_subject(const Qcow2Shape& shape);

Subject raw_subject(std::uint64_t sectors);

}  // namespace pqblk::sim
