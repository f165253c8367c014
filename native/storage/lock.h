// One writer: locks on open file descriptions, and who holds them.
//
// Room storage/, private to it. Knows descriptors and /proc; nothing of images.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/error.h"
#include "storage/file.h"

namespace pqblk::storage {

// Locks the whole file for this description, trying for wait_ms. Error locked: with pid and command
// of the holder when they can be found out.
Error lock_description(int fd, const std::string& path, Lock lock, std::uint32_t wait_ms);

// The holder of a lock on the open file that would stand against an exclusive one.
std::optional<LockHolder> holder_of(int fd);

}  // namespace pqblk::storage
