// Keys: from memory, from a descriptor, from an agent; hostile bundles and hostile agents.

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <thread>

#include "cabi/cabi_lab.h"
#include "export/key_agent.h"
#include "image/disk_info.h"
#include "sealed/key_bundle.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

using Bytes = std::vector<std::uint8_t>;

void put32(Bytes& bytes, std::size_t at, std::uint32_t value) {
  for (std::size_t i = 0; i < 4; ++i) bytes[at + i] = static_cast<std::uint8_t>(value >> (8 * i));
}

// By docs/handing-keys.md alone; the keys are those of DiskFile.
Bytes bundle(const std::vector<std::uint32_t>& epochs = {1}, std::uint32_t current = 1) {
  Bytes bytes(64 + 40 * epochs.size());
  std::memcpy(bytes.data(), "PQBLKBND", 8);
  bytes[8] = 1;
  bytes[10] = static_cast<std::uint8_t>(epochs.size());
  put32(bytes, 12, current);
  std::fill_n(bytes.begin() + 16, 16, kUuidFill);
  std::fill_n(bytes.begin() + 32, 32, std::uint8_t{0x11});
  for (std::size_t i = 0; i < epochs.size(); ++i) {
    put32(bytes, 64 + 40 * i, epochs[i]);
    std::fill_n(bytes.begin() + static_cast<long>(72 + 40 * i), 32, std::uint8_t{0x12});
  }
  return bytes;
}

// The same for a key area in this state.
Bytes bound_bundle(const Bytes& state) {
  Bytes bytes = bundle();
  bytes[8] = 2;
  bytes.insert(bytes.end(), state.begin(), state.end());
  return bytes;
}

