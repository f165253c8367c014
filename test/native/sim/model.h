// The oracle: which contents a guest may read from each sector, now and after a crash.
//
// Room test/sim. Every write, zero or discard is a version, numbered in the order of issue; a
// written sector holds a pattern made of (sector, block, version), so that a block that was read
// says what it is. For each unit (4096 bytes where the image promises whole sectors, else 512, what
// a device promises) the model keeps a range of versions that may be read:
//
//   floor   the newest one that survives power loss: acknowledged before a flush that succeeded was
//           called, or written with FUA
//   acked   the newest acknowledged one: the floor of kill -9 and of every read
//   issued  the newest one begun
//
// Writes to one sector never overlap in time (range locks), so the range is all there is to it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/units.h"

namespace pqblk::sim {

inline constexpr std::uint32_t kPatternBlock = 512;
inline constexpr std::uint32_t kBlocksPerSector = kSectorSize / kPatternBlock;

// Fills one sector with the pattern of a version.
void fill_sector(std::uint8_t* out, std::uint64_t sector, std::uint64_t version);

struct Seen {
  enum class What : std::uint8_t { zeros, data, garbage } what = What::garbage;
  std::uint64_t sector = 0;
  std::uint32_t block = 0;
  std::uint64_t version = 0;
  bool operator==(const Seen&) const = default;
  std::string text() const;
};
Seen look_at_block(const std::uint8_t* block);

enum class Crash : std::uint8_t { power_loss, kill };

struct ModelOptions {
  std::uint64_t sectors = 0;
  std::uint32_t unit = kSectorSize;  // 512: the image passes torn sectors on (raw, qcow2)
  bool open_is_durable = true;       // what an opener reads has been made durable by the open
  bool kill_keeps = true;            // what was acknowledged outlives the process, unflushed or not
  bool backed = false;               // version 0 is its pattern (a backing file), not zeros
};

class Model {
 public:
  Model() = default;
  explicit Model(const ModelOptions& options);
  const ModelOptions& options() const { return options_; }

  // A write or zero of `count` sectors begins; returns its version.
  std::uint64_t begin(std::uint64_t first, std::uint64_t count, bool zeros);
  // It was acknowledged (a failed one is not: it may or may not show later). `durable`: FUA.
  void acknowledge(std::uint64_t version, std::uint64_t first, std::uint64_t count, bool durable);

  using Ticket = std::vector<std::uint64_t>;  // `acked` of every unit asked about
  Ticket begin_flush() const { return acked(0, options_.sectors); }
  void end_flush(const Ticket& ticket);
  Ticket begin_read(std::uint64_t first, std::uint64_t count) const { return acked(first, count); }
  // Empty when what was read is allowed, else what is wrong.
  std::string end_read(const Ticket& ticket, std::uint64_t first, std::uint64_t count,
                       const std::uint8_t* data) const;

  void crash(Crash kind);
  bool crashed() const { return crashed_; }  // ever
  void closed();                             // cleanly: what was acknowledged is durable
  // The first reads after an open that nothing else disturbs: checks them, and from now on only
  // what was seen is there.
  std::string settle(std::uint64_t first, std::uint64_t count, const std::uint8_t* data);
  std::uint64_t hash() const;

 private:
  struct Unit {
    std::uint64_t floor = 0, acked = 0, issued = 0;
    std::uint64_t zeros = 0;        // the newest version that is zeros, and the one before
    std::uint64_t older_zeros = 0;  // kNone: none
  };
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};
  std::uint64_t units_per_sector() const { return kSectorSize / options_.unit; }
  Ticket acked(std::uint64_t first, std::uint64_t count) const;
  // Finds out what the unit holds; `low`: the oldest version allowed.
  std::string check(std::uint64_t unit, std::uint64_t low, const std::uint8_t* data,
                    Seen& seen) const;
  std::string complain(std::uint64_t unit, std::uint64_t low, const std::string& what) const;

  ModelOptions options_;
  std::vector<Unit> units_;
  std::uint64_t next_version_ = 1;
  bool crashed_ = false;
  bool on_medium_ = true;  // the last crash was a power loss: what is read is on the medium
};

}  // namespace pqblk::sim
