#include "pkcs11/protocol.h"

#include <cstring>
#include <utility>

#include "base/endian.h"

namespace pqblk::pkcs11 {
namespace {

// Reads field by field; the first that does not fit is remembered, and all later ones are empty.
class Reader {
 public:
  explicit Reader(Bytes message) : rest_(message) {}

  std::uint8_t u8(std::string_view field) { return number<std::uint8_t>(field); }
  std::uint32_t u32(std::string_view field) { return number<Le32>(field); }
  std::uint64_t u64(std::string_view field) { return number<Le64>(field); }

  bool flag(std::string_view field) {
    const std::uint8_t value = u8(field);
    require(value <= 1, field);
    return value == 1;
  }

  Bytes bytes(std::string_view field, std::size_t max) {
    const std::size_t count = u32(field);
    require(count <= max, field);
    return take(field, count);
  }

  // Text has no NUL: it ends up as a C string.
  std::string text(std::string_view field) {
    const Bytes value = bytes(field, kTextBytesMax);
    std::string text(value.begin(), value.end());
    require(text.find('\0') == std::string::npos, field);
    return text;
  }

  std::size_t count(std::string_view field, std::size_t max) {
    const std::size_t count = u32(field);
    require(count <= max, field);
    return failed() ? 0 : count;
  }

  Template attributes(std::string_view field) {
    Template list(count(field, kAttributesMax));
    for (AttributeValue& attribute : list) {
      attribute.type = u64(field);
      attribute.value = bytes(field, kAttributeBytesMax);
    }
    return list;
  }

  void require(bool holds, std::string_view field) {
    if (!holds && bad_.empty()) bad_ = field;
  }

  bool failed() const { return !bad_.empty(); }

  Result<Request> finish(Request request) {
    require(rest_.empty(), "end of the message");
    if (!failed()) return request;
    return Error(Kind::invalid_argument, "bad message: " + std::string(bad_));
  }

 private:
  Bytes take(std::string_view field, std::size_t count) {
    require(count <= rest_.size(), field);
    if (failed()) return {};
    const Bytes taken = rest_.first(count);
    rest_ = rest_.subspan(count);
    return taken;
  }

  template <typename T>
  T number(std::string_view field) {
    T value{};
    const Bytes from = take(field, sizeof value);
    if (!from.empty()) std::memcpy(static_cast<void*>(&value), from.data(), sizeof value);
    return value;
  }

  Bytes rest_;
  std::string_view bad_;
};

Load read_load(Reader& read) {
  Load load;
  load.path = read.text("module path");
  load.preloads.resize(read.count("preloads", kPreloadsMax));
  for (std::string& path : load.preloads) path = read.text("preload");
  load.os_locking = read.flag("locking");
  load.has_configuration = read.flag("configuration");
  load.configuration = read.text("configuration");
  const std::uint8_t style = read.u8("style");
  read.require(style <= 2, "style");
  load.style = static_cast<Style>(style);
  return load;
}

GetAttributes read_get_attributes(Reader& read) {
  GetAttributes get{.object = read.u64("object")};
  get.types.resize(read.count("attribute types", kAttributesMax));
  for (std::uint64_t& type : get.types) type = read.u64("attribute type");
  return get;
}

Decapsulate read_decapsulate(Reader& read) {
  Decapsulate request{.mechanism = read.u64("mechanism"), .key = read.u64("key")};
  request.ciphertext = read.bytes("ciphertext", kAttributeBytesMax);
  request.mask = read.bytes("mask", kSecretBytesMax);
  read.require(request.mask.size() == kSecretBytesMax, "mask");
  request.secret = read.attributes("secret template");
  return request;
}

// Braced lists are evaluated from left to right, which is the order on the wire.
Request read_operation(Reader& read, std::uint8_t operation) {
  switch (operation) {
    case 1:
      return read_load(read);
    case 2:
      return DescribeSlot{read.u64("slot")};
    case 3:
      return DescribeMechanism{read.u64("slot"), read.u64("mechanism")};
    case 4:
      return Open{read.u64("slot"), read.flag("read-write")};
    case 5:
      return Login{read.flag("user"), read.flag("has PIN"), read.bytes("PIN", kTextBytesMax)};
    case 6:
      return InitPin{read.bytes("PIN", kTextBytesMax)};
    case 7:
      return Find{read.attributes("criteria")};
    case 8:
      return read_get_attributes(read);
    case 9:
      return Generate{read.u64("mechanism"), read.attributes("public template"),
                      read.attributes("private template")};
    case 10:
      return read_decapsulate(read);
    case 11:
      return Create{read.attributes("object template")};
    case 12:
      return Destroy{read.u64("object")};
    case 13:
      return Close{};
    default:
      read.require(false, "operation");
      return Close{};
  }
}

}  // namespace

Result<Request> parse_request(Bytes message) {
  Reader read(message);
  const std::uint8_t operation = read.u8("operation");
  Request request = read_operation(read, operation);
  return read.finish(std::move(request));
}

void ReplyWriter::restart(Status status) {
  used_ = 0;
  overflowed_ = false;
  u8(static_cast<std::uint8_t>(status));
}

void ReplyWriter::u8(std::uint8_t value) { put(&value, sizeof value); }

void ReplyWriter::u32(std::uint32_t value) {
  const Le32 field(value);
  put(&field, sizeof field);
}

void ReplyWriter::u64(std::uint64_t value) {
  const Le64 field(value);
  put(&field, sizeof field);
}

void ReplyWriter::bytes(Bytes value) {
  u32(static_cast<std::uint32_t>(value.size()));
  put(value.data(), value.size());
}

void ReplyWriter::text(std::string_view value) {
  bytes({reinterpret_cast<const std::uint8_t*>(value.data()), value.size()});
}

std::span<std::uint8_t> ReplyWriter::reserve(std::size_t count) {
  u32(static_cast<std::uint32_t>(count));
  if (overflowed_ || count > out_.size() - used_) {
    overflowed_ = true;
    return {};
  }
  const std::span<std::uint8_t> room = out_.subspan(used_, count);
  used_ += count;
  return room;
}

void ReplyWriter::put(const void* data, std::size_t count) {
  if (overflowed_ || count > out_.size() - used_) {
    overflowed_ = true;
    return;
  }
  if (count > 0) std::memcpy(out_.data() + used_, data, count);
  used_ += count;
}

}  // namespace pqblk::pkcs11
