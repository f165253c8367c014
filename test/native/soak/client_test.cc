// The soak's oracle can fail: a disk in memory that lies in one way at a time is caught every time,
// and one that is right never is.
#include "soak/client.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <optional>

#include "effort.h"

using namespace pqblk::soak;  // NOLINT
using pqblk::test::effort;

namespace {

constexpr std::uint64_t kDisk = 12 << 20;  // one run of bulk: not every slot owns one
constexpr std::uint32_t kPlaces = 4;

enum class Lie : std::uint8_t {
  none,
  lost_write,       // acknowledged, and not there
  torn_write,       // half a sector of it is there
  spilled_write,    // it reaches 16 bytes further
  misplaced_write,  // a sector's data goes to the next one
  kept_zeroes,      // zeroes acknowledged, and the data is there still
  old_read,         // what the disk held a while ago
  forgotten,        // by a kill: an acknowledged write
  come_back,        // after a kill: a write that was not there when all was looked at
};

// Answers requests one turn after they came, the last first.
class LyingDisk final : public Transport {
 public:
  explicit LyingDisk(Lie lie) : lie_(lie), now_(kDisk), before_(kDisk), memory_(kPlaces) {
    for (auto& memory : memory_) memory.resize(kRequestMax);
  }
  std::string connect() override { return ""; }
  std::string disconnect() override { return ""; }
  std::uint8_t* data(std::uint32_t place) override { return memory_[place].data(); }
  void submit(std::uint32_t place, const Request& r) override {
    if (!gone_) waiting_.emplace_back(place, r);
  }
  bool wait(std::vector<Done>& done, int /*ms*/) override {
    if (gone_) return false;
    if (holds_) return true;
    for (; !waiting_.empty(); waiting_.pop_back()) {
      const auto [place, r] = waiting_.back();
      perform(memory_[place].data(), r);
      done.push_back({place, 0});
    }
    return true;
  }

  // The requests of another client.
  void perform(std::uint8_t* data, const Request& r);

  // Requests that wait are lost: done, perhaps, and not answered.
  void kill() {
    gone_ = true;
    for (const auto& [place, r] : waiting_) perform(memory_[place].data(), r);
    waiting_.clear();
    if (lie_ == Lie::forgotten) std::copy(before_.begin(), before_.end(), now_.begin());
    if (lie_ == Lie::come_back) now_.swap(before_);
  }
  void start() {
    gone_ = holds_ = false;
    if (lie_ == Lie::come_back && looked_) now_.swap(before_);
  }
  bool gone() const { return gone_; }
  bool holds() const { return holds_; }
  void hold() { holds_ = true; }  // no answers in this life any more
  const std::uint8_t* content() {
    looked_ = true;
    return now_.data();
  }

 private:
  const Lie lie_;
  std::vector<std::uint8_t> now_, before_;
  std::vector<std::vector<std::uint8_t>> memory_;
  std::vector<std::pair<std::uint32_t, Request>> waiting_;
  std::uint64_t count_ = 0;
  bool gone_ = false, holds_ = false, looked_ = false;
};

void LyingDisk::perform(std::uint8_t* data, const Request& r) {
  std::uint8_t* at = now_.data() + r.offset;
  if (++count_ % 500 == 0) before_ = now_;
  const bool lies = count_ % 40 == 0;
  if (r.op == Op::read) {
    const bool old = lies && lie_ == Lie::old_read;
    std::memcpy(data, (old ? before_ : now_).data() + r.offset, r.bytes);
  } else if (r.op == Op::zeroes) {
    if (lie_ != Lie::kept_zeroes) std::memset(at, 0, r.bytes);
  } else if (r.op == Op::discard) {  // advice, but for whole sectors
    if ((r.offset | r.bytes) % kSector == 0) std::memset(at, 0, r.bytes);
  } else if (r.op == Op::write) {
    std::uint64_t bytes = r.bytes;
    if (lies && lie_ == Lie::lost_write) return;
    if (lies && lie_ == Lie::misplaced_write && r.offset + r.bytes + kSector < kDisk) at += kSector;
    if (lies && lie_ == Lie::torn_write) bytes -= std::min<std::uint64_t>(bytes, kSector) / 2;
    std::memcpy(at, data, bytes);
    if (lies && lie_ == Lie::spilled_write && r.offset + r.bytes < kDisk) {
      std::memcpy(at + bytes, data, kUnit);
    }
  }
}

// Another way to the disk, whose requests wait for the next life and are answered in it, as those
// of a guest are.
class PatientClient final : public Transport {
 public:
  explicit PatientClient(LyingDisk& disk) : disk_(disk), memory_(kRequestMax) {}
  std::string connect() override { return ""; }
  std::string disconnect() override { return ""; }
  bool answers_later() const override { return true; }
  std::uint8_t* data(std::uint32_t /*place*/) override { return memory_.data(); }
  void submit(std::uint32_t /*place*/, const Request& r) override { waiting_ = r; }
  bool wait(std::vector<Done>& done, int /*ms*/) override {
    if (disk_.gone()) return false;
    if (disk_.holds()) return true;
    if (waiting_) {
      disk_.perform(memory_.data(), *waiting_);
      done.push_back({0, 0});
    }
    waiting_.reset();
    return true;
  }

