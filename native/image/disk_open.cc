#include "image/disk_open.h"

#include "image/raw_backend.h"

namespace pqblk::image {

Task<Result<std::unique_ptr<Backend>>> open_backend(QueueContext& service, const io::File& file,
                                                    OpenOptions& options) {
  switch (options.format) {
    case Format::raw:
      co_return co_await open_raw(service, file);
    case Format::qcow2:
    case Format::sealed:
      break;
  }
  co_return Error(Kind::invalid_argument, "no such format");
}

}  // namespace pqblk::image
