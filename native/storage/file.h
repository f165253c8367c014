// Opening files and block devices: O_DIRECT policy, locks, alignment and durability facts.
//
// Room storage/. Everything that blocks happens here, at open and close; data moves through
// io::Queue. It knows nothing of image formats. The lock is an OFD write (or read) lock on the very
// file description that the rings write through (O_CLOEXEC), so a killed process's lock lives as
// long as its ring can still write.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "base/error.h"
#include "io/queue.h"

namespace pqblk::storage {

enum class Direct : std::uint8_t { off, optional, required };
enum class Lock : std::uint8_t { none, shared, exclusive };

struct OpenOptions {
  bool read_only = false;
  Direct direct = Direct::off;
  Lock lock = Lock::exclusive;  // read-only openers use shared
  bool create = false;          // with O_EXCL unless overwrite
  bool overwrite = false;       // with create: truncate an existing regular file (under its lock)
  std::uint32_t lock_wait_ms = 2000;  // a killed process's ring may hold the lock a moment longer
  std::optional<bool> assume_non_volatile;  // the operator's word on the device's write cache
};

// A regular file or block device. A file that is created has mode 0600 and its directory entry is
// durable on return; one that cannot be opened as asked is removed again.
// Errors: not_found, exists, permission, read_only, locked (with pid and command of the holder when
// known), unsupported (O_DIRECT required and refused), invalid_argument (not a file), io_error.
Result<io::File> open_file(const std::string& path, const OpenOptions& options);
void close_file(io::File& file);

// Bytes of the file now; of a block device its capacity. File::size is that of the open.
Result<std::uint64_t> size_now(const io::File& file);

struct Hole {
  std::uint64_t begin = 0, end = 0;  // the same: there is none
};

// The first part of [from, to) that the file system holds no written blocks for; none where it does
// not tell, and on block devices.
Hole next_hole(const io::File& file, std::uint64_t from, std::uint64_t to);

struct LockHolder {
  std::int64_t pid = 0;  // 0: unknown
  std::string command;
};
std::optional<LockHolder> lock_holder(const std::string& path);

// Free bytes a file in this directory could still take.
Result<std::uint64_t> free_space(const std::string& directory);

// Whether the (possibly new) file would lie in a directory that belongs to the system, where nobody
// keeps disk images on purpose: /, /boot, /dev, /etc, /usr, ... Symbolic links are followed.
bool in_system_directory(const std::string& path);

// For people: "volatile write cache (O2)", "non-volatile, 4096-byte atomic writes (O1)",
// "RAM-backed".
std::string durability_class(const io::File& file);

// How an image opens another file that its header names (a backing file). The opener of the top
// image sets the gate; without one every implicit open is refused (Kind::gate_refused).
using Gate = std::function<bool(const std::string& path)>;

}  // namespace pqblk::storage