 private:
  LyingDisk& disk_;
  std::vector<std::uint8_t> memory_;
  std::optional<Request> waiting_;
};

std::string look_at_all(Board& board, LyingDisk& disk) {
  const std::uint8_t* content = disk.content();
  std::string wrong;
  for (const auto& [from, to] : {std::pair<std::uint64_t, std::uint64_t>{0, kFineEnd},
                                 std::pair<std::uint64_t, std::uint64_t>{kSharedEnd, kDisk}}) {
    const Range all = board.covered(from, to - from);
    for (std::uint32_t i = 0; i < all.count; ++i) {
      const std::uint64_t at = from + std::uint64_t{i} * all.cell_bytes;
      const std::string found =
          board.settle(all, i, board.look(content + at, at, all.cell_bytes), true);
      if (wrong.empty()) wrong = found;
    }
  }
  return wrong;
}

// What the oracle says of two lives with a kill between them.
std::string verdict(Lie lie, Rules rules, std::uint64_t seed) {
  const std::string path =
      std::filesystem::temp_directory_path() / ("pqblk-board-" + std::to_string(::getpid()));
  Board::create(path, static_cast<std::uint32_t>(seed), kPlaces, kDisk, kDisk, rules);
  Board board(path);
  std::filesystem::remove(path);
  LyingDisk disk(lie);
  Client client(board, disk, 0, kPlaces, seed);
  for (int life = 0; life < 2; ++life) {
    client.connecting();
    disk.start();
    for (int turn = 0; turn < 1200 && client.wrong().empty(); ++turn) {
      if (!client.turn(true, 0)) return "the disk is gone";
    }
    if (!client.wrong().empty()) return client.wrong()[0];
    disk.kill();
    client.turn(true, 0);
    const std::string wrong = look_at_all(board, disk);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

TEST_CASE("a disk that is right is never accused") {
  for (std::uint64_t seed = 1; seed <= effort(4); ++seed) {
    CHECK(verdict(Lie::none, {}, seed) == "");
    CHECK(verdict(Lie::none, {false, false, false}, seed) == "");
  }
}

TEST_CASE("what is read over the end of a life may be what was settled after it") {
  const std::string path =
      std::filesystem::temp_directory_path() / ("pqblk-board-" + std::to_string(::getpid()));
  Board::create(path, 1, kPlaces, kDisk, kDisk, {});
  Board board(path);
  std::filesystem::remove(path);
  LyingDisk disk(Lie::none);
  PatientClient guest(disk);
  Client writer(board, disk, 0, kPlaces - 1, 1), reader(board, guest, kPlaces - 1, 1, 2);
  for (std::uint64_t life = 0; life < 400 * effort(1); ++life) {
    for (Client* client : {&writer, &reader}) client->connecting();
    disk.start();
    for (int turn = 0; turn < 4; ++turn) {
      for (Client* client : {&reader, &writer}) REQUIRE(client->turn(true, 0));
    }
    disk.hold();
    for (Client* client : {&reader, &writer}) client->turn(true, 0);
    disk.kill();
    for (Client* client : {&reader, &writer}) client->turn(false, 0);
    REQUIRE(look_at_all(board, disk) == "");
  }
  CHECK(reader.wrong().empty());
  CHECK(writer.wrong().empty());
}

TEST_CASE("every lie of a disk is caught") {
  for (int lie = 1; lie <= static_cast<int>(Lie::come_back); ++lie) {
    CAPTURE(lie);
    for (std::uint64_t seed = 1; seed <= effort(3); ++seed) {
      CHECK(verdict(static_cast<Lie>(lie), {}, seed) != "");
    }
  }
}

TEST_CASE(
    "what was written and not flushed may fall back where that is the rule, flushed may not") {
  for (std::uint64_t seed = 1; seed <= effort(3); ++seed) {
    CHECK(verdict(Lie::forgotten, {false, false, false}, seed) !=
          "");  // of long ago: flushed since
  }
}

}  // namespace