// What pqblk_keys_from_fd says to a pipe with these bytes; `left` is what it did not read.
int read_from_pipe(const Bytes& bytes, pqblk_keys** keys, std::size_t* left = nullptr) {
  int ends[2];
  REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
  REQUIRE(::write(ends[1], bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  ::close(ends[1]);
  pqblk_error error = PQBLK_ERROR_INIT;
  const int kind = pqblk_keys_from_fd(ends[0], keys, &error);
  CHECK((*keys == nullptr) == (kind != PQBLK_OK));
  CHECK(std::strchr(error.message, 0x11) == nullptr);
  if (left != nullptr) {
    Bytes rest(4096);
    *left = static_cast<std::size_t>(::read(ends[0], rest.data(), rest.size()));
  }
  ::close(ends[0]);
  return kind;
}

int opens(const DiskFile& file, pqblk_keys* keys) {
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  options.path = file.path().c_str();
  options.format = PQBLK_SEALED;
  options.keys = keys;
  pqblk_error error = PQBLK_ERROR_INIT;
  return file.try_open(options, error);
}

// Answers one client with `answer` and hangs up.
class FakeAgent {
 public:
  explicit FakeAgent(Bytes answer) : path_("/tmp/pqblk-fake-" + std::to_string(::getpid())) {
    fd_ = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, path_.size());
    REQUIRE(::bind(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(fd_, 1) == 0);
    thread_ = std::thread([this, answer = std::move(answer)] {
      const int client = ::accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
      std::array<std::uint8_t, 32> request;
      [[maybe_unused]] const ssize_t got =
          ::recv(client, request.data(), request.size(), MSG_WAITALL);
      [[maybe_unused]] const ssize_t sent =
          ::send(client, answer.data(), answer.size(), MSG_NOSIGNAL);
      ::close(client);
    });
  }
  ~FakeAgent() {
    thread_.join();
    ::close(fd_);
    ::unlink(path_.c_str());
  }
  const char* path() const { return path_.c_str(); }

 private:
  std::string path_;
  int fd_;
  std::thread thread_;
};

exports::KeyAgentOptions agent_options(std::uint32_t count) {
  auto parsed = sealed::parse_bundle(bundle());
  exports::KeyAgentOptions options;
  options.path = "/tmp/pqblk-agent-" + std::to_string(::getpid());
  options.uuid = parsed->uuid;
  options.keys = std::move(parsed->keys);
  options.count = count;
  options.timeout_ms = 60'000;
  return options;
}

}  // namespace

TEST_CASE("keys from memory are checked and copied") {
  std::array<std::uint8_t, 16> uuid;
  uuid.fill(kUuidFill);
  std::array<std::uint8_t, 32> integrity;
  integrity.fill(0x11);
  std::array<pqblk_data_key, 3> data{};
  for (std::uint32_t i = 0; i < data.size(); ++i) {
    data[i].size = sizeof data[i];
    data[i].epoch = 3 - i;
    std::fill(std::begin(data[i].key), std::end(data[i].key), std::uint8_t{0x12});
  }
  pqblk_keys* keys = nullptr;
  const auto make = [&](std::uint32_t count, std::uint32_t current) {
    const int kind =
        pqblk_keys_new(uuid.data(), integrity.data(), data.data(), count, current, &keys, nullptr);
    CHECK((keys == nullptr) == (kind != PQBLK_OK));
    return kind;
  };
  CHECK(make(0, 1) == PQBLK_INVALID_ARGUMENT);
  CHECK(make(65, 1) == PQBLK_INVALID_ARGUMENT);
  CHECK(make(2, 1) == PQBLK_INVALID_ARGUMENT);  // epochs 3 and 2
  data[1].epoch = 3;
  CHECK(make(3, 1) == PQBLK_INVALID_ARGUMENT);
  data[1].epoch = 0;
  CHECK(make(3, 1) == PQBLK_INVALID_ARGUMENT);
  data[1].epoch = 2;
  data[2].size = 4;
  CHECK(make(3, 1) == PQBLK_INVALID_ARGUMENT);
  data[2].size = sizeof data[2];
  REQUIRE(make(3, 1) == PQBLK_OK);
  integrity.fill(0);
  data = {};
  const DiskFile file(PQBLK_SEALED, kMiB);
  CHECK(opens(file, keys) == PQBLK_OK);
  pqblk_keys_free(keys);
  pqblk_keys_free(nullptr);
}

TEST_CASE("a bundle from a descriptor opens its disk, and no byte beyond it is read") {
  const DiskFile file(PQBLK_SEALED, kMiB);
  pqblk_keys* keys = nullptr;
  Bytes bytes = bundle({1, 2, 77}, 1);
  bytes.insert(bytes.end(), 5, 0xee);
  std::size_t left = 0;
  REQUIRE(read_from_pipe(bytes, &keys, &left) == PQBLK_OK);
  CHECK(left == 5);
  CHECK(opens(file, keys) == PQBLK_OK);
  pqblk_keys_free(keys);
  bytes = bundle();
  bytes[40] ^= 1;  // of the integrity key
  REQUIRE(read_from_pipe(bytes, &keys) == PQBLK_OK);
  CHECK(opens(file, keys) == PQBLK_INTEGRITY);
  pqblk_keys_free(keys);
}

TEST_CASE("a bundle that is bound to a key area opens the disk while that is as it was") {
  const DiskFile file(PQBLK_SEALED, kMiB);
  const auto info = image::read_disk_info(file.path(), image::Format::sealed);
  REQUIRE(info);
  const Bytes good = bound_bundle(sealed::state_of(info->sealed->key_area));
  pqblk_keys* keys = nullptr;
  Bytes longer = good;
  longer.insert(longer.end(), 5, 0xee);
  std::size_t left = 0;
  REQUIRE(read_from_pipe(longer, &keys, &left) == PQBLK_OK);
  CHECK(left == 5);
  CHECK(opens(file, keys) == PQBLK_OK);
  pqblk_keys_free(keys);
  for (const std::size_t at : {good.size() - 64, good.size() - 1}) {  // of either copy
    Bytes other = good;
    other[at] ^= 1;
    REQUIRE(read_from_pipe(other, &keys) == PQBLK_OK);
    CHECK(opens(file, keys) == PQBLK_LOCKED);
    pqblk_keys_free(keys);
  }
  for (std::size_t length = bundle().size(); length < good.size(); ++length) {
    CHECK(read_from_pipe(Bytes(good.begin(), good.begin() + static_cast<long>(length)), &keys) ==
          PQBLK_CORRUPT);
  }
}

TEST_CASE("a bundle that breaks a rule is refused, at every length") {
  pqblk_keys* keys = nullptr;
  const Bytes good = bundle({1, 5}, 5);
  for (std::size_t length = 0; length < good.size(); ++length) {
    CHECK(read_from_pipe(Bytes(good.begin(), good.begin() + static_cast<long>(length)), &keys) ==
          PQBLK_CORRUPT);
  }
  const auto changed = [&](std::size_t at, std::uint8_t value) {
    Bytes bytes = good;
    bytes[at] = value;
    return read_from_pipe(bytes, &keys);
  };
  CHECK(changed(0, 'Q') == PQBLK_CORRUPT);    // magic
  CHECK(changed(8, 0) == PQBLK_UNSUPPORTED);  // version
  CHECK(changed(8, 3) == PQBLK_UNSUPPORTED);
  CHECK(changed(9, 1) == PQBLK_UNSUPPORTED);
  CHECK(changed(10, 0) == PQBLK_CORRUPT);  // epochs
  CHECK(changed(10, 65) == PQBLK_CORRUPT);
  CHECK(changed(11, 1) == PQBLK_CORRUPT);
  CHECK(changed(12, 2) == PQBLK_CORRUPT);  // current epoch is not there
  CHECK(changed(64, 0) == PQBLK_CORRUPT);  // epoch 0
  CHECK(changed(64, 5) == PQBLK_CORRUPT);  // the same epoch twice
  CHECK(changed(64, 6) == PQBLK_CORRUPT);  // not ascending
  CHECK(changed(68, 1) == PQBLK_CORRUPT);  // zero
  CHECK(pqblk_keys_from_fd(-1, &keys, nullptr) != PQBLK_OK);
  CHECK(keys == nullptr);
}

TEST_CASE("an agent gives the keys of its disk as often as it was told, then it is gone") {
  const DiskFile file(PQBLK_SEALED, kMiB);
  auto agent = exports::KeyAgent::listen(agent_options(2));
  REQUIRE(agent);
  const std::string socket = agent_options(1).path;
  std::thread server([&] { CHECK((*agent)->serve([] { return true; }).ok()); });
  pqblk_error error = PQBLK_ERROR_INIT;
  for (int i = 0; i < 2; ++i) {
    pqblk_keys* keys = nullptr;
    const int kind = pqblk_keys_from_agent(socket.c_str(), file.path().c_str(), &keys, &error);
    REQUIRE_MESSAGE(kind == PQBLK_OK, error.message);
    CHECK(opens(file, keys) == PQBLK_OK);
    pqblk_keys_free(keys);
  }
  server.join();
  CHECK((*agent)->released() == 2);
  pqblk_keys* keys = nullptr;
  CHECK(pqblk_keys_from_agent(socket.c_str(), file.path().c_str(), &keys, &error) ==
        PQBLK_NOT_FOUND);
  CHECK(keys == nullptr);
}

TEST_CASE("an agent can be stopped, and refuses another disk without counting it") {
  const DiskFile file(PQBLK_SEALED, kMiB);
  auto options = agent_options(1);
  options.uuid.fill(1);
  const std::string socket = options.path;
  auto agent = exports::KeyAgent::listen(std::move(options));
  REQUIRE(agent);
  std::atomic<bool> stop{false};
  std::thread server(
      [&] { CHECK((*agent)->serve([&] { return !stop; }).kind() == Kind::canceled); });
  pqblk_keys* keys = nullptr;
  pqblk_error error = PQBLK_ERROR_INIT;
  CHECK(pqblk_keys_from_agent(socket.c_str(), file.path().c_str(), &keys, &error) ==
        PQBLK_WRONG_KEY);
  stop = true;
  server.join();
  CHECK((*agent)->released() == 0);
  CHECK((*agent)->refused() == 1);
}

TEST_CASE("whatever answers as an agent is not believed") {
  const DiskFile file(PQBLK_SEALED, kMiB);
  const auto ask = [&](Bytes answer) {
    const FakeAgent agent(std::move(answer));
    pqblk_keys* keys = nullptr;
    const int kind = pqblk_keys_from_agent(agent.path(), file.path().c_str(), &keys, nullptr);
    pqblk_keys_free(keys);
    return kind;
  };
  CHECK(ask(bundle()) == PQBLK_OK);
  CHECK(ask({}) == PQBLK_PERMISSION);
  CHECK(ask(Bytes(7, 'P')) == PQBLK_PERMISSION);
  CHECK(ask(Bytes(64, 0)) == PQBLK_CORRUPT);
  Bytes cut = bundle();
  cut.resize(80);
  CHECK(ask(cut) == PQBLK_CORRUPT);
  Bytes other = bundle();
  other[16] ^= 1;
  CHECK(ask(other) == PQBLK_WRONG_KEY);
  Bytes refusal(16);
  std::memcpy(refusal.data(), "PQBLKREF", 8);
  refusal[8] = 1;
  refusal[10] = 1;
  CHECK(ask(refusal) == PQBLK_WRONG_KEY);
  refusal[10] = 9;
  CHECK(ask(refusal) == PQBLK_UNSUPPORTED);

  pqblk_keys* keys = nullptr;
  const char* disk = file.path().c_str();
  CHECK(pqblk_keys_from_agent("/tmp/pqblk-nobody", disk, &keys, nullptr) == PQBLK_NOT_FOUND);
  const std::string endless(200, 'x');
  CHECK(pqblk_keys_from_agent(endless.c_str(), disk, &keys, nullptr) == PQBLK_INVALID_ARGUMENT);
  CHECK(pqblk_keys_from_agent("/tmp/x", "/tmp/nothing", &keys, nullptr) == PQBLK_NOT_FOUND);
  CHECK(pqblk_keys_from_agent(nullptr, disk, &keys, nullptr) == PQBLK_INVALID_ARGUMENT);
}
