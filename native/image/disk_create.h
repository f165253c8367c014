// Making a new disk, of any format, in one call.
//
// Room image/. Opens the file, checks the room there is, has the format write itself, and leaves
// nothing behind when that fails.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "crypto/aead.h"
#include "format/fill.h"
#include "image/disk.h"
#include "sealed/backend_api.h"
#include "sealed/keys.h"

namespace pqblk::image {

struct CreateSpec {
  std::string path;
  Format format = Format::sealed;
  std::uint64_t size = 0;               // guest bytes, a multiple of 512
  bool overwrite = false;               // replace an existing file
  bool allow_system_directory = false;  // else a file under /etc, /usr, ... is refused
  format::Preallocation preallocation = format::Preallocation::off;
  std::uint32_t cluster_size = 64 * 1024;  // bytes: qcow2 512 to 2 MiB, sealed 4 KiB to 2 MiB
  // qcow2
  std::uint32_t version = 3;
  std::uint32_t refcount_bits = 16;
  bool extended_l2 = false;
  bool compress_zstd = false;
  // qcow2, sealed
  std::string backing_name, backing_format;
  // sealed
  crypto::Suite suite = crypto::Suite::aes_256_gcm;
  sealed::Uuid uuid{};
  std::uint64_t log_bytes = 0;  // 0: as the format chooses
  sealed::BackingPolicy backing_policy = sealed::BackingPolicy::none;
  sealed::Uuid backing_uuid{};
  std::vector<std::uint8_t> key_area;
  std::optional<sealed::VolumeKeys> keys;
  // Bytes preallocated of those to preallocate; false stops (Kind::canceled).
  format::Progress progress;
};

// Host bytes that the new image takes at once.
std::uint64_t space_needed(const CreateSpec& spec);

// Blocking. Errors: exists, permission (a system directory), no_space (checked before anything is
// written), invalid_argument, canceled, and those of opening and writing.
Error create_disk(const CreateSpec& spec);

}  // namespace pqblk::image
