#include "image/disk_open.h"

#include "image/backing.h"
#include "image/qcow2_backend.h"
#include "image/raw_backend.h"
#include "image/sealed_backend.h"
#include "sealed/backend_api.h"

namespace pqblk::image {
namespace {

BackingOptions backing_options(OpenOptions& options, const io::File& file) {
  BackingOptions out;
  out.gate = std::move(options.gate);
  out.l2_cache = options.limits.l2_cache;
  out.direct = file.direct ? storage::Direct::optional : storage::Direct::off;
  if (options.backing_format) {
    out.format = *options.backing_format == Format::raw ? "raw" : "qcow2";
  }
  return out;
}

Qcow2Options qcow2_options(OpenOptions& options, const io::File& file) {
  Qcow2Options out;
  out.read_only = options.read_only;
  out.l2_cache = options.limits.l2_cache;
  out.backing = backing_options(options, file);
  return out;
}

using Opened = Result<std::unique_ptr<Backend>>;

// The header is not authenticated yet: whatever it names is opened only where the opener allowed
// it, and the sealed backend, which has the keys, then decides whether the header may be believed.
Task<Opened> open_sealed_backing(QueueContext& service, const io::File& file,
                                 OpenOptions& options) {
  auto info = co_await sealed::read_public_info(service.io, file);
  if (!info) co_return info.take_error();
  switch (info->backing_policy) {
    case sealed::BackingPolicy::none:
      co_return std::unique_ptr<Backend>();
    case sealed::BackingPolicy::sealed:
      co_return Error(Kind::unsupported,
                      "a sealed backing image needs keys of its own, and this "
                      "engine opens one sealed image at a time");
    case sealed::BackingPolicy::unauthenticated:
      break;
  }
  if (!options.allow_unauthenticated_backing) {
    co_return Error(Kind::gate_refused,
                    "the backing image '" + info->backing_name +
                        "' is not authenticated, and the opener did not consent to that");
  }
  BackingOptions below = backing_options(options, file);
  co_return co_await open_backing(service, file, info->backing_name, info->backing_format,
                                  std::move(below));
}

Task<Opened> open_sealed(QueueContext& service, const io::File& file, OpenOptions& options) {
  if (!options.keys) co_return Error(Kind::invalid_argument, "a sealed disk opens with its keys");
  Opened backing = co_await open_sealed_backing(service, file, options);
  if (!backing) co_return backing.take_error();
  SealedOptions how;
  how.read_only = options.read_only;
  how.to_resize = options.to_resize;
  how.keys = std::move(*options.keys);
  how.expected_uuid = options.expected_uuid;
  how.limits = options.limits;
  how.backing = std::move(*backing);
  how.allow_unauthenticated_backing = options.allow_unauthenticated_backing;
  auto opened = co_await SealedBackend::open(service, file, std::move(how));
  if (!opened) co_return opened.take_error();
  co_return std::unique_ptr<Backend>(std::move(*opened));
}

}  // namespace

Task<Opened> open_backend(QueueContext& service, const io::File& file, OpenOptions& options) {
  switch (options.format) {
    case Format::raw:
      co_return co_await open_raw(service, file);
    case Format::qcow2: {
      Qcow2Options how = qcow2_options(options, file);
      co_return co_await open_qcow2(service, file, std::move(how));
    }
    case Format::sealed:
      co_return co_await open_sealed(service, file, options);
  }
  co_return Error(Kind::invalid_argument, "no such format");
}

}  // namespace pqblk::image
