// A client of the soak: random requests on the slots that it owns, each answer held against the
// board.
//
// Room test/soak. One thread; requests of different slots are on their way side by side. Room test.
#pragma once

#include <array>
#include <chrono>
#include <random>
#include <string>
#include <vector>

#include "soak/board.h"
#include "soak/transport.h"

namespace pqblk::soak {

struct Counts {
  std::array<std::uint64_t, static_cast<std::size_t>(Op::count_)> operations{};
  std::uint64_t read_bytes = 0, written_bytes = 0;
  std::uint64_t verified = 0;  // sectors, or parts of them, that were compared
  std::uint64_t refused = 0;   // failed, and might
  std::uint64_t unknown = 0;   // on their way when the other end was lost
};

class Client {
 public:
  Client(Board& board, Transport& transport, std::uint32_t first_slot, std::uint32_t slots,
         std::uint64_t seed);

  // Before the transport connects (again): what was on its way may be done from then on, and be
  // read by other clients before this one hears of it.
  void connecting();
  // Starts what can be started and takes what completed. False: the other end is lost.
  bool turn(bool start, int wait_ms);
  bool idle() const { return out_ == 0; }
  void tolerate(bool yes) { tolerates_ = yes; }

  const Counts& counts() const { return counts_; }
  // What was wrong, the first few.
  const std::vector<std::string>& wrong() const { return wrong_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Slot {
    bool out = false, may_fail = false, shared = false;
    bool outlived = false;  // the life of the other end in which it was asked
    Request request;
    Change change = Change::data;
    Range cells;
    std::uint32_t version = 0;
    std::vector<std::uint32_t> low;                          // of a read
    std::vector<std::pair<Range, std::uint32_t>> unflushed;  // of a flush: what it covers
    Clock::time_point since;
  };

  std::uint32_t below(std::uint64_t n) { return static_cast<std::uint32_t>(random_() % n); }
  void issue(std::uint32_t place);
  void issue_read(std::uint32_t place);
  void issue_change(std::uint32_t place, Op op);
  Board::Part pick_part();
  Range pick_range(std::uint32_t slot, Board::Part part);
  void finish(const Done& done);
  void finish_change(Slot& slot);
  void finish_read(std::uint32_t place);
  std::string judge_outlived(const Slot& slot, std::uint32_t i, Seen seen) const;
  void lost();
  void complain(const Slot& slot, const std::string& what);
  std::uint64_t disk_bytes() const { return disk_bytes_; }

  Board& board_;
  Transport& transport_;
  const std::uint32_t first_;
  std::mt19937_64 random_;
  std::vector<Slot> slots_;
  std::vector<std::pair<Range, std::uint32_t>> acknowledged_;  // since the last flush began
  std::uint64_t disk_bytes_ = 0;
  std::uint32_t out_ = 0, shared_version_ = 0;
  bool tolerates_ = false;
  Counts counts_;
  std::vector<std::string> wrong_;
};

}  // namespace pqblk::soak
