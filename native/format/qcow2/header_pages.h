// A header cluster as far as the medium gives it out.
//
// Room format/qcow2: reads, and never writes. Only the first page and what the header says that
// lies behind it are needed: a bad block elsewhere in the cluster is nothing to a reader.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "base/error.h"
#include "base/task.h"
#include "format/qcow2/header.h"
#include "io/queue.h"

namespace pqblk::format::qcow2 {

struct HeaderPages {
  static constexpr std::size_t kPage = 4096;
  // The cluster, or what the file has of it, in whole pages; the first one where it begins with no
  // header. Zeros in the place of a page that cannot be read.
  AlignedBuffer bytes;
  std::vector<std::uint64_t> unreadable;  // their offsets, ascending
  Error why;                              // of the first of them; it names the place
};

// Error: the first page cannot be read, or something else than the medium has failed.
Task<Result<HeaderPages>> read_header_pages(io::Queue& q, const io::File& file);

// parse_header() of what was read. Error as well: io_error when a page is needed that is not there.
Result<Header> parse_header_pages(const HeaderPages& pages, std::uint64_t file_size,
                                  bool allow_sealed);

}  // namespace pqblk::format::qcow2
