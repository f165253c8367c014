// The model of the soak: what each part of a disk may hold, in a file that outlives every process.
//
// Every 16 bytes that are ever written say where they belong and of which version they are, so the
// model needs versions only. Each part of the disk is changed by one slot (a client's place for one
// request at a time) and read by all:
//
//   fine    the first MiB: 16-byte cells, dealt out 96 by 96, so that neighbours share sectors
//   shared  the second: everybody writes, only whole sectors are asked for
//   pairs   8 MiB: sectors, dealt out two by two, so that neighbours share clusters and entry pages
//   bulk    the rest: 2 MiB of sectors at a time, for large requests
//
// A cell holds what was acknowledged last (`low`) or something that was issued since. A killed
// server of a qcow2 disk may fall back to what was flushed (`durable`). Once all was looked at
// after a kill, what was seen is what there is: older requests (`floor`) cannot come back.
//
// Room test/soak. Knows no disk and no client. Room test.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace pqblk::soak {

inline constexpr std::uint32_t kUnit = 16, kSector = 4096;
inline constexpr std::uint64_t kFineEnd = 1 << 20, kSharedEnd = 2 << 20, kPairsEnd = 10 << 20;
inline constexpr std::uint32_t kFineRun = 96, kPairRun = 2, kBulkRun = 512;  // cells

// What a request does to a cell; its version's number says it too.
enum class Change : std::uint8_t {
  data,
  zero,
  hint
};  // hint: a discard; zeros, or nothing happens
bool makes_zeros(std::uint32_t version);
std::uint32_t next_version(std::uint32_t last, Change change);

struct Cell {
  std::atomic<std::uint32_t> issued, low, durable, floor, zeroed;
};

// What the owner of a disk promises; chosen when the board is made.
struct Rules {
  bool acknowledged_survives = true;  // kill -9 loses nothing that was acknowledged, flushed or not
  bool whole_sectors = true;          // a sector that is being written reads as old or new, no mix
  bool discard_zeroes = true;         // of whole sectors
};

// Cells next to each other, and the bytes that they cover.
struct Range {
  std::uint64_t first = 0;  // cell
  std::uint32_t count = 0;
  std::uint32_t cell_bytes = kSector;
  std::uint64_t offset = 0;  // of the first, on the disk
  std::uint64_t bytes() const { return std::uint64_t{count} * cell_bytes; }
};

struct Seen {
  enum class What : std::uint8_t { zero, data, garbage, mix } what;
  std::uint32_t version;
};

class Board {
 public:
  static void create(const std::string& path, std::uint32_t seed, std::uint32_t slots,
                     std::uint64_t disk_bytes, std::uint64_t max_bytes, Rules rules);
  explicit Board(const std::string& path);  // maps it; ends the program when it is none
  ~Board();
  Board(const Board&) = delete;

  std::uint64_t disk_bytes() const;
  std::uint32_t slots() const;
  const Rules& rules() const;
  Cell& cell(std::uint64_t index) const { return cells_[index]; }

  // Parts of the disk that a slot owns.
  enum class Part : std::uint8_t { fine, shared, pairs, bulk };
  std::uint32_t runs(Part part, std::uint32_t slot, std::uint64_t disk_bytes) const;
  Range run(Part part, std::uint32_t slot, std::uint32_t number) const;
  // Cells that [offset, offset + bytes) covers wholly (cut: at least one unit of), fine or sectors.
  Range covered(std::uint64_t offset, std::uint64_t bytes) const;

  void fill(std::uint8_t* data, std::uint64_t offset, std::uint64_t bytes,
            std::uint32_t version) const;
  // `bytes`, a multiple of kUnit, that should be of one version.
  Seen look(const std::uint8_t* data, std::uint64_t offset, std::uint64_t bytes) const;

  // Empty when the cell may read like this; `low` is that of when the read began.
  std::string judge(const Range& cells, std::uint32_t i, std::uint32_t low, Seen seen) const;
  // As if everything up to `floor` had been settled, and no more.
  std::string judge(const Range& cells, std::uint32_t i, std::uint32_t low, Seen seen,
                    std::uint32_t floor) const;
  // After a kill, or a clean end, with nobody writing: the cell is what was seen. Empty, or what is
  // wrong.
  std::string settle(const Range& cells, std::uint32_t i, Seen seen, bool killed);

 private:
  struct Header;
  Header* header_ = nullptr;
  Cell* cells_ = nullptr;
  std::uint64_t bytes_ = 0;
};

}  // namespace pqblk::soak
