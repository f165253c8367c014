// The engine's own formats as subjects: raw, qcow2, and what the sealed subject of test/sealed does
// not have of itself: a structure check after every clean close, and a backing image.
//
// Room test/sim. Small disks with small clusters and caches, so that a run of a few dozen requests
// evicts metadata and allocates tables.
#pragma once

#include <cstdint>

#include "sealed/sealed_subject.h"
#include "sim/subject.h"

namespace pqblk::sim {

struct Qcow2Shape {
  std::uint32_t cluster_bits = 12;
  std::uint64_t sectors = 48;
  std::uint32_t refcount_bits = 16;
  bool extended_l2 = false;
};
Subject qcow2_subject(const Qcow2Shape& shape);

Subject raw_subject(std::uint64_t sectors);

// `backed`: over an image that holds version 0 of each sector.
Subject checked_sealed_subject(const test::SealedShape& shape, bool backed = false);

}  // namespace pqblk::sim
