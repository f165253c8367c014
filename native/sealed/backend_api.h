// What the disk and the shells need of sealed images: create, look without keys, open with keys.
//
// Lives beside sealed/ for its types; implemented in image/sealed_backend.cc, which joins the
// format, the log and the I/O.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/task.h"
#include "crypto/aead.h"
#include "io/queue.h"
#include "sealed/keys.h"

namespace pqblk::sealed {

inline constexpr std::size_t kKeyAreaBytes = 64 * 1024;  // one copy's blob, opaque to C++

enum class Preallocation : std::uint8_t { off, metadata, falloc, full };
enum class BackingPolicy : std::uint8_t { none = 0, sealed = 1, unauthenticated = 2 };

struct CreateOptions {
  std::uint64_t size = 0;           // guest bytes
  std::uint32_t cluster_bits = 16;  // 12 .. 21
  crypto::Suite suite = crypto::Suite::aes_256_gcm;
  Uuid uuid{};
  std::uint64_t log_bytes = 0;  // 0: 1/32 of the size, 8 to 256 MiB
  Preallocation preallocation = Preallocation::off;
  BackingPolicy backing_policy = BackingPolicy::none;
  std::string backing_name, backing_format;
  Uuid backing_uuid{};
  std::vector<std::uint8_t> key_area;                                     // kKeyAreaBytes
  std::function<bool(std::uint64_t done, std::uint64_t total)> progress;  // false: stop
};

// One copy of the key area. What is in it, and which of two copies counts, is the key layer's
// business: nothing that can be seen without a key vouches for either.
struct KeyAreaCopy {
  std::uint64_t number = 0;                 // as the key layer gave it
  std::array<std::uint8_t, 32> checksum{};  // over the number and the blob
  std::vector<std::uint8_t> blob;           // kKeyAreaBytes; empty: the copy is damaged
};
using KeyArea = std::array<KeyAreaCopy, 2>;
// kKeyAreaStateBytes that are others once a copy has changed.
std::vector<std::uint8_t> state_of(const KeyArea& area);

// What anyone can read without keys.
struct PublicInfo {
  std::uint32_t format_version = 0;
  std::uint64_t size = 0;
  std::uint32_t cluster_bits = 0;
  std::uint8_t suite = 0;
  Uuid uuid{};
  bool clean = false;  // closed cleanly: the log is empty
  std::uint64_t log_bytes = 0;
  std::uint32_t sessions = 0;  // entries in the session table
  BackingPolicy backing_policy = BackingPolicy::none;
  std::string backing_name, backing_format;
  Uuid backing_uuid{};
  KeyArea key_area;
};

// What create_image would refuse, before anything is touched.
Error check_create(const CreateOptions& options);
// The file is new (empty) and locked by the caller. `keys` are those inside `key_area`.
Task<Error> create_image(io::Queue& io, const io::File& file, const CreateOptions& options,
                         const VolumeKeys& keys);
Task<Result<PublicInfo>> read_public_info(io::Queue& io, const io::File& file);

// One copy of the key area becomes `blob`, durably. Without a blob nothing is written: only asked
// whether it could be.
struct KeyAreaChange {
  std::vector<std::uint8_t> blob;  // kKeyAreaBytes, or empty
  std::uint32_t copy = 0;          // 0 or 1
  std::uint64_t number = 0;        // at least 1
  std::vector<std::uint8_t>
      expected;  // state_of() what is there now, else error locked; empty: any
};
Task<Error> replace_key_area(io::Queue& io, const io::File& file, const KeyAreaChange& change);

}  // namespace pqblk::sealed
