// The server over the module of the tests, in this process, so that the sanitizers see both.
#include "pkcs11/server.h"

#include <doctest/doctest.h>

#include <array>
#include <vector>

extern "C" unsigned long C_GetFunctionList(pqblk::pkcs11::FunctionList** list);

using namespace pqblk;
using namespace pqblk::pkcs11;

namespace {

struct Fixture {
  LockedBuffer out = std::move(*LockedBuffer::make(kMessageBytesMax));

  static Server make(Style style) {
    FunctionList* list = nullptr;
    REQUIRE(C_GetFunctionList(&list) == kOk);
    Load how{};
    how.style = style;
    Outcome<Module> module = Module::from(list, list->version, how);
    REQUIRE(module);
    return Server(std::move(*LockedBuffer::make(2 * kMessageBytesMax)), *module, style);
  }

  std::vector<std::uint8_t> ask(Server& server, std::vector<std::uint8_t> message) {
    const auto reply = server.answer(message, out.bytes());
    return {reply.begin(), reply.end()};
  }
};

constexpr std::uint8_t kOkStatus = 0, kCryptoki = 1, kLocal = 2;

}  // namespace

TEST_CASE_FIXTURE(Fixture, "slots, sessions and refusals of a real module") {
  Server server = make(Style::derive);
  CHECK(ask(server, {2, 5, 0, 0, 0, 0, 0, 0, 0})[0] == kOkStatus);
  CHECK(ask(server, {12, 5, 0, 0, 0, 0, 0, 0, 0})[0] == kCryptoki);  // no session yet
  CHECK(ask(server, {4, 5, 0, 0, 0, 0, 0, 0, 0, 1})[0] == kOkStatus);
  CHECK(ask(server, {4, 5, 0, 0, 0, 0, 0, 0, 0, 1})[0] == kLocal);  // one session
  // The wrong PIN of the security officer: CKR_PIN_INCORRECT from C_Login.
  const auto refused = ask(server, {5, 1, 1, 2, 0, 0, 0, 'n', 'o'});
  REQUIRE(refused.size() == 9 + 4 + 7);
  CHECK(refused[0] == kCryptoki);
  CHECK(refused[1] == 0xa0);
  CHECK(std::string(refused.begin() + 13, refused.end()) == "C_Login");
  CHECK(ask(server, {7, 0, 0, 0, 0})[0] == kOkStatus);
  CHECK_FALSE(server.closed());
  CHECK(ask(server, {13})[0] == kOkStatus);
  CHECK(server.closed());
}

TEST_CASE_FIXTURE(Fixture, "before a module is loaded nothing else is answered") {
  Server server(std::move(*LockedBuffer::make(2 * kMessageBytesMax)));
  const auto reply = ask(server, {2, 5, 0, 0, 0, 0, 0, 0, 0});
  REQUIRE(reply.size() > 6);
  CHECK(reply[0] == kLocal);
  CHECK(reply[1] == static_cast<std::uint8_t>(Complaint::protocol));
}

TEST_CASE_FIXTURE(Fixture, "the longest template fits into the scratch memory") {
  Server server = make(Style::derive);
  CHECK(ask(server, {4, 5, 0, 0, 0, 0, 0, 0, 0, 1})[0] == kOkStatus);
  // 32 attributes of one byte each waste the most by alignment; then values up to a full message.
  std::vector<std::uint8_t> message{9, 0, 0, 0, 0, 0, 0, 0, 0};
  for (int list = 0; list < 2; ++list) {
    message.insert(message.end(), {32, 0, 0, 0});
    for (int i = 0; i < 32; ++i) {
      const std::size_t bytes = list == 0 && i < 3 ? 8000 : 1;
      message.insert(message.end(), 8, 0);
      message.insert(message.end(), {static_cast<std::uint8_t>(bytes & 255),
                                     static_cast<std::uint8_t>(bytes >> 8), 0, 0});
      message.insert(message.end(), bytes, 0x55);
    }
  }
  REQUIRE(message.size() <= kMessageBytesMax);
  CHECK(ask(server, message)[0] == kCryptoki);
}

TEST_CASE("a buffer for secrets is wiped and can be moved") {
  auto made = LockedBuffer::make(100);
  REQUIRE(made);
  LockedBuffer buffer = std::move(*made);
  CHECK(buffer.bytes().size() == 100);
  buffer.bytes()[99] = 7;
  buffer.wipe();
  CHECK(buffer.bytes()[99] == 0);
}
