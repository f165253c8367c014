// Choosing the backend that an opener asked for.
//
// Room image/, private to it. Runs on the service queue; nothing here looks into the file to find
// out what it is.
#pragma once

#include <memory>

#include "image/backend.h"
#include "image/disk.h"

namespace pqblk::image {

// Moves keys, gate and limits out of `options`.
Task<Result<std::unique_ptr<Backend>>> open_backend(QueueContext& service, const io::File& file,
                                                    OpenOptions& options);

}  // namespace pqblk::image
