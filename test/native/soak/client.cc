#include "soak/client.h"

#include <algorithm>
#include <cstring>

namespace pqblk::soak {
namespace {

using Part = Board::Part;

constexpr std::size_t kWrongMax = 5;
constexpr auto kPatience = std::chrono::minutes(10);
constexpr std::uint64_t kDoneOfCells = 1U << 16U;

const char* name(Op op) {
  static constexpr const char* kNames[] = {"read", "write", "flush", "discard", "write zeroes"};
  return kNames[static_cast<int>(op)];
}

}  // namespace

Client::Client(Board& board, Transport& transport, std::uint32_t first_slot, std::uint32_t slots,
               std::uint64_t seed)
    : board_(board),
      transport_(transport),
      first_(first_slot),
      random_(seed * 1000 + first_slot),
      slots_(slots) {}

void Client::connecting() {
  disk_bytes_ = board_.disk_bytes();
  acknowledged_.clear();  // what of it is there, was looked at and counts as flushed
  for (Slot& slot : slots_) {
    slot.unflushed.clear();
    if (!slot.out) continue;
    slot.since = Clock::now();
    slot.outlived = true;
    if (slot.shared || slot.request.op == Op::read || slot.request.op == Op::flush) continue;
    // Done already, or about to be: this one may still come.
    for (std::uint32_t i = 0; i < slot.cells.count; ++i) {
      auto& floor = board_.cell(slot.cells.first + i).floor;
      floor = std::min(floor.load(), slot.version - 1);
    }
  }
}

bool Client::turn(bool start, int wait_ms) {
  bool started = false;
  const auto now = Clock::now();
  for (std::uint32_t place = 0; place < slots_.size(); ++place) {
    Slot& slot = slots_[place];
    if (slot.out && now - slot.since > kPatience) {
      complain(slot, "no answer for ten minutes");
      slot.since = now;
    }
    if (!start || slot.out) continue;
    slot.out = started = true;
    slot.outlived = false;
    slot.may_fail = tolerates_;
    slot.since = now;
    ++out_;
    issue(place);
  }
  if (started) transport_.kick();
  std::vector<Done> done;
  const bool there = transport_.wait(done, out_ == 0 ? 0 : wait_ms);
  for (const Done& d : done) finish(d);
  if (!there) lost();
  return there;
}

void Client::issue(std::uint32_t place) {
  const std::uint32_t dice = below(100);
  if (dice < 6) {
    Slot& slot = slots_[place];
    slot.request = {Op::flush, 0, 0, false, false};
    std::swap(slot.unflushed, acknowledged_);
    transport_.submit(place, slot.request);
  } else if (dice < 45) {
    issue_read(place);
  } else {
    issue_change(place, dice < 50 ? Op::discard : dice < 56 ? Op::zeroes : Op::write);
  }
}

Part Client::pick_part() {
  const std::uint32_t dice = below(100);
  if (dice < 25) return Part::fine;
  if (dice < 32) return Part::shared;
  return dice < 64 ? Part::pairs : Part::bulk;
}

// A part of one of the slot's runs, as the transport can say it.
Range Client::pick_range(std::uint32_t slot, Part part) {
  const std::uint32_t runs = board_.runs(part, slot, disk_bytes_);
  if (runs == 0) return pick_range(slot, Part::fine);
  const Range run = board_.run(part, slot, below(runs));
  const std::uint32_t step = std::max(1U, transport_.offset_align() / run.cell_bytes);
  const std::uint32_t steps = run.count / step;
  std::uint32_t most = steps;
  if (part == Part::bulk) {
    const std::uint32_t dice = below(10);
    most = dice < 5 ? 8 : dice < 9 ? 64 : kRequestMax / kSector;
  }
  const std::uint32_t count = 1 + below(std::min(most, steps));
  const std::uint32_t begin = below(steps - count + 1);
  return board_.covered(run.offset + std::uint64_t{begin} * step * run.cell_bytes,
                        std::uint64_t{count} * step * run.cell_bytes);
}

void Client::issue_read(std::uint32_t place) {
  Slot& slot = slots_[place];
  Request& r = slot.request;
  r = {};
  if (below(3) != 0) {
    const Range range = pick_range(below(board_.slots()), pick_part());
    r.offset = range.offset;
    r.bytes = static_cast<std::uint32_t>(range.bytes());
  } else {  // anything, of any alignment
    const std::uint32_t align = transport_.offset_align();
    const std::uint64_t end = below(4) == 0 ? kFineEnd : disk_bytes_;
    r.offset = random_() % (end / align) * align;
    const std::uint64_t left = (r.offset < kFineEnd ? kFineEnd : disk_bytes_) - r.offset;
    const std::uint32_t most = below(8) == 0 ? kRequestMax : 16 * kSector;
    r.bytes = (1 + below(std::min<std::uint64_t>(left, most) / align)) * align;
  }
  slot.shared = false;
  slot.cells = board_.covered(r.offset, r.bytes);
  slot.low.resize(slot.cells.count);
  for (std::uint32_t i = 0; i < slot.cells.count; ++i) {
    slot.low[i] = board_.cell(slot.cells.first + i).low.load();
  }
  transport_.submit(place, r);
}

void Client::issue_change(std::uint32_t place, Op op) {
  Slot& slot = slots_[place];
  const Part part = pick_part();
  slot.shared = part == Part::shared;
  slot.cells = pick_range(slot.shared ? below(board_.slots()) : first_ + place, part);
  slot.request = {op, slot.cells.offset, static_cast<std::uint32_t>(slot.cells.bytes()),
                  op != Op::discard && transport_.fua() && below(12) == 0,
                  op == Op::zeroes && below(2) == 0};
  slot.change = op == Op::write ? Change::data : Change::zero;
  const bool whole_sectors = slot.cells.cell_bytes == kSector;  // an owner of no bulk gets fine
  if (op == Op::discard && !(whole_sectors && board_.rules().discard_zeroes)) {
    slot.change = Change::hint;
  }
  if (slot.shared) {
    ++shared_version_;
    slot.version = next_version(((first_ + place) << 24U) + (shared_version_ << 4U & 0xff'ffffU),
                                Change::data);
  } else {
    slot.version = 0;
    for (std::uint32_t i = 0; i < slot.cells.count; ++i) {
      slot.version = std::max(slot.version, board_.cell(slot.cells.first + i).issued.load());
    }
    slot.version = next_version(slot.version, slot.change);
    for (std::uint32_t i = 0; i < slot.cells.count; ++i) {
      Cell& cell = board_.cell(slot.cells.first + i);
      cell.issued = slot.version;
      if (slot.change != Change::data) cell.zeroed = slot.version;
    }
  }
  if (op == Op::write) {
    board_.fill(transport_.data(place), slot.request.offset, slot.request.bytes, slot.version);
  }
  transport_.submit(place, slot.request);
}

void Client::finish(const Done& done) {
  if (done.place >= slots_.size() || !slots_[done.place].out) {
    wrong_.push_back("an answer to no request, place " + std::to_string(done.place));
    return;
  }
  Slot& slot = slots_[done.place];
  slot.out = false;
  --out_;
  const Op op = slot.request.op;
  if (done.error != 0) {
    ++counts_.refused;
    if (op == Op::read || !(slot.may_fail || tolerates_)) {
      complain(slot, "failed: " + std::string(std::strerror(done.error)));
    }
    if (op == Op::flush) {
      acknowledged_.insert(acknowledged_.end(), slot.unflushed.begin(), slot.unflushed.end());
      slot.unflushed.clear();
    }
    return;
  }
  ++counts_.operations[static_cast<std::size_t>(op)];
  if (op == Op::read) {
    finish_read(done.place);
  } else if (op == Op::flush) {
    for (const auto& [cells, version] : slot.unflushed) {
      for (std::uint32_t i = 0; i < cells.count; ++i) {
        auto& durable = board_.cell(cells.first + i).durable;
        durable = std::max(durable.load(), version);
      }
    }
    slot.unflushed.clear();
  } else {
    finish_change(slot);
  }
}

void Client::finish_change(Slot& slot) {
  if (slot.change == Change::data) counts_.written_bytes += slot.request.bytes;
  if (slot.shared || slot.change == Change::hint) return;
  const bool durable = board_.rules().acknowledged_survives || slot.request.fua;
  for (std::uint32_t i = 0; i < slot.cells.count; ++i) {
    Cell& cell = board_.cell(slot.cells.first + i);
    cell.low = slot.version;
    if (durable) cell.durable = slot.version;
  }
  // What does not fit is remembered as not flushed: the board then asks for less.
  if (!durable && acknowledged_.size() < kDoneOfCells) {
    acknowledged_.emplace_back(slot.cells, slot.version);
  }
}

void Client::finish_read(std::uint32_t place) {
  const Slot& slot = slots_[place];
  const Request& r = slot.request;
  const std::uint8_t* data = transport_.data(place);
  const bool whole = board_.rules().whole_sectors;
  counts_.read_bytes += r.bytes;
  for (std::uint32_t i = 0; i < slot.cells.count; ++i) {
    const std::uint64_t at = slot.cells.offset + std::uint64_t{i} * slot.cells.cell_bytes;
    const std::uint64_t begin = (std::max(at, r.offset) + kUnit - 1) / kUnit * kUnit;
    const std::uint64_t end =
        std::min(at + slot.cells.cell_bytes, r.offset + r.bytes) / kUnit * kUnit;
    if (begin >= end) continue;
    const bool shared = at >= kFineEnd && at < kSharedEnd;
    // Where reads are not kept apart from writes, only what rests can be judged.
    if (!whole && (shared || board_.cell(slot.cells.first + i).issued != slot.low[i])) continue;
    const Seen seen = board_.look(data + (begin - r.offset), begin, end - begin);
    ++counts_.verified;
    const bool sound = seen.what == Seen::What::data || seen.what == Seen::What::zero;
    if (shared && sound) continue;
    std::string wrong = board_.judge(slot.cells, i, slot.low[i], seen);
    if (!wrong.empty() && slot.outlived) wrong = judge_outlived(slot, i, seen);
    if (!wrong.empty()) complain(slot, wrong);
  }
}

// Answered before the end of the one life, or in the next one: what was settled between the two is
// older than what the one may have read, and newer than when it began for the other.
std::string Client::judge_outlived(const Slot& slot, std::uint32_t i, Seen seen) const {
  const Cell& cell = board_.cell(slot.cells.first + i);
  const std::string before = board_.judge(slot.cells, i, slot.low[i], seen, 0);
  return before.empty() ? before : board_.judge(slot.cells, i, cell.low.load(), seen);
}

void Client::lost() {
  if (transport_.answers_later()) return;
  for (Slot& slot : slots_) {
    if (slot.out) ++counts_.unknown;
    slot.out = false;
  }
  out_ = 0;
}

void Client::complain(const Slot& slot, const std::string& what) {
  if (wrong_.size() >= kWrongMax) return;
  const Request& r = slot.request;
  wrong_.push_back("slot " + std::to_string(first_ + (&slot - slots_.data())) + ", " + name(r.op) +
                   " of " + std::to_string(r.bytes) + " bytes at " + std::to_string(r.offset) +
                   ": " + what);
}

}  // namespace pqblk::soak
