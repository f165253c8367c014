// The native part of the soak (test/soak/main.mjs starts it): the board, a client, a look at
// everything.
//
//   soak_peer board BOARD SEED SLOTS DISK_BYTES MAX_BYTES [loses-unflushed] [mixes]
//   [keeps-discarded] soak_peer client BOARD FIRST_SLOT SLOTS SEED WAY...      a way in of
//   transport.h soak_peer verify BOARD killed|clean WAY...|file PATH     nobody writes: settles the
//   board
//
// A client obeys the lines go, pause, stop, tolerate, insist on its stdin, and says on its stdout,
// as JSON, one a line: running, paused, gone (the other end), counts, ended.
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "soak/client.h"

namespace {

using namespace pqblk::soak;  // NOLINT
using Words = std::vector<std::string>;
using Clock = std::chrono::steady_clock;

constexpr auto kConnectPatience = std::chrono::minutes(5);

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "soak_peer: %s\n", what.c_str());
  std::exit(2);
}

std::unique_ptr<Transport> make_transport(const Words& words, std::uint32_t places) {
  if (words.at(0) == "nbd") return make_nbd(words, places);
  if (words.at(0) == "vhost") return make_vhost(words, places);
  if (words.at(0) == "c") return make_c(words, places);
  die("no way in: " + words[0]);
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + "\"";
}

std::string list(const std::vector<std::string>& texts) {
  std::string out = "[";
  for (const std::string& text : texts) out += (out.size() > 1 ? "," : "") + quoted(text);
  return out + "]";
}

void say(const char* event, const std::string& more = "") {
  std::printf("{\"event\":\"%s\"%s}\n", event, more.c_str());
  std::fflush(stdout);
}

std::string said(const Client& client) {
  const Counts& c = client.counts();
  static constexpr const char* kNames[] = {"reads", "writes", "flushes", "discards", "zeroes"};
  std::string out;
  const auto add = [&](const std::string& name, std::uint64_t n) {
    out += ",\"" + name + "\":" + std::to_string(n);
  };
  for (std::size_t i = 0; i < c.operations.size(); ++i) add(kNames[i], c.operations[i]);
  add("readBytes", c.read_bytes);
  add("writtenBytes", c.written_bytes);
  add("verified", c.verified);
  add("refused", c.refused);
  add("unknown", c.unknown);
  return out + ",\"wrong\":" + list(client.wrong());
}

// Lines of stdin as they come.
class Orders {
 public:
  // Empty: none yet. "stop": the end of stdin, too.
  std::string next(int wait_ms) {
    for (;;) {
      if (const auto end = text_.find('\n'); end != std::string::npos) {
        std::string line = text_.substr(0, end);
        text_.erase(0, end + 1);
        return line;
      }
      pollfd p{STDIN_FILENO, POLLIN, 0};
      if (::poll(&p, 1, wait_ms) <= 0) return "";
      char more[256];
      const ssize_t n = ::read(STDIN_FILENO, more, sizeof more);
      if (n <= 0) return "stop";
      text_.append(more, static_cast<std::size_t>(n));
    }
  }

 private:
  std::string text_;
};

class Session {
 public:
  Session(Client& client, Transport& transport) : client_(client), transport_(transport) {}

  int run() {
    while (!stopping_ || (there_ && !client_.idle())) {
      obey(orders_.next(there_ && (wanted_ || !client_.idle()) ? 0 : 1000));
      if (there_) step();
      if (Clock::now() > told_ + std::chrono::seconds(1)) tell("counts");
    }
    const std::string error = transport_.disconnect();
    tell("ended", error.empty() ? "" : ",\"error\":" + quoted(error));
    return client_.wrong().empty() && error.empty() ? 0 : 1;
  }

 private:
  void obey(const std::string& order) {
    if (order == "go") {
      connect();
    } else if (order == "pause" || order == "stop") {
      stopping_ |= order == "stop";
      wanted_ = false;
      if (order == "pause") pausing_ = true;
    } else if (order == "tolerate" || order == "insist") {
      client_.tolerate(order == "tolerate");
      say(order.c_str());
    }
    if (pausing_ && (client_.idle() || !there_)) tell_paused();
  }

