// A plain QCOW2 image as a backend.
//
// Room image/: joins the mapping (format/qcow2) with I/O and the backing chain.
#pragma once

#include <cstdint>
#include <memory>

#include "image/backend.h"
#include "image/backing.h"

namespace pqblk::image {

struct Qcow2Options {
  bool read_only = false;
  std::uint64_t l2_cache = 32 * kMiB;  // bytes
  BackingOptions backing;
};

// `file` outlives the backend. An image with the dirty bit (lazy refcounts) is repaired first when
// it is opened for writing; one marked corrupt opens read-only. Sealed images are refused by name.
Task<Result<std::unique_ptr<Backend>>> open_qcow2(QueueContext& service, const io::File& file,
                                                  Qcow2Options options);

}  // namespace pqblk::image
