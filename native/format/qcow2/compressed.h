// Compressed clusters, read only: raw deflate and zstd.
//
// Room format/qcow2: pure function. Spec: "Compressed Clusters Descriptor", compression_type.
#pragma once

#include <cstdint>
#include <span>

#include "base/error.h"
#include "format/qcow2/header.h"

namespace pqblk::format::qcow2 {

// Fills all of `cluster`. `stored` may be longer than the compressed data. Kind::corrupt when it
// does not hold a whole cluster.
Error decompress(Compression type, std::span<const std::uint8_t> stored,
                 std::span<std::uint8_t> cluster);

}  // namespace pqblk::format::qcow2
