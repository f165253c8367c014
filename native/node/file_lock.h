// A lock on an open file, for the rooms above that keep more than disks.
//
// Room node/. The kernel keeps it, so that it ends with its holder, however that ends.
#pragma once

#include <napi.h>

namespace pqblk::node {

// lockFile(descriptor): 0, or the errno of flock(2). EWOULDBLOCK (11): somebody else has it. The
// lock is the open file's, not the process's: it ends when the descriptor is closed.
Napi::Value lock_file(const Napi::CallbackInfo& info);

}  // namespace pqblk::node
