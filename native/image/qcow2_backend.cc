#include "image/qcow2_backend.h"

#include <utility>

#include "format/qcow2/check.h"
#include "image/qcow2_image.h"

namespace pqblk::image {
namespace {

using Opened = Result<std::unique_ptr<qcow2::Metadata>>;

// Lazy refcounts: the image was not closed cleanly, and its refcounts have to be made right before
// anything is allocated. `size` receives the file's size afterwards.
Task<Error> repair_dirty(io::Queue& q, const io::File& file, std::uint64_t& size) {
  qcow2::OpenOptions options;
  options.for_check = true;
  Opened metadata = co_await qcow2::Metadata::open(q, file, options);
  if (!metadata) co_return metadata.take_error();
  qcow2::CheckOptions how;
  how.repair = true;
  Result<qcow2::CheckReport> report = co_await qcow2::check(q, **metadata, how);
  if (!report) co_return report.take_error();
  if (report->corruptions != 0) {
    co_return Error(Kind::corrupt, "the image was not closed cleanly and could not be repaired: " +
                                       std::to_string(report->corruptions) + " errors are left")
        .in(file.path);
  }
  (*metadata)->header().incompatible &= ~qcow2::bit(qcow2::kDirtyBit);
  Error error = co_await (*metadata)->write_header_fields(q);
  if (!error) error = co_await (*metadata)->io().sync(q);
  size = (*metadata)->io().host_end();
  co_return error;
}

}  // namespace

Task<Result<std::unique_ptr<Backend>>> open_qcow2(QueueContext& service, const io::File& file,
                                                  Qcow2Options options) {
  qcow2::OpenOptions how;
  how.read_only = options.read_only;
  how.l2_cache_bytes = options.l2_cache;
  std::unique_ptr<io::File> grown;
  Opened metadata = co_await qcow2::Metadata::open(service.io, file, how);
  if (!metadata && metadata.error().kind() == Kind::needs_recovery) {
    grown = std::make_unique<io::File>(file);
    Error error = co_await repair_dirty(service.io, file, grown->size);
    if (error) co_return error;
    metadata = co_await qcow2::Metadata::open(service.io, *grown, how);
  }
  if (!metadata) co_return metadata.take_error();
  std::unique_ptr<Backend> backing;
  const qcow2::Header& header = (*metadata)->header();
  if (header.backing_name) {
    Result<std::unique_ptr<Backend>> below = co_await open_backing(
        service, file, *header.backing_name, header.backing_format(), std::move(options.backing));
    if (!below) co_return below.take_error();
    backing = std::move(*below);
  }
  co_return std::unique_ptr<Backend>(
      new Qcow2Image(file, std::move(*metadata), std::move(grown), std::move(backing)));
}

}  // namespace pqblk::image
