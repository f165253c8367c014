#include "soak/board.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace pqblk::soak {
namespace {

constexpr std::uint64_t kMagic = 0x7071'626c'6b53'4f41;
constexpr std::uint64_t kFineCells = kFineEnd / kUnit;
// Every eighth version is a zero, every eighth a discard.
constexpr std::uint32_t kKinds = 8, kZero = 0, kHint = 4;

struct Unit {
  std::uint32_t place, version;
  std::uint64_t mark;
};
static_assert(sizeof(Unit) == kUnit);

Unit unit_of(std::uint32_t seed, std::uint64_t place, std::uint32_t version) {
  std::uint64_t x = (std::uint64_t{version} << 32U) ^ place ^ (std::uint64_t{seed} << 17U);
  x = (x ^ (x >> 31U)) * 0x9E37'79B9'7F4A'7C15U;
  x = (x ^ (x >> 29U)) * 0xBF58'476D'1CE4'E5B9U;
  return {static_cast<std::uint32_t>(place), version, x ^ (x >> 32U)};
}

[[noreturn]] void die(const std::string& path, const char* what) {
  std::fprintf(stderr, "soak: %s: %s\n", path.c_str(), what);
  std::exit(2);
}

}  // namespace

// The size of the disk is at byte 8, where main.mjs changes it.
struct Board::Header {
  std::uint64_t magic;
  std::atomic<std::uint64_t> disk_bytes;
  std::uint64_t max_bytes;
  std::uint32_t seed, slots;
  Rules rules;
};

bool makes_zeros(std::uint32_t version) {
  return version % kKinds == kZero || version % kKinds == kHint;
}

std::uint32_t next_version(std::uint32_t last, Change change) {
  std::uint32_t v = last + 1;
  if (change == Change::data) return makes_zeros(v) ? v + 1 : v;
  while (v % kKinds != (change == Change::zero ? kZero : kHint)) ++v;
  return v;
}

void Board::create(const std::string& path, std::uint32_t seed, std::uint32_t slots,
                   std::uint64_t disk_bytes, std::uint64_t max_bytes, Rules rules) {
  const std::uint64_t bytes = kSector + (kFineCells + max_bytes / kSector) * sizeof(Cell);
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) die(path, "cannot be made");
  Header header{kMagic, disk_bytes, max_bytes, seed, slots, rules};
  if (::pwrite(fd, static_cast<void*>(&header), sizeof header, 0) != sizeof header) {
    die(path, "cannot be written");
  }
  ::close(fd);
}

Board::Board(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat st {};
  if (fd < 0 || ::fstat(fd, &st) != 0 || st.st_size < kSector) die(path, "is no board");
  bytes_ = static_cast<std::uint64_t>(st.st_size);
  void* at = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (at == MAP_FAILED) die(path, "cannot be mapped");
  header_ = static_cast<Header*>(at);
  if (header_->magic != kMagic) die(path, "is no board");
  cells_ = reinterpret_cast<Cell*>(static_cast<char*>(at) + kSector);
}

Board::~Board() { ::munmap(header_, bytes_); }

std::uint64_t Board::disk_bytes() const { return header_->disk_bytes.load(); }
std::uint32_t Board::slots() const { return header_->slots; }
const Rules& Board::rules() const { return header_->rules; }

namespace {
struct Shape {
  std::uint64_t begin, end;
  std::uint32_t run, cell_bytes;
};
Shape shape_of(Board::Part part, std::uint64_t disk_bytes) {
  switch (part) {
    case Board::Part::fine:
      return {0, kFineEnd, kFineRun, kUnit};
    case Board::Part::shared:
      return {kFineEnd, kSharedEnd, kPairRun, kSector};
    case Board::Part::pairs:
      return {kSharedEnd, kPairsEnd, kPairRun, kSector};
    case Board::Part::bulk:
      break;
  }
  return {kPairsEnd, disk_bytes, kBulkRun, kSector};
}
}  // namespace

std::uint32_t Board::runs(Part part, std::uint32_t slot, std::uint64_t disk_bytes) const {
  const Shape s = shape_of(part, disk_bytes);
  const std::uint64_t all = (s.end - s.begin) / (std::uint64_t{s.run} * s.cell_bytes);
  return static_cast<std::uint32_t>((all + slots() - 1 - slot) / slots());
}

