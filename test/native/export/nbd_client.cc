#include "export/nbd_client.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace pqblk::exports::test {

using nbd::Chunk;
using nbd::Errno;
using nbd::Option;
using nbd::OptionReply;

namespace {

// The kernel's own work on this thread (a ring that it set up) interrupts a wait without a signal.
template <class Call>
ssize_t retrying(Call call) {
  ssize_t n = 0;
  do {
    n = call();
  } while (n < 0 && errno == EINTR);
  return n;
}

int pair_with(nbd::Server& server) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) std::abort();
  server.adopt(ends[1]);
  return ends[0];
}

template <class T>
T load(const std::uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace

NbdClient::NbdClient(int fd) : fd_(fd) {
  const timeval patience{kPatienceSeconds, 0};
  ::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  ::setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
}

NbdClient::NbdClient(nbd::Server& server) : NbdClient(pair_with(server)) {}

NbdClient::~NbdClient() { hang_up(); }

void NbdClient::hang_up() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

bool NbdClient::send(const void* data, std::size_t count) {
  const auto* from = static_cast<const char*>(data);
  while (count > 0) {
    const ssize_t n = retrying([&] { return ::send(fd_, from, count, MSG_NOSIGNAL); });
    if (n <= 0) return false;
    from += n;
    count -= static_cast<std::size_t>(n);
  }
  return true;
}

bool NbdClient::receive(void* data, std::size_t count) {
  auto* to = static_cast<char*>(data);
  while (count > 0) {
    const ssize_t n = retrying([&] { return ::recv(fd_, to, count, 0); });
    if (n <= 0) return false;
    to += n;
    count -= static_cast<std::size_t>(n);
  }
  return true;
}

bool NbdClient::ended() {
  char byte = 0;
  const ssize_t n = retrying([&] { return ::recv(fd_, &byte, 1, 0); });
  return n == 0 || (n < 0 && errno == ECONNRESET);
}

bool NbdClient::greet(std::uint32_t client_flags) {
  nbd::Greeting greeting;
  if (!receive(greeting)) return false;
  if (greeting.magic != nbd::kGreetingMagic || greeting.option_magic != nbd::kOptionMagic) {
    return false;
  }
  if (greeting.flags != (nbd::kFixedNewstyle | nbd::kNoZeroes)) return false;
  return send(Be32(client_flags));
}

bool NbdClient::send_option(Option option, const Bytes& data) {
  return send(nbd::OptionHeader{nbd::kOptionMagic, static_cast<std::uint32_t>(option),
                                static_cast<std::uint32_t>(data.size())}) &&
         send(data);
}

std::vector<OptionAnswer> NbdClient::answers() {
  std::vector<OptionAnswer> all;
  for (;;) {
    nbd::OptionReplyHeader header;
    if (!receive(header) || header.magic != nbd::kOptionReplyMagic) return all;
    OptionAnswer answer{static_cast<OptionReply>(header.type.get()), Bytes(header.length)};
    if (!receive(answer.data.data(), answer.data.size())) return all;
    all.push_back(std::move(answer));
    if (header.type == 1U || header.type >= 0x80000000U) return all;
  }
}

std::vector<OptionAnswer> NbdClient::ask(Option option, const Bytes& data) {
  if (!send_option(option, data)) return {};
  return answers();
}

bool NbdClient::go(bool structured, bool allocation) {
  if (!greet()) return false;
  if (structured && ask(Option::structured_reply).back().type != OptionReply::ack) return false;
  if (structured && allocation &&
      ask(Option::set_meta_context, meta_data("", {"base:allocation"})).size() != 2) {
    return false;
  }
  for (const OptionAnswer& answer : ask(Option::go, go_data("", {}))) {
    if (answer.type == OptionReply::ack) return true;
    if (answer.type != OptionReply::info || answer.data.size() < 2) return false;
    if (load<Be16>(answer.data.data()) != 0) continue;
    size = load<Be64>(answer.data.data() + 2);
    flags = load<Be16>(answer.data.data() + 10);
  }
  return false;
}

void NbdClient::request(nbd::Command command, std::uint16_t command_flags, std::uint64_t cookie,
                        std::uint64_t offset, std::uint32_t length, const Bytes& payload) {
  Bytes message;
  append(message, nbd::RequestHeader{nbd::kRequestMagic, command_flags,
                                     static_cast<std::uint16_t>(command), cookie, offset, length});
  append_bytes(message, payload.data(), payload.size());
  send(message);
}

std::optional<Reply> NbdClient::reply(std::uint32_t read_length) {
  Reply out;
  Be32 magic;
  if (!receive(magic)) return {};
  if (magic == nbd::kSimpleReplyMagic) {
    Be32 error;
    Be64 cookie;
    if (!receive(error) || !receive(cookie)) return {};
    out.cookie = cookie;
    out.error = static_cast<Errno>(error.get());
    if (out.error != Errno::ok) return out;
    out.data.resize(read_length);
    if (!receive(out.data.data(), out.data.size())) return {};
    return out;
  }
  Be16 chunk_flags, type;
  Be64 cookie;
  Be32 length;
  if (magic != nbd::kChunkMagic || !receive(chunk_flags) || !receive(type) || !receive(cookie) ||
      !receive(length) || length > 2 * nbd::kPayloadMax) {
    return {};
  }
  Bytes body(length);
  if (chunk_flags != nbd::kChunkDone || !receive(body.data(), body.size())) return {};
  out.structured = true;
  out.cookie = cookie;
  out.chunk = static_cast<Chunk>(type.get());
  if (out.chunk == Chunk::offset_data) {
    out.offset = load<Be64>(body.data());
    out.data.assign(body.begin() + 8, body.end());
  } else if (out.chunk == Chunk::offset_hole) {
    if (body.size() != 12) return {};
    out.offset = load<Be64>(body.data());
    out.data.resize(load<Be32>(body.data() + 8));
  } else if (out.chunk == Chunk::block_status) {
    if (load<Be32>(body.data()) != nbd::kBaseAllocation || body.size() % 8 != 4) return {};
    for (std::size_t i = 4; i < body.size(); i += 8) {
      out.extents.emplace_back(load<Be32>(&body[i]), load<Be32>(&body[i + 4]));
    }
  } else if (out.chunk == Chunk::error) {
    out.error = static_cast<Errno>(load<Be32>(body.data()).get());
    const std::uint16_t text = load<Be16>(&body[4]);
    if (body.size() != 6U + text) return {};
    out.message.assign(body.begin() + 6, body.end());
  }
  return out;
}

Reply NbdClient::call(nbd::Command command, std::uint64_t offset, std::uint32_t length,
                      std::uint16_t command_flags, const Bytes& payload) {
  const std::uint64_t cookie = ++cookie_;
  request(command, command_flags, cookie, offset, length, payload);
  std::optional<Reply> got = reply(command == nbd::Command::read ? length : 0);
  if (!got || got->cookie != cookie) return {0, Errno::shutdown, false, {}, 0, {}, "no reply", {}};
  return std::move(*got);
}

void append_bytes(Bytes& to, const void* from, std::size_t count) {
  const std::size_t at = to.size();
  to.resize(at + count);
  if (count != 0) std::memcpy(to.data() + at, from, count);
}

Bytes go_data(const std::string& name, const std::vector<std::uint16_t>& infos) {
  Bytes data;
  append(data, Be32(static_cast<std::uint32_t>(name.size())));
  append_bytes(data, name.data(), name.size());
  append(data, Be16(static_cast<std::uint16_t>(infos.size())));
  for (const std::uint16_t info : infos) append(data, Be16(info));
  return data;
}

Bytes meta_data(const std::string& name, const std::vector<std::string>& queries) {
  Bytes data;
  append(data, Be32(static_cast<std::uint32_t>(name.size())));
  append_bytes(data, name.data(), name.size());
  append(data, Be32(static_cast<std::uint32_t>(queries.size())));
  for (const std::string& query : queries) {
    append(data, Be32(static_cast<std::uint32_t>(query.size())));
    append_bytes(data, query.data(), query.size());
  }
  return data;
}

}  // namespace pqblk::exports::test
