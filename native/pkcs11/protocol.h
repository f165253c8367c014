// The messages between pqblk and its token process: their parser, their limits, the reply's writer.
//
// Room pkcs11/. A message is a u32 length and that many bytes. A request begins with a u8
// operation; a reply with a u8 status. Numbers are little-endian; bytes and text carry a u32
// length; a list its u32 count. src/keys/pkcs11/wire.ts is the other end. The parser believes
// nothing: it knows no module, allocates in proportion to the message, and its spans point into the
// message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/error.h"

namespace pqblk::pkcs11 {

using Bytes = std::span<const std::uint8_t>;

inline constexpr std::size_t kMessageBytesMax = 32768;
inline constexpr std::size_t kAttributesMax = 32;
inline constexpr std::size_t kAttributeBytesMax = 8192;
inline constexpr std::size_t kPreloadsMax = 8;
inline constexpr std::size_t kSlotsMax = 64;
inline constexpr std::size_t kObjectsMax = 1024;
inline constexpr std::size_t kTextBytesMax = 4096;
inline constexpr std::size_t kSecretBytesMax = 64;

// How a private key is asked for a shared secret.
enum class Style : std::uint8_t { encapsulate = 0, derive = 1, decrypt = 2 };

struct AttributeValue {
  std::uint64_t type;
  Bytes value;
};
using Template = std::vector<AttributeValue>;

struct Load {
  std::string path;
  std::vector<std::string> preloads;
  bool os_locking;
  bool has_configuration;
  std::string configuration;  // where the standard has pReserved
  Style style;
};
struct DescribeSlot {
  std::uint64_t slot;
};
struct DescribeMechanism {
  std::uint64_t slot;
  std::uint64_t mechanism;
};
struct Open {
  std::uint64_t slot;
  bool read_write;
};
struct Login {
  bool security_officer;
  bool has_pin;  // without: the token has a PIN pad of its own
  Bytes pin;
};
struct InitPin {
  Bytes pin;
};
struct Find {
  Template criteria;
};
struct GetAttributes {
  std::uint64_t object;
  std::vector<std::uint64_t> types;
};
struct Generate {
  std::uint64_t mechanism;
  Template public_key;
  Template private_key;
};
struct Decapsulate {
  std::uint64_t mechanism;
  std::uint64_t key;
  Bytes ciphertext;
  // As long as the longest secret. The reply's secret is XORed with it: what a receiver's runtime
  // copies on its way is worth nothing once the mask was wiped.
  Bytes mask;
  Template secret;  // not used by style decrypt
};
struct Create {
  Template object;
};
struct Destroy {
  std::uint64_t object;
};
struct Close {};

// In the order of their numbers, from 1.
using Request = std::variant<Load, DescribeSlot, DescribeMechanism, Open, Login, InitPin, Find,
                             GetAttributes, Generate, Decapsulate, Create, Destroy, Close>;

// Kind::invalid_argument names the field that does not fit. Nothing may follow the last field.
Result<Request> parse_request(Bytes message);

enum class Status : std::uint8_t { ok = 0, cryptoki = 1, local = 2 };

// What goes wrong on this side of the module.
enum class Complaint : std::uint8_t {
  protocol = 1,     // a request that does not parse, or not now
  module = 2,       // cannot be loaded, or is no PKCS#11 module
  unsupported = 3,  // the module lacks a function or an interface
  answer = 4,       // the module's answer contradicts the standard
  limit = 5,        // more than this program is ready to take
};

// Builds one reply in memory of the caller's choosing; a reply that does not fit becomes false.
class ReplyWriter {
 public:
  explicit ReplyWriter(std::span<std::uint8_t> out) : out_(out) { restart(Status::ok); }

  void restart(Status status);
  void u8(std::uint8_t value);
  void u32(std::uint32_t value);
  void u64(std::uint64_t value);
  void bytes(Bytes value);
  void text(std::string_view value);
  // Room for `count` bytes behind their length, to be filled by the caller; empty when full.
  std::span<std::uint8_t> reserve(std::size_t count);

  bool overflowed() const { return overflowed_; }
  std::span<std::uint8_t> reply() const { return out_.first(used_); }

 private:
  void put(const void* data, std::size_t count);

  std::span<std::uint8_t> out_;
  std::size_t used_ = 0;
  bool overflowed_ = false;
};

}  // namespace pqblk::pkcs11
