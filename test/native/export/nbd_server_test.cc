// The NBD server with a client of our own: the protocol against a flat model, limits, hostile
// clients, and ends at any moment.
#include <doctest/doctest.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "effort.h"
#include "export/nbd_client.h"
#include "export/vhost_user_lab.h"
#include "image/disk_create.h"

namespace pqblk::exports::test {
namespace {

using image::Format;
using nbd::Chunk;
using nbd::Command;
using nbd::Errno;
using nbd::Option;
using nbd::OptionReply;

constexpr const char* kFast = "/dev/shm";  // where a flush costs nothing
constexpr auto kSoon = std::chrono::milliseconds(1);

class Reports {
 public:
  void add(const std::string& text) {  // any thread
    std::lock_guard guard(inner_);
    all_ += text + "\n";
  }
  bool contain(const std::string& part) {
    std::lock_guard guard(inner_);
    return all_.find(part) != std::string::npos;
  }

 private:
  std::mutex inner_;
  std::string all_;
};

class NbdServed {
 public:
  explicit NbdServed(const Place& place, std::uint32_t queues = 1, nbd::ServerOptions options = {},
                     bool read_only = false)
      : path_(place.socket()) {
    auto disk = place.open(queues, read_only);
    REQUIRE_MESSAGE(disk, disk.error().to_string());
    disk_ = std::move(*disk);
    start(std::move(options));
  }
  ~NbdServed() {
    server_.reset();
    CHECK_FALSE(disk_->close());
  }
  void start(nbd::ServerOptions options) {
    options.unix_path = path_;
    options.log = [this](const std::string& text) { reports_.add(text); };
    auto server = nbd::Server::start(*disk_, std::move(options));
    REQUIRE_MESSAGE(server, server.error().to_string());
    server_ = std::move(*server);
  }
  nbd::Server& server() { return *server_; }
  image::Disk& disk() { return *disk_; }
  void stop() { server_.reset(); }
  bool was_reported(const std::string& part) { return reports_.contain(part); }
  // Waits for the statistics to become what the test expects.
  template <class Done>
  bool until(Done done) {
    for (int i = 0; i < kPatienceSeconds * 1000; ++i) {
      if (done(server_->stats())) return true;
      std::this_thread::sleep_for(kSoon);
    }
    return false;
  }
  bool all_gone() {
    return until([](const auto& s) { return s.clients == 0 && s.negotiating == 0; });
  }