Range Board::run(Part part, std::uint32_t slot, std::uint32_t number) const {
  const Shape s = shape_of(part, 0);
  const std::uint64_t run = slot + std::uint64_t{number} * slots();
  const std::uint64_t offset = s.begin + run * s.run * s.cell_bytes;
  return covered(offset, std::uint64_t{s.run} * s.cell_bytes);
}

Range Board::covered(std::uint64_t offset, std::uint64_t bytes) const {
  const bool fine = offset < kFineEnd;
  const std::uint32_t size = fine ? kUnit : kSector;
  const std::uint64_t first = offset / size, last = (offset + bytes + size - 1) / size;
  return {first + (fine ? 0 : kFineCells), static_cast<std::uint32_t>(last - first), size,
          first * size};
}

void Board::fill(std::uint8_t* data, std::uint64_t offset, std::uint64_t bytes,
                 std::uint32_t version) const {
  for (std::uint64_t i = 0; i < bytes; i += kUnit) {
    const Unit unit = unit_of(header_->seed, (offset + i) / kUnit, version);
    std::memcpy(data + i, &unit, kUnit);
  }
}

Seen Board::look(const std::uint8_t* data, std::uint64_t offset, std::uint64_t bytes) const {
  using What = Seen::What;
  Seen first{What::garbage, 0};
  for (std::uint64_t i = 0; i < bytes; i += kUnit) {
    Unit unit;
    std::memcpy(&unit, data + i, kUnit);
    Seen seen{What::data, unit.version};
    if (unit.place == 0 && unit.version == 0 && unit.mark == 0) {
      seen.what = What::zero;
    } else {
      const Unit right = unit_of(header_->seed, (offset + i) / kUnit, unit.version);
      if (makes_zeros(unit.version) || std::memcmp(&unit, &right, kUnit) != 0) {
        return {What::garbage, unit.version};
      }
    }
    if (i == 0) first = seen;
    if (seen.what != first.what || seen.version != first.version) return {What::mix, seen.version};
  }
  return first;
}

std::string Board::judge(const Range& cells, std::uint32_t i, std::uint32_t low, Seen seen) const {
  return judge(cells, i, low, seen, cell(cells.first + i).floor.load());
}

std::string Board::judge(const Range& cells, std::uint32_t i, std::uint32_t low, Seen seen,
                         std::uint32_t floor) const {
  const Cell& c = cell(cells.first + i);
  const std::uint32_t issued = c.issued.load(), zeroed = c.zeroed.load();
  bool right = false;
  if (seen.what == Seen::What::data) {
    right = seen.version == low ||
            (seen.version > low && seen.version > floor && seen.version <= issued);
  } else if (seen.what == Seen::What::zero) {
    right = makes_zeros(low) || (zeroed > low && zeroed > floor);
  } else if (seen.what == Seen::What::mix) {
    right = !rules().whole_sectors && issued != low;
  }
  if (right) return "";
  static constexpr const char* kWhat[] = {"zeros", "data", "garbage", "a mix"};
  const auto number = [](std::uint32_t n) { return std::to_string(n); };
  return "byte " + std::to_string(cells.offset + std::uint64_t{i} * cells.cell_bytes) +
         " reads as " + kWhat[static_cast<int>(seen.what)] + " (version " + number(seen.version) +
         "); acknowledged " + number(low) + ", issued " + number(issued) + ", settled before " +
         number(floor) + ", last zeroed " + number(zeroed) + ", flushed " +
         number(c.durable.load());
}

std::string Board::settle(const Range& cells, std::uint32_t i, Seen seen, bool killed) {
  Cell& c = cell(cells.first + i);
  if (killed && !rules().acknowledged_survives) c.low = std::min(c.low.load(), c.durable.load());
  const std::uint32_t low = c.low.load();
  // Nobody writes: a mix is wrong, whatever the rules.
  std::string wrong = seen.what == Seen::What::mix ? "at rest: " : "";
  if (wrong.empty())
    wrong = judge(cells, i, low, seen);
  else
    wrong += judge(cells, i, c.issued.load(), seen);
  if (seen.what == Seen::What::data) c.low = seen.version;
  if (seen.what == Seen::What::zero && !makes_zeros(low)) c.low = c.zeroed.load();
  c.durable = c.low.load();
  c.floor = c.issued.load();
  return wrong;
}

}  // namespace pqblk::soak
