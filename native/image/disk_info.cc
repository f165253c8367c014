#include "image/disk_info.h"

#include <sys/stat.h>

#include <algorithm>

#include "base/aligned.h"
#include "format/qcow2/header_pages.h"
#include "io/queue_thread.h"

namespace pqblk::image {
namespace {

namespace qcow2 = format::qcow2;

constexpr std::size_t kProbeBytes = 4096;

Task<Result<qcow2::Header>> read_header(io::Queue& q, const io::File& file) {
  auto pages = co_await qcow2::read_header_pages(q, file);
  if (!pages) co_return pages.take_error();
  // The size is asked for after the header was read: an owner that grows the disk meanwhile makes
  // the file longer first, and then names what lies there.
  const auto size = storage::size_now(file);
  if (!size) co_return size.error();
  co_return qcow2::parse_header_pages(*pages, *size, true);
}

Task<Result<Format>> probe(io::Queue& q, const io::File& file) {
  AlignedBuffer first(kProbeBytes);
  if (Error e = co_await q.read(file, 0, first.data(), first.size())) co_return e;
  if (!qcow2::header_cluster_size(first.span())) co_return Format::raw;
  qcow2::HeaderV3 header;
  std::memcpy(&header, first.data(), sizeof header);
  const bool sealed =
      header.v2.version >= 3 && (header.incompatible_features & qcow2::bit(qcow2::kSealedBit)) != 0;
  co_return sealed ? Format::sealed : Format::qcow2;
}

Qcow2Facts facts_of(const qcow2::Header& header) {
  Qcow2Facts facts;
  facts.version = header.version;
  facts.refcount_bits = header.layout.refcount_bits();
  facts.compression = header.compression == qcow2::Compression::zstd ? "zstd" : "zlib";
  facts.extended_l2 = header.layout.extended_l2;
  facts.lazy_refcounts = (header.compatible & qcow2::bit(qcow2::kLazyRefcountsBit)) != 0;
  facts.dirty = header.has(qcow2::kDirtyBit);
  facts.corrupt = header.has(qcow2::kCorruptBit);
  facts.backing_name = header.backing_name.value_or("");
  facts.backing_format = header.backing_format();
  facts.snapshots = header.snapshot_count;
  return facts;
}

Task<Error> describe(io::Queue& q, const io::File& file, DiskInfo& info) {
  if (info.format == Format::raw) {
    info.size = align_up<std::uint64_t>(file.size, kVirtioSectorSize);
    co_return Error();
  }
  auto header = co_await read_header(q, file);
  if (!header) co_return header.take_error();
  if (header->sealed() != (info.format == Format::sealed)) {
    co_return Error(Kind::unsupported, header->sealed() ? "this qcow2 image is sealed"
                                                        : "this qcow2 image is not sealed");
  }
  info.size = header->size;
  info.cluster_size = static_cast<std::uint32_t>(header->layout.cluster_size());
  info.qcow2 = facts_of(*header);
  if (info.format == Format::sealed) {
    auto found = co_await sealed::read_public_info(q, file);
    if (!found) co_return found.take_error();
    info.sealed = std::move(*found);
  }
  co_return Error();
}

}  // namespace

Result<DiskInfo> read_disk_info(const std::string& path, std::optional<Format> format) {
  storage::OpenOptions how;
  how.read_only = true;
  how.lock = storage::Lock::none;
  auto file = storage::open_file(path, how);
  if (!file) return file.take_error();
  DiskInfo info;
  info.path = path;
  info.file_size = file->size;
  info.durability_class = storage::durability_class(*file);
  info.holder = storage::lock_holder(path);
  struct stat status {};
  if (::stat(path.c_str(), &status) == 0) {
    info.allocated_bytes = static_cast<std::uint64_t>(status.st_blocks) * 512;
  }
  auto thread = io::QueueThread::start(io::QueueOptions{});
  if (!thread) {
    storage::close_file(*file);
    return thread.take_error();
  }
  io::Queue& q = (*thread)->queue();
  Error e = (*thread)->run_sync([&]() -> Task<Error> {
    if (format) {
      info.format = *format;
    } else {
      auto found = co_await probe(q, *file);
      if (!found) co_return found.take_error();
      info.format = *found;
    }
    co_return co_await describe(q, *file, info);
  });
  (*thread)->stop();
  storage::close_file(*file);
  if (e) return e.path().empty() ? std::move(e).in(path) : std::move(e);
  return info;
}

Error replace_key_area(const std::string& path, const sealed::KeyAreaChange& change) {
  auto file = storage::open_file(path, storage::OpenOptions{});
  if (!file) return file.take_error();
  auto thread = io::QueueThread::start(io::QueueOptions{});
  Error e;
  if (thread) {
    e = (*thread)->run_sync(
        [&] { return sealed::replace_key_area((*thread)->queue(), *file, change); });
    (*thread)->stop();
  } else {
    e = thread.take_error();
  }
  storage::close_file(*file);
  return e && e.path().empty() ? std::move(e).in(path) : std::move(e);
}

}  // namespace pqblk::image
