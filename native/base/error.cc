#include "base/error.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace pqblk {
namespace {

struct KindRow {
  Kind kind;
  std::string_view name;
  int err;
};

// The one table from kinds to names and errno values; indexed by kind.
constexpr std::array kKinds = {
    KindRow{Kind::ok, "ok", 0},
    KindRow{Kind::io_error, "io_error", EIO},
    KindRow{Kind::no_space, "no_space", ENOSPC},
    KindRow{Kind::corrupt, "corrupt", EUCLEAN},
    KindRow{Kind::integrity, "integrity", EBADMSG},
    KindRow{Kind::wrong_key, "wrong_key", EKEYREJECTED},
    KindRow{Kind::locked, "locked", EBUSY},
    KindRow{Kind::read_only, "read_only", EROFS},
    KindRow{Kind::unsupported, "unsupported", ENOTSUP},
    KindRow{Kind::invalid_argument, "invalid_argument", EINVAL},
    KindRow{Kind::out_of_range, "out_of_range", ERANGE},
    KindRow{Kind::not_found, "not_found", ENOENT},
    KindRow{Kind::exists, "exists", EEXIST},
    KindRow{Kind::permission, "permission", EACCES},
    KindRow{Kind::closed, "closed", EBADF},
    KindRow{Kind::canceled, "canceled", ECANCELED},
    KindRow{Kind::needs_recovery, "needs_recovery", ENOTRECOVERABLE},
    KindRow{Kind::no_random, "no_random", ENODATA},
    KindRow{Kind::gate_refused, "gate_refused", EPERM},
    KindRow{Kind::no_memory, "no_memory", ENOMEM},
};

constexpr bool in_order() {
  for (std::size_t i = 0; i < kKinds.size(); ++i) {
    if (static_cast<std::size_t>(kKinds[i].kind) != i) return false;
  }
  return true;
}
static_assert(in_order() && kKinds.back().kind == Kind::no_memory, "one row for each kind");

const KindRow& row(Kind kind) {
  const auto index = static_cast<std::size_t>(kind);
  return kKinds[index < kKinds.size() ? index : static_cast<std::size_t>(Kind::io_error)];
}

// strerror_r has two signatures; the overloads pick whichever the C library declares.
[[maybe_unused]] const char* described(int result, const char* buffer) {
  return result == 0 ? buffer : "unknown error";
}
[[maybe_unused]] const char* described(const char* result, const char*) { return result; }

std::string describe_errno(int err) {
  std::array<char, 128> buffer{};
  return described(::strerror_r(err, buffer.data(), buffer.size()), buffer.data());
}

}  // namespace

std::string_view kind_name(Kind kind) { return row(kind).name; }

int kind_errno(Kind kind) { return row(kind).err; }

// Several errno values mean the same thing to a caller; what has no kind of its own is io_error.
Kind kind_from_errno(int err) {
  switch (err) {
    case EDQUOT:
    case EFBIG:
      return Kind::no_space;
    case EPERM:
      return Kind::permission;
    case EAGAIN:  // a lock that another holder keeps
    case ETXTBSY:
      return Kind::locked;
    case ENOSYS:
    case EOPNOTSUPP:
      return Kind::unsupported;
    case ENAMETOOLONG:
    case EISDIR:
    case ENOTDIR:
    case ELOOP:
    case EFAULT:
      return Kind::invalid_argument;
    case EOVERFLOW:
      return Kind::out_of_range;
    case ENXIO:
    case ENODEV:
      return Kind::not_found;
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
      return Kind::no_memory;
    default:
      break;
  }
  const auto* found =
      std::find_if(kKinds.begin(), kKinds.end(), [err](const KindRow& r) { return r.err == err; });
  return found == kKinds.end() ? Kind::io_error : found->kind;
}

Error::Error(Kind kind, std::string message)
    : facts_(kind == Kind::ok
                 ? nullptr
                 : new Facts{
                       .kind = kind, .message = std::move(message), .operation = {}, .path = {}}) {}

std::unique_ptr<Error::Facts> Error::copy_of(const Facts& facts) {
  return std::make_unique<Facts>(facts);
}

const Error::Facts& Error::facts() const {
  static const Facts none;
  return facts_ ? *facts_ : none;
}

Error Error::from_errno(int err, std::string_view operation, std::string path,
                        std::uint64_t offset) {
  const Kind kind = kind_from_errno(err);
  // A failure that left errno at 0 is still one.
  Error error(kind == Kind::ok ? Kind::io_error : kind, describe_errno(err));
  error.facts_->os_errno = err;
  error.facts_->operation = operation;
  error.facts_->path = std::move(path);
  error.facts_->offset = offset;
  return error;
}

// The first place named is the innermost and the most exact; outer callers do not overwrite it.
Error&& Error::at(std::string_view operation, std::uint64_t offset) && {
  if (facts_ && facts_->operation.empty()) facts_->operation = operation;
  if (facts_ && facts_->offset == kNoOffset) facts_->offset = offset;
  return std::move(*this);
}

Error&& Error::in(std::string path) && {
  if (facts_ && facts_->path.empty()) facts_->path = std::move(path);
  return std::move(*this);
}

std::string Error::to_string() const {
  if (ok()) return "ok";
  const Facts& f = *facts_;
  std::string text;
  if (!f.path.empty()) text += f.path + ": ";
  text += f.operation;
  if (f.offset != kNoOffset) {
    if (!f.operation.empty()) text += ' ';
    text += "at " + std::to_string(f.offset);
  }
  if (!f.operation.empty() || f.offset != kNoOffset) text += ": ";
  text += f.message.empty() ? std::string(kind_name(f.kind)) : f.message;
  return text;
}

}  // namespace pqblk
