// Fuzzes the token process from its socket on: a sequence of requests, cut out of the input, to a
// server over the module of the tests. What must hold: every request gets a reply that is well
// formed, whatever was asked before; the parser agrees with itself about what it accepts.
//
// Byte 0 of an input chooses the dialect; then comes u16 length, message, u16 length, message, …
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pkcs11/server.h"
#include "state.h"

extern "C" unsigned long C_GetFunctionList(pqblk::pkcs11::FunctionList** list);

using namespace pqblk;
using namespace pqblk::pkcs11;

namespace {

[[noreturn]] void die(const char* why) {
  std::fprintf(stderr, "fuzz_pkcs11: %s\n", why);
  std::abort();
}

Server make_server(Style style) {
  FunctionList* list = nullptr;
  if (C_GetFunctionList(&list) != kOk) die("no function list");
  Load how{};
  how.style = style;
  Outcome<Module> module = Module::from(list, list->version, how);
  if (!module) die("no module");
  return Server(std::move(*LockedBuffer::make(2 * kMessageBytesMax)), *module, style);
}

void check_reply(std::span<const std::uint8_t> reply, bool accepted) {
  if (reply.empty() || reply[0] > 2) die("a reply without a status");
  if (!accepted && (reply[0] != 2 || reply[1] != 1)) die("a bad message that is not refused");
  if (reply[0] == 0) return;
  const std::size_t text_at = reply[0] == 1 ? 9 : 2;
  if (reply.size() < text_at + 4) die("a refusal without its text");
  const std::size_t length = static_cast<std::size_t>(reply[text_at] | reply[text_at + 1] << 8);
  if (reply.size() != text_at + 4 + length) die("a refusal of another length");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static std::vector<std::uint8_t> out(kMessageBytesMax);
  if (size == 0) return 0;
  // The same token for each input: a user PIN, no keys.
  test_token::State state;
  state.pin = {'1', '2', '3', '4'};
  state.write();
  Server server = make_server(static_cast<Style>(data[0] % 3));
  Bytes rest(data + 1, size - 1);
  for (int requests = 0; requests < 16 && rest.size() >= 2 && !server.closed(); ++requests) {
    const std::size_t length =
        std::min<std::size_t>(rest.size() - 2, static_cast<std::size_t>(rest[0] | rest[1] << 8));
    const Bytes message = rest.subspan(2, length);
    rest = rest.subspan(2 + length);
    // A second module cannot be loaded; a first one would be whatever file the input names.
    check_reply(server.answer(message, out), static_cast<bool>(parse_request(message)));
  }
  return 0;
}
