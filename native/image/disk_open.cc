#include "image/disk_open.h"

#include "image/qcow2_backend.h"
#include "image/raw_backend.h"

namespace pqblk::image {
namespace {

Qcow2Options qcow2_options(OpenOptions& options, const io::File& file) {
  Qcow2Options out;
  out.read_only = options.read_only;
  out.l2_cache = options.limits.l2_cache;
  out.backing.gate = std::move(options.gate);
  out.backing.l2_cache = options.limits.l2_cache;
  out.backing.direct = file.direct ? storage::Direct::optional : storage::Direct::off;
  if (options.backing_format) {
    out.backing.format = *options.backing_format == Format::raw ? "raw" : "qcow2";
  }
  return out;
}

}  // namespace

Task<Result<std::unique_ptr<Backend>>> open_backend(QueueContext& service, const io::File& file,
                                                    OpenOptions& options) {
  switch (options.format) {
    case Format::raw:
      co_return co_await open_raw(service, file);
    case Format::qcow2:
      co_return co_await open_qcow2(service, file, qcow2_options(options, file));
    case Format::sealed:
      break;
  }
  co_return Error(Kind::invalid_argument, "no such format");
}

}  // namespace pqblk::image
