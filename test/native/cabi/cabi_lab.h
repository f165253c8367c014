// What the tests of the C interface share: disks of every format in temporary files, keys, and the
// engine itself as the oracle for what a disk holds.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "image/disk.h"
#include "pqblk.h"

namespace pqblk::test {

inline constexpr std::uint8_t kUuidFill = 0xa5;

// The keys of every sealed disk here; another `fill` makes other keys. Freed by the caller.
pqblk_keys* make_keys(std::uint8_t fill = 0x11, std::uint8_t uuid_fill = kUuidFill);

// A new disk of zeros, removed at the end.
class DiskFile {
 public:
  DiskFile(std::uint32_t format, std::uint64_t size);
  ~DiskFile();
  DiskFile(const DiskFile&) = delete;
  const std::string& path() const { return path_; }
  std::uint32_t format() const { return format_; }

  // Closed by the caller; fails the test when it does not open.
  pqblk_disk* open(std::uint32_t queues = 1, std::uint32_t flags = 0) const;
  // The kind, with the error filled.
  int try_open(const pqblk_open_options& options, pqblk_error& error) const;
  // The whole content, read by the engine behind the C interface's back.
  std::vector<std::uint8_t> content() const;

 private:
  std::string path_;
  std::uint32_t format_;
};

std::string format_name(std::uint32_t format);
std::vector<std::uint8_t> noise(std::uint64_t size, std::uint64_t seed);

// Reads or writes that a queue shall do, for tests that do not care about more.
pqblk_request request(std::uint32_t type, const iovec* iov, std::uint64_t offset,
                      std::uint64_t cookie);

// Waits (bounded) on the queue's descriptor and fetches `count` completions.
std::vector<pqblk_completion> fetch(pqblk_queue* queue, std::size_t count);

// Whether poll(2) reports the descriptor readable within the time.
bool readable(int fd, int timeout_ms);

}  // namespace pqblk::test
