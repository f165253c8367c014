// A fixed number of 4 KiB requests at random places of one queue, started and completed on the
// queue's own thread, as exports do.
//
// Room test/hotpath. Nothing in it depends on time: the same numbers give the same requests in the
// same order. `begin` and `end` are called on the queue's thread, with `depth` requests in flight.
#pragma once

#include <cstdint>
#include <functional>

#include "image/disk.h"

namespace pqblk::test {

struct LoadSpec {
  image::RequestType type = image::RequestType::in;
  std::uint32_t depth = 32;
  std::uint64_t warm = 0;            // requests before `begin`
  std::uint64_t ops = 0;             // from `begin` to `end`
  std::uint64_t blocks = 0;          // of 4 KiB, from the disk's start on, that are asked for
  std::function<void()> begin, end;  // may be empty
};

// The first error of a request. Blocking; never on a queue's thread.
Error run_load(image::Disk& disk, const LoadSpec& spec);

}  // namespace pqblk::test
