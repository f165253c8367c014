// The two copies of the key area: opaque blobs, each with a number and a checksum.
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

Task<Result<KeyArea>> read_key_area(io::Queue& io, const io::File& file,
                                    const Extension& extension);
// Writes `blob` as number `number` into copy 0 or 1. No flush.
Task<Error> write_key_area_copy(io::Queue& io, const io::File& file, const Extension& extension,
                                std::uint32_t copy, std::uint64_t number,
                                const std::vector<std::uint8_t>& blob);

}  // namespace pqblk::sealed
