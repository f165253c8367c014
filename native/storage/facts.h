// What the kernel knows about an open file: size, alignment, and how durable a completed write is.
//
// Room storage/, private to it. Reads statx, statfs and /sys; changes nothing but the File.
#pragma once

#include <optional>

#include "base/error.h"
#include "io/queue.h"

namespace pqblk::storage {

// Sets block_device and size. Error invalid_argument: neither a regular file nor a block device.
Error find_kind_and_size(io::File& file);

// Sets memory_align and offset_align for a file that was opened with O_DIRECT. False: the file
// system says that it would not bypass the page cache for this file.
bool find_alignment(io::File& file);

// Sets in_memory, non_volatile and atomic_4k. `assumed` is the operator's word on the write cache.
void find_durability(io::File& file, std::optional<bool> assumed);

}  // namespace pqblk::storage
