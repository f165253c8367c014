// The parser of requests and the writer of replies: every operation, every limit, every cut.
#include "pkcs11/protocol.h"

#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "base/endian.h"

using namespace pqblk;
using namespace pqblk::pkcs11;

namespace {

class Message {
 public:
  explicit Message(std::uint8_t operation) { u8(operation); }
  Message& u8(std::uint8_t value) { return put(&value, 1); }
  Message& u32(std::uint32_t value) {
    const Le32 field(value);
    return put(&field, sizeof field);
  }
  Message& u64(std::uint64_t value) {
    const Le64 field(value);
    return put(&field, sizeof field);
  }
  Message& text(std::string_view value) {
    return u32(static_cast<std::uint32_t>(value.size())).put(value.data(), value.size());
  }
  Bytes bytes() const { return bytes_; }

 private:
  Message& put(const void* data, std::size_t count) {
    const auto* from = static_cast<const std::uint8_t*>(data);
    // Not insert(): gcc 12 sees an overflow in it (gcc bug 105329).
    for (std::size_t i = 0; i < count; ++i) bytes_.push_back(from[i]);
    return *this;
  }
  std::vector<std::uint8_t> bytes_;
};

Message load(std::string_view path = "/m.so") {
  Message message(1);
  message.text(path).u32(2).text("/a.so").text("/b.so").u8(1).u8(1).text("configdir='x'").u8(2);
  return message;
}

Message generate() {
  Message message(9);
  message.u64(0x80000002).u32(2).u64(1).text("x").u64(2).text("").u32(1).u64(3).text("yz");
  return message;
}

std::vector<Message> all_operations() {
  Message find(7);
  find.u32(1).u64(0).text("12345678");
  Message get(8);
  get.u64(7).u32(2).u64(3).u64(0x102);
  Message create(11);
  create.u32(0);
  Message decapsulate(10);
  decapsulate.u64(0x17)
      .u64(9)
      .text(std::string(1088, 'c'))
      .text(std::string(64, 'm'))
      .u32(1)
      .u64(0x161)
      .text("8bytes..");
  return {load(),
          Message(2).u64(5),
          Message(3).u64(5).u64(0x17),
          Message(4).u64(5).u8(1),
          Message(5).u8(0).u8(1).text("1234"),
          Message(6).text("1234"),
          find,
          get,
          generate(),
          decapsulate,
          create,
          Message(12).u64(3),
          Message(13)};
}

}  // namespace

TEST_CASE("every operation is read as it was written") {
  const auto messages = all_operations();
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const Result<Request> request = parse_request(messages[i].bytes());
    REQUIRE_MESSAGE(request, i);
    CHECK(request->index() == i);
  }
  const Message loading = load();
  const Result<Request> loaded = parse_request(loading.bytes());
  const Load& how = std::get<Load>(*loaded);
  CHECK(how.path == "/m.so");
  CHECK(how.preloads == std::vector<std::string>{"/a.so", "/b.so"});
  CHECK(how.configuration == "configdir='x'");
  CHECK(how.style == Style::decrypt);
  const Message generating = generate();
  const Result<Request> parsed = parse_request(generating.bytes());
  const Generate& request = std::get<Generate>(*parsed);
  REQUIRE(request.public_key.size() == 2);
  CHECK(request.public_key[1].value.empty());
  CHECK(request.private_key[0].type == 3);
  CHECK(std::string(request.private_key[0].value.begin(), request.private_key[0].value.end()) ==
        "yz");
}

TEST_CASE("a message that is cut anywhere, or goes on, is refused") {
  for (const Message& message : all_operations()) {
    for (std::size_t length = 0; length < message.bytes().size(); ++length) {
      const Result<Request> request = parse_request(message.bytes().first(length));
      REQUIRE_FALSE(request);
      CHECK(request.error().kind() == Kind::invalid_argument);
    }
    Message longer = message;
    CHECK_FALSE(parse_request(longer.u8(0).bytes()));
  }
}

TEST_CASE("what is beyond a limit is refused by the name of its field") {
  const auto refusal = [](const Message& message) {
    const Result<Request> request = parse_request(message.bytes());
    return request ? std::string("accepted") : request.error().message();
  };
  CHECK(refusal(Message(0)) == "bad message: operation");
  CHECK(refusal(Message(14)) == "bad message: operation");
  CHECK(refusal(load(std::string(kTextBytesMax + 1, 'x'))) == "bad message: module path");
  CHECK(refusal(load(std::string("/a\0b", 4))) == "bad message: module path");
  CHECK(refusal(Message(1).text("/m").u32(9)) == "bad message: preloads");
  CHECK(refusal(Message(1).text("/m").u32(0).u8(2)) == "bad message: locking");
  CHECK(refusal(Message(1).text("/m").u32(0).u8(0).u8(0).text("").u8(3)) == "bad message: style");
  CHECK(refusal(Message(7).u32(33)) == "bad message: criteria");
  CHECK(refusal(Message(7).u32(0xffffffff)) == "bad message: criteria");
  CHECK(refusal(Message(6).u32(0xffffffff)) == "bad message: PIN");
  CHECK(refusal(Message(10).u64(1).u64(2).text("c").text(std::string(32, 'm')).u32(0)) ==
        "bad message: mask");
  CHECK(refusal(Message(8).u64(1).u32(0x40000000)) == "bad message: attribute types");
  CHECK(refusal(Message(13).u8(0)) == "bad message: end of the message");
}

TEST_CASE("a reply that does not fit says so and writes nothing beyond its room") {
  std::vector<std::uint8_t> room(64, 0xee);
  ReplyWriter reply(std::span<std::uint8_t>{room}.first(32));
  reply.u64(1);
  reply.text("12345678");
  CHECK_FALSE(reply.overflowed());
  CHECK(reply.reply().size() == 21);
  CHECK(reply.reserve(100).empty());
  CHECK(reply.overflowed());
  reply.u64(2);
  CHECK(reply.overflowed());
  for (std::size_t i = 32; i < room.size(); ++i) CHECK(room[i] == 0xee);
  reply.restart(Status::local);
  CHECK_FALSE(reply.overflowed());
  CHECK(reply.reply().size() == 1);
  CHECK(reply.reply()[0] == 2);
}
