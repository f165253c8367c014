#include "cabi/convert.h"

#include <string>
#include <utility>

namespace pqblk::cabi {
namespace {

// The C names are the engine's, in its order.
static_assert(PQBLK_OK == static_cast<int>(Kind::ok));
static_assert(PQBLK_IO_ERROR == static_cast<int>(Kind::io_error));
static_assert(PQBLK_INTEGRITY == static_cast<int>(Kind::integrity));
static_assert(PQBLK_LOCKED == static_cast<int>(Kind::locked));
static_assert(PQBLK_INVALID_ARGUMENT == static_cast<int>(Kind::invalid_argument));
static_assert(PQBLK_PERMISSION == static_cast<int>(Kind::permission));
static_assert(PQBLK_NEEDS_RECOVERY == static_cast<int>(Kind::needs_recovery));
static_assert(PQBLK_NO_MEMORY == static_cast<int>(Kind::no_memory));

static_assert(PQBLK_READ == static_cast<int>(image::RequestType::in));
static_assert(PQBLK_WRITE == static_cast<int>(image::RequestType::out));
static_assert(PQBLK_FLUSH == static_cast<int>(image::RequestType::flush));
static_assert(PQBLK_DISCARD == static_cast<int>(image::RequestType::discard));
static_assert(PQBLK_WRITE_ZEROES == static_cast<int>(image::RequestType::write_zeroes));

// What programs were compiled with.
static_assert(sizeof(pqblk_error) == 512 && sizeof(pqblk_data_key) == 40);
static_assert(sizeof(pqblk_open_options) == 96 && sizeof(pqblk_facts) == 328);
static_assert(sizeof(pqblk_stats) == 112 && sizeof(pqblk_queue_stats) == 80);
static_assert(sizeof(pqblk_image_info) == 64 && sizeof(pqblk_extent) == 24);
static_assert(sizeof(pqblk_request) == 56 && sizeof(pqblk_completion) == 16);

bool is_kind(int kind) { return kind >= PQBLK_OK && kind <= PQBLK_NO_MEMORY; }

std::uint32_t flags_of(std::uint32_t type) {
  switch (type) {
    case PQBLK_WRITE:
      return PQBLK_FUA;
    case PQBLK_WRITE_ZEROES:
      return PQBLK_FUA | PQBLK_UNMAP;
    default:
      return 0;
  }
}

}  // namespace

int report(pqblk_error* out, const Error& error) noexcept {
  const int kind = static_cast<int>(error.kind());
  if (out == nullptr || out->size < sizeof out->size) return kind;
  pqblk_error value = PQBLK_ERROR_INIT;
  value.kind = kind;
  value.os_errno = error.os_errno();
  value.offset = error.offset();
  try {
    if (error) put_text(value.message, error.to_string());
  } catch (const std::bad_alloc&) {
    // The kind must do.
  }
  const std::size_t size = out->size;
  constexpr std::size_t kText = offsetof(pqblk_error, message);
  if (size > kText && size < kText + sizeof value.message) value.message[size - kText - 1] = '\0';
  put(out, value, size);
  return kind;
}

Error parse_format(std::uint32_t number, image::Format& out) {
  switch (number) {
    case PQBLK_RAW:
      out = image::Format::raw;
      return {};
    case PQBLK_QCOW2:
      out = image::Format::qcow2;
      return {};
    case PQBLK_SEALED:
      out = image::Format::sealed;
      return {};
    default:
      return misuse("the format of a disk must be said: PQBLK_RAW, PQBLK_QCOW2 or PQBLK_SEALED");
  }
}

Error fill_request(std::uint32_t type, std::uint32_t flags, std::uint64_t offset,
                   std::uint64_t length, image::Request& out) {
  if ((flags & ~flags_of(type)) != 0) return misuse("the request has a flag that its type lacks");
  out.type = static_cast<image::RequestType>(type);
  if (out.type == image::RequestType::get_id) {  // the engine knows it, this interface does not
    return Error(Kind::unsupported, "request type 8 is no part of libpqblk's interface");
  }
  out.fua = (flags & PQBLK_FUA) != 0;
  out.zero_flags = (flags & PQBLK_UNMAP) != 0 ? std::uint32_t{image::kZeroUnmap} : 0;
  out.offset = offset;
  out.length = length;
  out.iov = nullptr;
  out.iov_count = 0;
  out.next = nullptr;
  return {};
}

Result<sealed::VolumeKeys> copy_keys(const sealed::VolumeKeys& keys) {
  sealed::VolumeKeys copy;
  copy.current_epoch = keys.current_epoch;
  copy.key_area_state = keys.key_area_state;
  auto integrity = crypto::SecretKey::copy_of(keys.integrity.bytes());
  if (!integrity) return integrity.take_error();
  copy.integrity = std::move(*integrity);
  for (const sealed::DataKey& key : keys.data) {
    auto own = crypto::SecretKey::copy_of(key.key.bytes());
    if (!own) return own.take_error();
    copy.data.push_back({key.epoch, std::move(*own)});
  }
  return copy;
}

}  // namespace pqblk::cabi

using namespace pqblk;  // NOLINT: the C functions live outside it

uint32_t pqblk_abi_version(void) { return PQBLK_ABI_VERSION; }

const char* pqblk_version(void) { return PQBLK_VERSION; }

const char* pqblk_kind_name(int kind) {
  return cabi::is_kind(kind) ? kind_name(static_cast<Kind>(kind)).data() : "unknown";
}

int pqblk_kind_errno(int kind) {
  return kind_errno(cabi::is_kind(kind) ? static_cast<Kind>(kind) : Kind::io_error);
}
