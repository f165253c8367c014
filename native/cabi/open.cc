// Opening, closing, growing a disk.
//
// Room cabi/.
#include <optional>
#include <string>
#include <utility>

#include "cabi/convert.h"

namespace pqblk::cabi {
namespace {

constexpr std::uint32_t kOpenFlags = PQBLK_OPEN_READ_ONLY | PQBLK_OPEN_DIRECT_REQUIRED |
                                     PQBLK_OPEN_SQPOLL | PQBLK_OPEN_UNAUTHENTICATED_BACKING |
                                     PQBLK_OPEN_ASSUME_NON_VOLATILE | PQBLK_OPEN_ASSUME_VOLATILE |
                                     PQBLK_OPEN_TO_RESIZE;

Error parse_cache(std::uint32_t number, image::Cache& out) {
  switch (number) {
    case PQBLK_CACHE_NONE:
      out = image::Cache::none;
      return {};
    case PQBLK_CACHE_WRITEBACK:
      out = image::Cache::writeback;
      return {};
    case PQBLK_CACHE_WRITETHROUGH:
      out = image::Cache::writethrough;
      return {};
    case PQBLK_CACHE_UNSAFE:
      out = image::Cache::unsafe;
      return {};
    default:
      return misuse("no such cache mode");
  }
}

Error parse_engine(std::uint32_t number, io::EngineType& out) {
  switch (number) {
    case PQBLK_ENGINE_AUTO:
      out = io::EngineType::automatic;
      return {};
    case PQBLK_ENGINE_IO_URING:
      out = io::EngineType::uring;
      return {};
    case PQBLK_ENGINE_AIO:
      out = io::EngineType::aio;
      return {};
    case PQBLK_ENGINE_THREADS:
      out = io::EngineType::threads;
      return {};
    default:
      return misuse("no such engine");
  }
}

Error parse_flags(std::uint32_t flags, image::OpenOptions& out) {
  if ((flags & ~kOpenFlags) != 0) return misuse("a flag of pqblk_open that this version lacks");
  constexpr std::uint32_t kBoth = PQBLK_OPEN_ASSUME_NON_VOLATILE | PQBLK_OPEN_ASSUME_VOLATILE;
  if ((flags & kBoth) == kBoth) return misuse("a write cache is volatile or it is not");
  out.read_only = (flags & PQBLK_OPEN_READ_ONLY) != 0;
  out.to_resize = (flags & PQBLK_OPEN_TO_RESIZE) != 0;
  out.direct_required = (flags & PQBLK_OPEN_DIRECT_REQUIRED) != 0;
  out.io.sqpoll = (flags & PQBLK_OPEN_SQPOLL) != 0;
  out.allow_unauthenticated_backing = (flags & PQBLK_OPEN_UNAUTHENTICATED_BACKING) != 0;
  if ((flags & kBoth) != 0) {
    out.assume_non_volatile = (flags & PQBLK_OPEN_ASSUME_NON_VOLATILE) != 0;
  }
  return {};
}

Error parse_numbers(const pqblk_open_options& from, image::OpenOptions& out) {
  if (from.queues != 0) out.queues = from.queues;
  if (from.ring_depth != 0) out.io.depth = from.ring_depth;
  out.io.spin_us = from.spin_us;
  if (from.l2_cache_bytes != 0) out.limits.l2_cache = from.l2_cache_bytes;
  if (from.entry_cache_bytes != 0) out.limits.entry_cache = from.entry_cache_bytes;
  if (from.pending_bytes != 0) out.limits.pending_data = from.pending_bytes;
  if (from.backing_format == 0) return {};
  out.backing_format.emplace();
  return parse_format(from.backing_format, *out.backing_format);
}

Error parse_options(const pqblk_open_options* given, image::OpenOptions& out) {
  pqblk_open_options from;
  if (Error e = take(given, offsetof(pqblk_open_options, flags), from)) return e;
  if (from.path == nullptr) return misuse("a disk has a path");
  if (from.reserved != 0) return misuse("a reserved member is not zero");
  out.path = from.path;
  if (Error e = parse_format(from.format, out.format)) return e;
  if (Error e = parse_flags(from.flags, out)) return e;
  if (Error e = parse_cache(from.cache, out.cache)) return e;
  if (Error e = parse_engine(from.engine, out.io.engine)) return e;
  if (Error e = parse_numbers(from, out)) return e;
  if (from.gate != nullptr) {
    out.gate = [gate = from.gate, context = from.gate_context](const std::string& path) {
      return gate(context, path.c_str()) != 0;
    };
  }
  if (from.keys != nullptr) {
    auto keys = copy_keys(from.keys->keys);
    if (!keys) return keys.take_error();
    out.keys = std::move(*keys);
    out.expected_uuid = from.keys->uuid;
  }
  return {};
}

}  // namespace
}  // namespace pqblk::cabi

using namespace pqblk;        // NOLINT: the C functions live outside it
using namespace pqblk::cabi;  // NOLINT

int pqblk_open(const pqblk_open_options* options, pqblk_disk** disk, pqblk_error* error) {
  return guarded(error, [&]() -> Error {
    if (disk == nullptr) return misuse("nowhere to put the disk");
    *disk = nullptr;
    image::OpenOptions how;
    if (Error e = parse_options(options, how)) return e;
    const std::uint32_t queues = how.queues;
    auto opened = image::Disk::open(std::move(how));
    if (!opened) return opened.take_error();
    *disk = new pqblk_disk{std::move(*opened), queues};
    return {};
  });
}

int pqblk_close(pqblk_disk* disk, pqblk_error* error) {
  const std::unique_ptr<pqblk_disk> gone(disk);
  return guarded(error, [&] { return disk == nullptr ? Error() : disk->disk->close(); });
}

int pqblk_resize(pqblk_disk* disk, uint64_t bytes, pqblk_error* error) {
  return guarded(error, [&] { return disk->disk->resize(bytes); });
}