 private:
  const std::string path_;
  std::unique_ptr<image::Disk> disk_;
  Reports reports_;
  std::unique_ptr<nbd::Server> server_;
};

Bytes noise(Dice& dice, std::size_t size) {
  Bytes bytes(size);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::uint8_t>(dice.next() >> 24U);
  return bytes;
}

// A request in flight and what its reply must be.
struct Expected {
  Command command{};
  std::uint64_t offset = 0;
  Bytes data;
  bool done = false;
};

// Rounds of requests that do not overlap within a round, on several connections at once.
void against_a_model(Format format, std::uint32_t queues, bool structured, std::uint64_t rounds) {
  constexpr std::uint64_t kSize = 8 * kMiB;
  constexpr std::size_t kParts = 24;
  const Place place(format, kSize, kFast);
  NbdServed served(place, queues);
  Bytes model(kSize);
  Dice dice(rounds + queues);
  std::vector<std::unique_ptr<NbdClient>> clients;
  for (int i = 0; i < 3; ++i) {
    clients.push_back(std::make_unique<NbdClient>(served.server()));
    REQUIRE(clients.back()->go(structured));
    CHECK(clients.back()->size == kSize);
  }
  for (std::uint64_t round = 0; round < rounds; ++round) {
    std::vector<std::vector<Expected>> expected(clients.size());
    constexpr std::uint64_t kPart = kSize / kParts;
    for (std::size_t part = 0; part < kParts; ++part) {
      const std::size_t who = dice.below(static_cast<std::uint32_t>(clients.size()));
      const std::uint32_t length = 1 + dice.below(dice.below(4) == 0 ? kPart : 9000);
      std::uint64_t offset =
          part * kPart + dice.below(static_cast<std::uint32_t>(kPart - length + 1));
      if (dice.below(3) == 0) offset -= offset % 512;
      if (offset < part * kPart) offset = part * kPart;
      Expected want{Command::read, offset, {}, false};
      const auto at = model.begin() + static_cast<std::ptrdiff_t>(offset);
      const std::uint32_t choice = dice.below(10);
      Bytes payload;
      std::uint16_t flags = dice.below(8) == 0 ? nbd::kFua : 0;
      if (choice < 4) {
        want.data.assign(at, at + length);
        if (structured && choice == 0) flags |= nbd::kDf;
      } else if (choice < 8) {
        want.command = Command::write;
        payload = noise(dice, length);
        std::copy(payload.begin(), payload.end(), at);
      } else {
        want.command = Command::write_zeroes;
        if (choice == 9) flags |= nbd::kNoHole;
        std::fill_n(at, length, std::uint8_t{0});
      }
      const std::uint64_t cookie = expected[who].size();
      clients[who]->request(want.command, flags, cookie, offset, length, payload);
      expected[who].push_back(std::move(want));
    }
    for (std::size_t who = 0; who < clients.size(); ++who) {
      for (std::size_t n = 0; n < expected[who].size(); ++n) {
        // A simple reply does not say its length: those come one by one.
        const std::optional<Reply> got =
            structured ? clients[who]->reply() : clients[who]->reply(static_cast<std::uint32_t>(0));
        REQUIRE(got);
        REQUIRE(got->cookie < expected[who].size());
        Expected& want = expected[who][got->cookie];
        REQUIRE(got->error == Errno::ok);
        REQUIRE_FALSE(std::exchange(want.done, true));
        if (want.command != Command::read) continue;
        Bytes data = got->data;
        if (!structured) {
          data.resize(want.data.size());
          REQUIRE(clients[who]->receive(data.data(), data.size()));
        } else {
          REQUIRE(got->offset == want.offset);
        }
        REQUIRE(data == want.data);
      }
    }
  }
  // What one client wrote and flushed, another reads; and so does the disk opened anew.
  CHECK(clients[0]->call(Command::flush, 0, 0).error == Errno::ok);
  CHECK(clients[1]->call(Command::read, 0, kSize).data == model);
  clients.clear();
  CHECK(served.all_gone());
}

}  // namespace

TEST_CASE("nbd: random requests of several clients match a flat model") {
  for (const Format format : {Format::raw, Format::qcow2, Format::sealed}) {
    CAPTURE(static_cast<int>(format));
    against_a_model(format, 1, true, pqblk::test::effort(60));
    against_a_model(format, 2, false, pqblk::test::effort(60));
  }
}

TEST_CASE("nbd: what is written is there when the disk is opened again") {
  const Place place(Format::sealed, 4 * kMiB);
  Dice dice(5);
  const Bytes data = noise(dice, 300'001);
  {
    NbdServed served(place);
    NbdClient client(served.server());
    REQUIRE(client.go());
    CHECK(client.call(Command::write, 77, 300'001, nbd::kFua, data).error == Errno::ok);
    client.request(Command::disconnect, 0, 0, 0, 0);
    CHECK(client.ended());
  }
  NbdServed served(place, 1, {}, true);
  NbdClient client(served.server());
  REQUIRE(client.go());
  CHECK((client.flags & nbd::kReadOnly) != 0);
  CHECK(client.call(Command::read, 77, 300'001).data == data);
  CHECK(client.call(Command::write, 0, 5, 0, Bytes(5)).error == Errno::perm);
  CHECK(client.call(Command::write_zeroes, 0, 5).error == Errno::perm);
  CHECK(client.call(Command::trim, 0, 5).error == Errno::perm);
  CHECK(client.call(Command::flush, 0, 0).error == Errno::ok);
}

TEST_CASE("nbd: requests that are not valid are refused, and the connection goes on") {
  const Place place(Format::sealed, 64 * kMiB, kFast);
  NbdServed served(place);
  for (const bool structured : {true, false}) {
    CAPTURE(structured);
    NbdClient client(served.server());
    REQUIRE(client.go(structured));
    const std::uint64_t end = client.size;
    const std::uint32_t much = nbd::kPayloadMax + 1;
    const Bytes big(much, 1);
    CHECK(client.call(Command::read, 0, much).error == Errno::invalid);
    CHECK(client.call(Command::write, 0, much, 0, big).error == Errno::invalid);
    CHECK(client.call(Command::read, end - 1, 2).error == Errno::invalid);
    CHECK(client.call(Command::read, ~std::uint64_t{0}, 2).error == Errno::invalid);
    CHECK(client.call(Command::write, end - 1, 2, 0, Bytes(2)).error == Errno::no_space);
    CHECK(client.call(Command::write_zeroes, end, 2).error == Errno::no_space);
    CHECK(client.call(Command::trim, end, 2).error == Errno::invalid);
    CHECK(client.call(Command::cache, end, 2).error == Errno::invalid);
    CHECK(client.call(Command::cache, 0, 2).error == Errno::ok);
    CHECK(client.call(static_cast<Command>(99), 0, 2).error == Errno::invalid);
    CHECK(client.call(static_cast<Command>(8), 0, 2).error == Errno::invalid);
    CHECK(client.call(Command::read, 0, 2, nbd::kNoHole).error == Errno::invalid);
    CHECK(client.call(Command::write, 0, 2, 0x8000, Bytes(2)).error == Errno::invalid);
    CHECK(client.call(Command::block_status, 0, 0).error == Errno::invalid);
    CHECK(client.call(Command::read, 0, 0).error == Errno::ok);
    CHECK(client.call(Command::write, 0, 0).error == Errno::ok);
    CHECK(client.call(Command::trim, 0, 0).error == Errno::ok);
    CHECK(client.call(Command::write_zeroes, 0, 4096, nbd::kFastZero).error == Errno::ok);
    const Reply whole = client.call(Command::read, 0, nbd::kPayloadMax);
    CHECK(whole.error == Errno::ok);
    CHECK(whole.data == Bytes(nbd::kPayloadMax));
    const auto status = client.call(Command::block_status, 0, 4096).error;
    CHECK(status == (structured ? Errno::ok : Errno::invalid));
  }
  CHECK(served.server().stats().refused >= 24);
  CHECK(served.server().stats().errors == 0);
  const Place raw(Format::raw, 1 * kMiB, kFast);
  NbdServed plain(raw);
  NbdClient client(plain.server());
  REQUIRE(client.go());
  // Nobody knows whether the file system zeroes fast.
  CHECK(client.call(Command::write_zeroes, 0, 4096, nbd::kFastZero).error == Errno::not_supported);
}

TEST_CASE("nbd: block status tells data, zeros and holes, joined and bounded") {
  const Place place(Format::sealed, 16 * kMiB, kFast);
  NbdServed served(place);
  NbdClient client(served.server());
  REQUIRE(client.go());
  CHECK(client.call(Command::write, 4 * kMiB, 2 * kMiB, 0, Bytes(2 * kMiB, 7)).error == Errno::ok);
  const Reply all = client.call(Command::block_status, 0, 16 * kMiB);
  REQUIRE(all.error == Errno::ok);
  std::uint64_t at = 0;
  bool last_is_data = true;
  for (std::size_t i = 0; i < all.extents.size(); ++i) {
    const auto& [length, flags] = all.extents[i];
    const bool data = flags == 0;
    if (i > 0) CHECK(flags != all.extents[i - 1].second);
    if (data) CHECK((at >= 4 * kMiB && at + length <= 6 * kMiB + 64 * kKiB));
    if (at < 6 * kMiB && at + length > 4 * kMiB) CHECK(data);
    last_is_data = data;
    at += length;
  }
  CHECK(at == 16 * kMiB);
  CHECK_FALSE(last_is_data);
  const Reply one = client.call(Command::block_status, 0, 16 * kMiB, nbd::kReqOne);
  REQUIRE(one.extents.size() == 1);
  CHECK(one.extents[0] == all.extents[0]);
  // A read of zeros moves none; with DF it does.
  CHECK(client.call(Command::read, 0, 8192).chunk == Chunk::offset_hole);
  CHECK(client.call(Command::read, 0, 8192, nbd::kDf).chunk == Chunk::offset_data);
}

TEST_CASE("nbd: a disk that grew shows it to the next client") {
  const Place place(Format::sealed, 1 * kMiB, kFast);
  NbdServed served(place);
  NbdClient before(served.server());
  REQUIRE(before.go());
  CHECK(before.size == 1 * kMiB);
  CHECK_FALSE(served.disk().resize(3 * kMiB));
  NbdClient after(served.server());
  REQUIRE(after.go());
  CHECK(after.size == 3 * kMiB);
  CHECK(after.call(Command::write, 2 * kMiB, 9, 0, Bytes(9, 3)).error == Errno::ok);
  CHECK(before.call(Command::read, 0, 9).error == Errno::ok);
}

TEST_CASE("nbd: a full file system is ENOSPC for that request, and reads go on") {
  const std::string directory = "/tmp/pqblk-nbd-full-" + std::to_string(::getpid());
  REQUIRE(::mkdir(directory.c_str(), 0700) == 0);
  if (::mount("tmpfs", directory.c_str(), "tmpfs", 0, "size=6m") != 0) {
    ::rmdir(directory.c_str());
    MESSAGE("SKIPPED: mounting a small tmpfs needs CAP_SYS_ADMIN");
    return;
  }
  {
    image::CreateSpec spec;
    spec.path = directory + "/disk";
    spec.format = Format::qcow2;
    spec.size = 64 * kMiB;
    REQUIRE_FALSE(image::create_disk(spec));
    image::OpenOptions open;
    open.path = spec.path;
    open.format = Format::qcow2;
    open.cache = image::Cache::writeback;
    auto disk = image::Disk::open(std::move(open));
    REQUIRE(disk);
    nbd::ServerOptions options;
    options.unix_path = directory + "/s";
    Reports reports;
    options.log = [&reports](const std::string& text) { reports.add(text); };
    auto server = nbd::Server::start(**disk, std::move(options));
    REQUIRE(server);
    NbdClient client(**server);
    REQUIRE(client.go());
    Errno error = Errno::ok;
    std::uint64_t at = 0;
    for (; at < 16 * kMiB && error == Errno::ok; at += kMiB) {
      error = client.call(Command::write, at, kMiB, 0, Bytes(kMiB, 5)).error;
    }
    CHECK(error == Errno::no_space);
    CHECK(client.call(Command::read, 0, kMiB).data == Bytes(kMiB, 5));
    CHECK(reports.contain("write of 1048576 bytes"));
    CHECK((*server)->stats().errors >= 1);
    client.hang_up();
    server->reset();
    static_cast<void>((*disk)->close());
  }
  ::umount(directory.c_str());
  ::rmdir(directory.c_str());
}

TEST_CASE("nbd: clients that vanish at any moment leave nothing behind") {
  const Place place(Format::sealed, 16 * kMiB, kFast);
  NbdServed served(place, 2);
  Dice dice(11);
  Bytes stream;
  for (std::uint64_t i = 0; i < 40; ++i) {
    const bool write = i % 3 == 0;
    const std::uint32_t length = i % 7 == 0 ? 1'000'000 : 5000;
    append(stream,
           nbd::RequestHeader{nbd::kRequestMagic, 0,
                              static_cast<std::uint16_t>(write ? Command::write : Command::read), i,
                              dice.below(15 * kMiB), length});
    if (write) stream.resize(stream.size() + length, static_cast<std::uint8_t>(i));
  }
  const std::uint64_t rounds = pqblk::test::effort(200);
  for (std::uint64_t i = 0; i < rounds; ++i) {
    NbdClient client(served.server());
    if (i % 10 == 9) {
      const Bytes part(stream.begin(), stream.begin() + dice.below(40));
      client.greet();
      client.send(part);  // no option at all
      continue;
    }
    REQUIRE(client.go(i % 2 == 0));
    const std::size_t length = dice.below(static_cast<std::uint32_t>(stream.size()));
    std::thread sender([&] { client.send(stream.data(), length); });
    Bytes some(1 + dice.below(200'000));
    if (i % 2 == 0) ::recv(client.fd(), some.data(), some.size(), MSG_DONTWAIT);
    if (i % 3 == 0) ::shutdown(client.fd(), SHUT_RDWR);
    if (i % 3 != 0) ::shutdown(client.fd(), SHUT_RD);
    sender.join();
  }
  CHECK(served.all_gone());
  NbdClient client(served.server());
  REQUIRE(client.go());
  CHECK(client.call(Command::read, 0, 4096).error == Errno::ok);
}

TEST_CASE("nbd: nonsense ends the connection that sent it and no other") {
  const Place place(Format::raw, 1 * kMiB, kFast);
  NbdServed served(place);
  NbdClient good(served.server());
  REQUIRE(good.go());
  {
    NbdClient bad(served.server());
    REQUIRE(bad.go());
    bad.request(Command::read, 0, 1, 0, 512);
    bad.send(Bytes(28, 0xff));
    CHECK(bad.reply());  // what was asked before is answered
    CHECK(bad.ended());
    CHECK(served.was_reported("no request where one was due"));
  }
  {
    NbdClient bad(served.server());
    CHECK(bad.greet(0xff));  // flags that nobody offered
    CHECK(bad.ended());
  }
  {
    NbdClient bad(served.server());
    CHECK(bad.greet());
    bad.send(Bytes(64, 1));
    CHECK(bad.ended());
  }
  {
    NbdClient bad(served.server());
    CHECK(bad.greet());
    int count = 0;
    while (count < 1000 && bad.ask(Option::list).size() == 2) ++count;
    CHECK(count == nbd::kOptionsMax);
  }
  CHECK(good.call(Command::read, 0, 512).error == Errno::ok);
}

TEST_CASE("nbd: silent clients are disconnected, patient ones are not") {
  const Place place(Format::raw, 8 * kMiB, kFast);
  nbd::ServerOptions options;
  options.handshake_ms = 300;
  options.stall_ms = 300;
  NbdServed served(place, 1, options);
  NbdClient idle(served.server());
  REQUIRE(idle.go());
  NbdClient mute(served.server());  // never answers the greeting
  NbdClient slow(served.server());  // stops in mid-header
  NbdClient half(served.server());  // stops in mid-payload
  NbdClient deaf(served.server());  // takes no replies
  for (NbdClient* client : {&slow, &half, &deaf}) REQUIRE(client->go());
  slow.send(Bytes(13, 0x25));
  half.request(Command::write, 0, 1, 0, 100'000, Bytes(50'000));
  for (std::uint64_t i = 0; i < 64; ++i) deaf.request(Command::read, nbd::kDf, i, 0, kMiB);
  nbd::Greeting greeting;
  CHECK(mute.receive(greeting));
  CHECK(mute.ended());
  CHECK(slow.ended());
  CHECK(half.ended());
  CHECK(served.until([](const auto& s) { return s.clients == 1; }));
  CHECK(served.server().stats().timeouts >= 4);
  CHECK(idle.call(Command::read, 0, 512).error == Errno::ok);
  // Nothing of the half write is on the disk.
  CHECK(idle.call(Command::read, 0, 4096, nbd::kDf).data == Bytes(4096));
}

TEST_CASE("nbd: an idle limit, when it is asked for, ends idle clients") {
  const Place place(Format::raw, 1 * kMiB, kFast);
  nbd::ServerOptions options;
  options.idle_ms = 300;
  NbdServed served(place, 1, options);
  NbdClient client(served.server());
  REQUIRE(client.go());
  CHECK(client.ended());
}

TEST_CASE("nbd: no more clients than allowed") {
  const Place place(Format::raw, 1 * kMiB, kFast);
  nbd::ServerOptions options;
  options.clients_max = 2;
  NbdServed served(place, 1, options);
  NbdClient one(served.server()), two(served.server());
  REQUIRE(one.go());
  REQUIRE(two.go());
  CHECK(served.until([](const auto& s) { return s.clients == 2; }));
  NbdClient three(served.server());
  CHECK(three.ended());
  one.hang_up();
  CHECK(served.until([](const auto& s) { return s.clients == 1; }));
  NbdClient four(served.server());
  CHECK(four.go());
  CHECK(served.server().stats().refused_clients == 1);
}

TEST_CASE("nbd: closing answers what is in flight and waits for its I/O") {
  const std::uint64_t rounds = pqblk::test::effort(30);
  for (std::uint64_t i = 0; i < rounds; ++i) {
    const Place place(Format::sealed, 4 * kMiB, kFast);
    NbdServed served(place, 2);
    NbdClient busy(served.server()), idle(served.server()), talking(served.server());
    REQUIRE(busy.go());
    REQUIRE(idle.go());
    REQUIRE(talking.greet());
    std::uint64_t answered = 0;
    for (std::uint64_t n = 0; n < 32; ++n) {
      busy.request(Command::write, 0, n, n * 100'000, 100'000, Bytes(100'000, 9));
    }
    std::thread reader([&] {
      while (busy.reply()) ++answered;
    });
    if (i % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(i * 100));
    served.stop();
    reader.join();
    CHECK(answered <= 32);
    CHECK(idle.ended());
    CHECK(talking.ended());
  }
}

TEST_CASE("nbd: sockets: a stale one is replaced, a living one and a file are not") {
  const Place place(Format::raw, 1 * kMiB, kFast);
  auto disk = place.open(1);
  REQUIRE(disk);
  const auto start = [&](const std::string& path) {
    nbd::ServerOptions options;
    options.unix_path = path;
    return nbd::Server::start(**disk, std::move(options));
  };
  // A socket file whose server is gone.
  {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, place.socket().c_str(), sizeof address.sun_path - 1);
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    REQUIRE(::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    ::close(fd);
  }
  {
    auto first = start(place.socket());
    REQUIRE_MESSAGE(first, first.error().to_string());
    struct stat status {};
    REQUIRE(::stat(place.socket().c_str(), &status) == 0);
    CHECK((status.st_mode & 0777) == 0600);
    auto second = start(place.socket());
    REQUIRE_FALSE(second);
    CHECK(second.error().kind() == Kind::exists);
  }
  CHECK(::access(place.socket().c_str(), F_OK) != 0);
  auto over_a_file = start(place.image());
  REQUIRE_FALSE(over_a_file);
  CHECK(over_a_file.error().kind() == Kind::exists);
  CHECK(start(std::string(200, 'x')).error().kind() == Kind::invalid_argument);
  nbd::ServerOptions tcp;
  tcp.tcp_host = "127.0.0.1";
  CHECK(nbd::Server::start(**disk, tcp).error().kind() == Kind::invalid_argument);
  tcp.insecure = true;
  auto open_port = nbd::Server::start(**disk, tcp);
  REQUIRE(open_port);
  CHECK((*open_port)->tcp_port() != 0);
}

}  // namespace pqblk::exports::test
