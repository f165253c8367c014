// New QCOW2 images.
//
// Room format/qcow2: writes the structures of an empty image and, when asked, maps all of it ahead.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/task.h"
#include "format/fill.h"
#include "format/qcow2/header.h"
#include "io/queue.h"

namespace pqblk::format::qcow2 {

struct CreateOptions {
  std::uint64_t size = 0;  // bytes, a multiple of 512
  std::uint32_t version = 3;
  std::uint32_t cluster_bits = 16;
  std::uint32_t refcount_bits = 16;
  bool extended_l2 = false;
  Compression compression = Compression::zlib;
  std::optional<std::string> backing_name;
  std::string backing_format;  // required with a backing name
  Preallocation preallocation = Preallocation::off;

  // Sealed disks only.
  std::uint64_t slots = 0;  // 0: one for each guest cluster
  std::uint64_t extra_incompatible = 0;
  std::vector<std::uint8_t> sealed_extension;  // payload; empty: none

  Progress progress;  // of preallocation
};

// Checks options against the specification and the limits of layout.h.
// Errors: invalid_argument, out_of_range (too large for this cluster size), by name.
Error check_create(const CreateOptions& options);

// Bytes of host space the new image will take with this preallocation, metadata included.
std::uint64_t create_space(const CreateOptions& options);

// `file` is empty (just created, or truncated by its opener). Synced when it returns ok.
Task<Error> create(io::Queue& q, const io::File& file, const CreateOptions& options);

}  // namespace pqblk::format::qcow2
