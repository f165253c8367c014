// A raw image: guest byte n is byte n of the file or block device.
//
// Room image/: calls io/ directly, since there is nothing to map. A raw image is raw because its
// opener said so; nothing in it is ever looked at.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "image/backend.h"

namespace pqblk::image {

// `file` outlives the backend. The size is the file's, rounded up to 512 bytes.
Task<Result<std::unique_ptr<Backend>>> open_raw(QueueContext& service, const io::File& file);

enum class RawPreallocation : std::uint8_t { off, falloc, full };

struct RawCreateOptions {
  std::uint64_t size = 0;  // bytes, a multiple of 512
  RawPreallocation preallocation = RawPreallocation::off;
  // Bytes done of the bytes to write; return false to stop (Kind::canceled).
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress;
};

// `file` is new and empty. Synced when it returns ok.
Task<Error> create_raw(io::Queue& q, const io::File& file, const RawCreateOptions& options);

}  // namespace pqblk::image
