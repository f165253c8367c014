// The one error type of the engine: a small stable kind, where it happened, and the cause.
//
// Room base/: knows nothing of disks. An Error is cheap to move and is built only on failure paths;
// hot paths return Result<T> and never throw. The table in error.cc maps kinds to errno values (C
// ABI) and to names (the `.code` of the Node API); it is the only such table.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace pqblk {

enum class Kind : std::uint8_t {
  ok = 0,
  io_error,          // the device or file system failed a request
  no_space,          // ENOSPC or a quota
  corrupt,           // structure of an image contradicts itself or its specification
  integrity,         // a tag or MAC does not hold
  wrong_key,         // keys do not belong to this image
  locked,            // another process holds the image
  read_only,         // a write to something opened or stored read-only
  unsupported,       // a feature this engine does not have, by name
  invalid_argument,  // the caller broke the contract
  out_of_range,      // beyond the end of the disk
  not_found,         // no such file, queue or object
  exists,            // would overwrite something
  permission,        // EACCES, EPERM
  closed,            // the handle was closed
  canceled,          // asked to stop; state is consistent
  needs_recovery,    // not closed cleanly and keys (or write access) are missing to recover
  no_random,         // the random source failed
  gate_refused,      // an implicit open of another file was not allowed by the opener
  no_memory,         // a named bound or the allocator refused
};

std::string_view kind_name(Kind kind);  // "io_error", ... stable, used in the APIs
int kind_errno(Kind kind);              // nearest positive errno value
Kind kind_from_errno(int err);

// `operation` is a string literal ("read", "open backing file"); `offset` is a byte offset in the
// file named by `path`, or kNoOffset. One pointer wide, null when all is well: every step of every
// request returns one.
class [[nodiscard]] Error {
 public:
  static constexpr std::uint64_t kNoOffset = ~std::uint64_t{0};

  Error() = default;  // ok
  Error(Kind kind, std::string message);
  static Error from_errno(int err, std::string_view operation, std::string path = {},
                          std::uint64_t offset = kNoOffset);
  Error(const Error& other) : facts_(other.facts_ ? copy_of(*other.facts_) : nullptr) {}
  Error(Error&&) noexcept = default;  // the source is ok then
  Error& operator=(const Error& other) { return *this = Error(other); }
  Error& operator=(Error&&) noexcept = default;
  ~Error() = default;

  Error&& at(std::string_view operation, std::uint64_t offset = kNoOffset) &&;
  Error&& in(std::string path) &&;

  bool ok() const { return facts_ == nullptr; }
  explicit operator bool() const { return !ok(); }  // true = there is an error
  Kind kind() const { return ok() ? Kind::ok : facts_->kind; }
  int os_errno() const { return facts().os_errno; }  // 0 when the kernel was not the cause
  const std::string& message() const { return facts().message; }
  const std::string& operation() const { return facts().operation; }
  const std::string& path() const { return facts().path; }
  std::uint64_t offset() const { return facts().offset; }
  std::string to_string() const;  // one line for people: path: operation at offset: message

 private:
  struct Facts {
    Kind kind = Kind::ok;
    int os_errno = 0;
    std::uint64_t offset = kNoOffset;
    std::string message;
    std::string operation;
    std::string path;
  };
  static std::unique_ptr<Facts> copy_of(const Facts& facts);
  const Facts& facts() const;  // those of ok when there are none

  std::unique_ptr<Facts> facts_;
};

// A value or an Error. `if (!r) return r.take_error();`
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value)
      : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT: implicit by design
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}  // NOLINT

  explicit operator bool() const { return state_.index() == 0; }  // true = there is a value
  T& operator*() { return *std::get_if<0>(&state_); }
  const T& operator*() const { return *std::get_if<0>(&state_); }
  T* operator->() { return std::get_if<0>(&state_); }
  const T* operator->() const { return std::get_if<0>(&state_); }
  const Error& error() const { return *std::get_if<1>(&state_); }
  Error take_error() { return std::move(*std::get_if<1>(&state_)); }

 private:
  std::variant<T, Error> state_;
};

}  // namespace pqblk
