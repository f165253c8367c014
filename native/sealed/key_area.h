// The two copies of the key area: an opaque blob, replaced atomically.
//
// Room sealed/. What the blob means is the key layer's business. docs/format.md, section 5.
#pragma once

#include <cstdint>
#include <vector>

#include "base/error.h"
#include "base/task.h"
#include "io/queue.h"
#include "sealed/extension.h"

namespace pqblk::sealed {

struct KeyArea {
  std::uint64_t generation = 0;  // of the newest valid copy; 0: none is valid
  int newest = -1;               // 0 or 1
  bool damaged[2] = {false, false};
  bool differ =
      false;  // both copies are valid and hold different blobs: a replacement was cut short
  std::vector<std::uint8_t> blob;  // kKeyAreaBytes, of the newest valid copy
};

Task<Result<KeyArea>> read_key_area(io::Queue& io, const io::File& file,
                                    const Extension& extension);
// The newest valid copy over the other one, same generation, and a flush. Harmless when repeated.
Task<Error> level_key_area(io::Queue& io, const io::File& file, const Extension& extension,
                           const KeyArea& area);
// Writes `blob` as generation `generation` into copy 0 or 1. No flush.
Task<Error> write_key_area_copy(io::Queue& io, const io::File& file, const Extension& extension,
                                int copy, std::uint64_t generation,
                                const std::vector<std::uint8_t>& blob);

}  // namespace pqblk::sealed
