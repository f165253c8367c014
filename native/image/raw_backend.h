// A raw image: guest byte n is byte n of the file or block device.
//
// Room image/: calls io/ directly, since there is nothing to map. A raw image is raw because its
// opener said so; nothing in it is ever looked at.
#pragma once

#include <cstdint>
#include <memory>

#include "format/fill.h"
#include "image/backend.h"

namespace pqblk::image {

// `file` outlives the backend. The size is the file's, rounded up to 512 bytes.
Task<Result<std::unique_ptr<Backend>>> open_raw(QueueContext& service, const io::File& file);

struct RawCreateOptions {
  std::uint64_t size = 0;                                            // bytes, a multiple of 512
  format::Preallocation preallocation = format::Preallocation::off;  // metadata: as off
  format::Progress progress;
};

// `file` is new and empty. Synced when it returns ok.
Task<Error> create_raw(io::Queue& q, const io::File& file, const RawCreateOptions& options);

}  // namespace pqblk::image