  void connect() {
    if (!there_) {
      client_.connecting();
      const auto end = Clock::now() + kConnectPatience;
      std::string why;
      while (!(why = transport_.connect()).empty()) {
        if (Clock::now() > end) die("cannot connect: " + why);
        ::usleep(20'000);
      }
      there_ = true;
    }
    wanted_ = true;
    pausing_ = false;
    say("running");
  }

  void step() {
    if (!client_.turn(wanted_, 100)) {
      there_ = wanted_ = false;
      tell("gone");
    }
    if (!client_.wrong().empty() && !complained_) {
      complained_ = true;
      tell("counts");
    }
    if (pausing_ && client_.idle()) tell_paused();
  }

  void tell_paused() {
    pausing_ = false;
    tell("paused");
  }
  void tell(const char* event, const std::string& more = "") {
    say(event, said(client_) + more);
    told_ = Clock::now();
  }

  Client& client_;
  Transport& transport_;
  Orders orders_;
  bool there_ = false, wanted_ = false, pausing_ = false, stopping_ = false, complained_ = false;
  Clock::time_point told_ = Clock::now();
};

class Whole {
 public:
  virtual ~Whole() = default;
  virtual std::string read(std::uint8_t*& data, std::uint64_t offset, std::uint32_t bytes) = 0;
};

class WholeFile final : public Whole {
 public:
  explicit WholeFile(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~WholeFile() override { ::close(fd_); }
  std::string read(std::uint8_t*& data, std::uint64_t offset, std::uint32_t bytes) override {
    data = memory_.data();
    const auto n = ::pread(fd_, data, bytes, static_cast<off_t>(offset));
    return n == static_cast<ssize_t>(bytes) ? "" : "the file is too short, or not to be read";
  }

 private:
  int fd_;
  std::vector<std::uint8_t> memory_ = std::vector<std::uint8_t>(kRequestMax);
};

class WholeDisk final : public Whole {
 public:
  explicit WholeDisk(const Words& way) : transport_(make_transport(way, 1)) {
    const auto end = Clock::now() + kConnectPatience;
    for (std::string why; !(why = transport_->connect()).empty(); ::usleep(20'000)) {
      if (Clock::now() > end) die(why);
    }
  }
  ~WholeDisk() override { transport_->disconnect(); }
  std::string read(std::uint8_t*& data, std::uint64_t offset, std::uint32_t bytes) override {
    transport_->submit(0, {Op::read, offset, bytes, false, false});
    transport_->kick();
    std::vector<Done> done;
    while (done.empty()) {
      if (!transport_->wait(done, 1000)) return "the other end is lost";
    }
    data = transport_->data(0);
    return done[0].error == 0 ? "" : std::strerror(done[0].error);
  }

 private:
  std::unique_ptr<Transport> transport_;
};

int verify(Board& board, bool killed, const Words& way) {
  std::unique_ptr<Whole> whole;
  if (way.at(0) == "file") {
    whole = std::make_unique<WholeFile>(way.at(1));
  } else {
    whole = std::make_unique<WholeDisk>(way);
  }
  std::vector<std::string> wrong;
  std::uint64_t cells = 0, bad = 0;
  const auto complain = [&](const std::string& what) {
    if (++bad <= 5) wrong.push_back(what);
  };
  const std::uint64_t end = board.disk_bytes();
  for (std::uint64_t at = 0; at < end; at += kRequestMax) {
    const auto bytes = static_cast<std::uint32_t>(std::min<std::uint64_t>(kRequestMax, end - at));
    std::uint8_t* data = nullptr;
    if (const std::string why = whole->read(data, at, bytes); !why.empty()) {
      complain("read at " + std::to_string(at) + ": " + why);
      continue;
    }
    const Range range = board.covered(at, bytes);
    for (std::uint32_t i = 0; i < range.count; ++i, ++cells) {
      const std::uint64_t from = std::uint64_t{i} * range.cell_bytes;
      const Seen seen = board.look(data + from, at + from, range.cell_bytes);
      const bool sound = seen.what == Seen::What::data || seen.what == Seen::What::zero;
      if (at >= kFineEnd && at < kSharedEnd && sound) continue;
      const std::string what = board.settle(range, i, seen, killed);
      if (!what.empty()) complain(what);
    }
  }
  say("verified", ",\"cells\":" + std::to_string(cells) + ",\"bad\":" + std::to_string(bad) +
                      ",\"wrong\":" + list(wrong));
  return bad == 0 ? 0 : 1;
}

std::uint64_t number(const std::string& text) { return std::stoull(text); }

int run(const Words& words) {
  const std::string what = words.at(0), path = words.at(1);
  const auto rest = [&](std::size_t from) {
    return Words(words.begin() + static_cast<std::ptrdiff_t>(from), words.end());
  };
  if (what == "board") {
    const auto says = [&](const char* word) {
      return std::find(words.begin(), words.end(), word) != words.end();
    };
    Board::create(path, static_cast<std::uint32_t>(number(words.at(2))),
                  static_cast<std::uint32_t>(number(words.at(3))), number(words.at(4)),
                  number(words.at(5)),
                  {!says("loses-unflushed"), !says("mixes"), !says("keeps-discarded")});
    return 0;
  }
  Board board(path);
  if (what == "verify") return verify(board, words.at(2) == "killed", rest(3));
  if (what != "client") die("unknown word: " + what);
  const auto slots = static_cast<std::uint32_t>(number(words.at(3)));
  const auto transport = make_transport(rest(5), slots);
  Client client(board, *transport, static_cast<std::uint32_t>(number(words.at(2))), slots,
                number(words.at(4)));
  return Session(client, *transport).run();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) die("see the first lines of soak_peer.cc");
  return run(Words(argv + 1, argv + argc));
}
