// A tiny crash-safe store, and wrong ones: the simulator's own proof that it sees what it must see.
//
// Room test/sim. Each sector has two slots of data and a checked trailer with a sequence number. A
// write goes to the slot that is not current, and only once the current one is durable; an opener
// syncs first and takes the newer valid slot of each sector. Each ToyFault leaves one rule out.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "sim/subject.h"

namespace pqblk::sim {

enum class ToyFault : std::uint8_t {
  none,
  overwrite_only_copy,  // does not wait for the current slot to be durable
  flush_does_nothing,
  flush_joins_issued_sync,  // takes an fdatasync in flight for its own
  early_acknowledgement,    // acknowledges writes before they are complete
  open_without_sync,        // believes in what a killed process left in the page cache
  no_checksum,              // takes a torn slot for whole
  fua_without_sync,
  forgets_failed_sync,  // goes on as if a failed fdatasync could be repeated
  count_
};
inline constexpr std::size_t kToyFaults = static_cast<std::size_t>(ToyFault::count_);
const char* toy_fault_name(ToyFault fault);

// `fault` is read while the store runs and must outlive the subject. `on_write` (may be empty) sees
// every (sequence) the store consumes, as the sealed engine's tracer sees nonces.
Subject toy_subject(std::uint64_t sectors, const ToyFault& fault,
                    std::function<void(std::uint64_t sequence)> on_write = {});

}  // namespace pqblk::sim
