#include "image/disk_create.h"

#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <filesystem>

#include "format/qcow2/create.h"
#include "image/raw_backend.h"
#include "io/queue_thread.h"
#include "storage/file.h"

namespace pqblk::image {
namespace {

namespace qcow2 = format::qcow2;
using format::Preallocation;

constexpr std::uint64_t kSealedFixedBytes = 8 * kMiB;  // key area, session table, first tables

sealed::Preallocation to_sealed(Preallocation p) {
  switch (p) {
    case Preallocation::off:
      return sealed::Preallocation::off;
    case Preallocation::metadata:
      return sealed::Preallocation::metadata;
    case Preallocation::falloc:
      return sealed::Preallocation::falloc;
    case Preallocation::full:
      return sealed::Preallocation::full;
  }
  return sealed::Preallocation::off;
}

std::uint32_t cluster_bits(const CreateSpec& spec) {
  return static_cast<std::uint32_t>(std::countr_zero(spec.cluster_size));
}

qcow2::CreateOptions qcow2_options(const CreateSpec& spec) {
  qcow2::CreateOptions out;
  out.size = spec.size;
  out.version = spec.version;
  out.cluster_bits = cluster_bits(spec);
  out.refcount_bits = spec.refcount_bits;
  out.extended_l2 = spec.extended_l2;
  out.compression = spec.compress_zstd ? qcow2::Compression::zstd : qcow2::Compression::zlib;
  if (!spec.backing_name.empty()) out.backing_name = spec.backing_name;
  out.backing_format = spec.backing_format;
  out.preallocation = spec.preallocation;
  out.progress = spec.progress;
  return out;
}

sealed::CreateOptions sealed_options(const CreateSpec& spec) {
  sealed::CreateOptions out;
  out.size = spec.size;
  out.cluster_bits = cluster_bits(spec);
  out.suite = spec.suite;
  out.uuid = spec.uuid;
  out.log_bytes = spec.log_bytes;
  out.preallocation = to_sealed(spec.preallocation);
  out.backing_policy = spec.backing_policy;
  out.backing_name = spec.backing_name;
  out.backing_format = spec.backing_format;
  out.backing_uuid = spec.backing_uuid;
  out.key_area = spec.key_area;
  out.progress = spec.progress;
  return out;
}

Error check(const CreateSpec& spec) {
  if (spec.size == 0 || spec.size % kVirtioSectorSize != 0) {
    return Error(Kind::invalid_argument, "a disk's size is a multiple of 512 bytes, and not 0");
  }
  if (spec.format != Format::raw && !std::has_single_bit(spec.cluster_size)) {
    return Error(Kind::invalid_argument, "a cluster's size is a power of two");
  }
  if (spec.format == Format::raw && spec.preallocation == Preallocation::metadata) {
    return Error(Kind::invalid_argument, "a raw disk has no metadata to preallocate");
  }
  if (spec.format == Format::sealed && !spec.keys) {
    return Error(Kind::invalid_argument, "a sealed disk is made with its keys");
  }
  if (spec.format == Format::qcow2) {
    if (Error e = qcow2::check_create(qcow2_options(spec))) return e;
  }
  if (spec.format == Format::sealed) {
    if (Error e = sealed::check_create(sealed_options(spec))) return e;
  }
  struct stat status {};
  if (::stat(spec.path.c_str(), &status) == 0 && S_ISBLK(status.st_mode)) {
    return Error(Kind::unsupported,
                 "a new disk is made in a file; a block device is opened as the raw disk it is");
  }
  if (!spec.allow_system_directory && storage::in_system_directory(spec.path)) {
    return Error(Kind::permission,
                 "this directory belongs to the system; choose another or insist (force)");
  }
  return {};
}

Error check_space(const CreateSpec& spec) {
  const std::filesystem::path parent = std::filesystem::path(spec.path).parent_path();
  auto free = storage::free_space(parent.empty() ? "." : parent.string());
  if (!free) return free.take_error();
  const std::uint64_t needed = space_needed(spec);
  if (needed <= *free) return {};
  return Error(Kind::no_space, "the new image takes " + std::to_string(needed) +
                                   " bytes at once, and the file system has " +
                                   std::to_string(*free) + " left");
}

Error write_image(const CreateSpec& spec, const io::File& file) {
  auto thread = io::QueueThread::start(io::QueueOptions{});
  if (!thread) return thread.take_error();
  io::Queue& q = (*thread)->queue();
  return (*thread)->run_sync([&]() -> Task<Error> {
    switch (spec.format) {
      case Format::raw: {
        RawCreateOptions raw;
        raw.size = spec.size;
        raw.progress = spec.progress;
        raw.preallocation = spec.preallocation;
        co_return co_await create_raw(q, file, raw);
      }
      case Format::qcow2: {
        const qcow2::CreateOptions options = qcow2_options(spec);
        co_return co_await qcow2::create(q, file, options);
      }
      case Format::sealed: {
        const sealed::CreateOptions options = sealed_options(spec);
        co_return co_await sealed::create_image(q, file, options, *spec.keys);
      }
    }
    co_return Error(Kind::invalid_argument, "no such format");
  });
}

}  // namespace

std::uint64_t space_needed(const CreateSpec& spec) {
  const bool whole =
      spec.preallocation == Preallocation::falloc || spec.preallocation == Preallocation::full;
  switch (spec.format) {
    case Format::raw:
      return whole ? spec.size : 0;
    case Format::qcow2:
      return qcow2::create_space(qcow2_options(spec));
    case Format::sealed:
      // Entries are 32 bytes for each 4096; the log is written when it is made.
      return kSealedFixedBytes + spec.log_bytes + (whole ? spec.size + spec.size / 64 : 0);
  }
  return 0;
}

Error create_disk(const CreateSpec& spec) {
  if (Error e = check(spec)) return std::move(e).in(spec.path);
  if (Error e = check_space(spec)) return std::move(e).in(spec.path);
  storage::OpenOptions how;
  how.create = true;
  how.overwrite = spec.overwrite;
  auto file = storage::open_file(spec.path, how);
  if (!file) return file.take_error();
  Error e = write_image(spec, *file);
  // Half an image is of no use, and its path would be taken. Removed under the lock.
  if (e) ::unlink(spec.path.c_str());
  storage::close_file(*file);
  if (e && e.path().empty()) return std::move(e).in(spec.path);
  return e;
}

}  // namespace pqblk::image
