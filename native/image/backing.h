// Backing images: the files below an overlay, opened read-only behind the opener's gate.
//
// Room image/. The name comes from an image's header, that is, from whoever could write the image:
// nothing is opened unless the gate allows its path, its format is never probed, and a chain that
// comes back to one of its own files is refused.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "image/backend.h"
#include "storage/file.h"

namespace pqblk::image {

inline constexpr std::size_t kBackingDepthMax = 64;

struct FileId {
  dev_t device = 0;
  ino_t inode = 0;
  bool operator==(const FileId&) const = default;
};

struct BackingOptions {
  storage::Gate gate;  // none: every backing file is refused
  std::string format;  // when the header does not say: "raw" or "qcow2"
  storage::Direct direct = storage::Direct::off;
  std::uint64_t l2_cache = 32 * kMiB;  // bytes, for each qcow2 image of the chain
  std::vector<FileId> chain;           // the images above, the top one first
};

// Where `name`, found in the header of the image at `image_path`, leads: relative names start at
// that image's directory. Kind::unsupported for protocol names ("nbd:...", "json:...").
Result<std::string> backing_path(const std::string& image_path, const std::string& name);

// Opens the backing file of `image`. `format` is what the header says ("" when it does not). The
// result owns its file, takes reads of any alignment, and reads zeros beyond its end. Errors:
// gate_refused, unsupported (format), corrupt (a loop), and those of opening.
Task<Result<std::unique_ptr<Backend>>> open_backing(QueueContext& service, const io::File& image,
                                                    const std::string& name,
                                                    const std::string& format,
                                                    BackingOptions options);

}  // namespace pqblk::image
