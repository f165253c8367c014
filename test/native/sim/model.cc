#include "sim/model.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "sim/pages.h"

namespace pqblk::sim {
namespace {

constexpr std::uint64_t kMagic = 0x5051424c4b53494dU;  // "PQBLKSIM"

struct Stamp {
  std::uint64_t magic, sector, block, version;
};

void fill_block(std::uint8_t* out, const Stamp& stamp) {
  std::uint64_t words[kPatternBlock / 8];
  std::memcpy(words, &stamp, sizeof stamp);
  std::uint64_t state = mix64(stamp.sector * 8 + stamp.block + (stamp.version << 32));
  for (std::size_t i = sizeof stamp / 8; i < kPatternBlock / 8; ++i) {
    state = state * 0x5851f42d4c957f2dU + 0x14057b7ef767814fU;
    words[i] = state ^ (state >> 31);
  }
  std::memcpy(out, words, sizeof words);
}

}  // namespace

void fill_sector(std::uint8_t* out, std::uint64_t sector, std::uint64_t version) {
  for (std::uint32_t b = 0; b < kBlocksPerSector; ++b) {
    fill_block(out + b * kPatternBlock, {kMagic, sector, b, version});
  }
}

std::string Seen::text() const {
  if (what == What::zeros) return "zeros";
  if (what == What::garbage) return "garbage";
  return "version " + std::to_string(version) + " of sector " + std::to_string(sector) + " block " +
         std::to_string(block);
}

Seen look_at_block(const std::uint8_t* block) {
  static constexpr std::uint8_t kZeros[kPatternBlock] = {};
  Stamp stamp;
  std::memcpy(&stamp, block, sizeof stamp);
  if (stamp.magic == 0 && std::memcmp(block, kZeros, kPatternBlock) == 0) {
    return {.what = Seen::What::zeros};
  }
  if (stamp.magic != kMagic || stamp.block >= kBlocksPerSector) return {};
  std::uint8_t expected[kPatternBlock];
  fill_block(expected, stamp);
  if (std::memcmp(block, expected, kPatternBlock) != 0) return {};
  return {Seen::What::data, stamp.sector, static_cast<std::uint32_t>(stamp.block), stamp.version};
}

Model::Model(const ModelOptions& options) : options_(options) {
  assert(options.unit == kSectorSize || options.unit == kPatternBlock);
  Unit fresh;
  fresh.zeros = options.backed ? kNone : 0;
  fresh.older_zeros = kNone;
  units_.assign(options.sectors * units_per_sector(), fresh);
}

std::uint64_t Model::begin(std::uint64_t first, std::uint64_t count, bool zeros) {
  const std::uint64_t version = next_version_++;
  const std::uint64_t per = units_per_sector();
  for (std::uint64_t u = first * per; u < (first + count) * per; ++u) {
    Unit& unit = units_[u];
    unit.issued = version;
    if (zeros) {
      unit.older_zeros = unit.zeros;
      unit.zeros = version;
    }
  }
  return version;
}

void Model::acknowledge(std::uint64_t version, std::uint64_t first, std::uint64_t count,
                        bool durable) {
  const std::uint64_t per = units_per_sector();
  for (std::uint64_t u = first * per; u < (first + count) * per; ++u) {
    units_[u].acked = std::max(units_[u].acked, version);
    if (durable) units_[u].floor = std::max(units_[u].floor, version);
  }
}

Model::Ticket Model::acked(std::uint64_t first, std::uint64_t count) const {
  const std::uint64_t per = units_per_sector();
  Ticket ticket;
  ticket.reserve(count * per);
  for (std::uint64_t u = first * per; u < (first + count) * per; ++u) {
    ticket.push_back(units_[u].acked);
  }
  return ticket;
}

void Model::end_flush(const Ticket& ticket) {
  assert(ticket.size() == units_.size());
  for (std::size_t u = 0; u < units_.size(); ++u) {
    units_[u].floor = std::max(units_[u].floor, ticket[u]);
  }
}

std::string Model::complain(std::uint64_t unit, std::uint64_t low, const std::string& what) const {
  const Unit& u = units_[unit];
  std::string text = "sector " + std::to_string(unit / units_per_sector());
  if (units_per_sector() > 1) text += " block " + std::to_string(unit % units_per_sector());
  text += " reads as " + what + "; allowed are versions " + std::to_string(low) + " to " +
          std::to_string(u.issued) + " (flushed " + std::to_string(u.floor) + ", acknowledged " +
          std::to_string(u.acked) + ")";
  if (u.zeros != kNone && u.zeros >= low) text += ", of them zeros " + std::to_string(u.zeros);
  return text;
}

std::string Model::check(std::uint64_t unit, std::uint64_t low, const std::uint8_t* data,
                         Seen& seen) const {
  const std::uint64_t sector = unit / units_per_sector();
  const auto first_block =
      static_cast<std::uint32_t>(unit % units_per_sector() * (options_.unit / kPatternBlock));
  seen = look_at_block(data);
  for (std::uint32_t b = 0; b < options_.unit / kPatternBlock; ++b) {
    const Seen block = look_at_block(data + b * kPatternBlock);
    const bool same = block.what == seen.what && block.version == seen.version;
    if (!same) return complain(unit, low, "a mix of " + seen.text() + " and " + block.text());
    if (block.what != Seen::What::data) continue;
    if (block.sector != sector || block.block != first_block + b) {
      return complain(unit, low, block.text());
    }
  }
  const Unit& u = units_[unit];
  if (seen.what == Seen::What::garbage) return complain(unit, low, "garbage");
  if (seen.what == Seen::What::zeros) {
    if (u.zeros != kNone && u.zeros >= low) return {};
    return complain(unit, low, "zeros");
  }
  const bool exists = seen.version != 0 || options_.backed;
  if (exists && seen.version >= low && seen.version <= u.issued) return {};
  return complain(unit, low, seen.text());
}

std::string Model::end_read(const Ticket& ticket, std::uint64_t first, std::uint64_t count,
                            const std::uint8_t* data) const {
  const std::uint64_t per = units_per_sector();
  assert(ticket.size() == count * per);
  for (std::uint64_t i = 0; i < count * per; ++i) {
    Seen seen;
    std::string wrong = check(first * per + i, ticket[i], data + i * options_.unit, seen);
    if (!wrong.empty()) return wrong;
  }
  return {};
}

void Model::crash(Crash kind) {
  crashed_ = true;
  on_medium_ = kind == Crash::power_loss;
  if (kind == Crash::kill && options_.kill_keeps) return;
  for (Unit& unit : units_) unit.acked = unit.floor;
}

void Model::closed() {
  for (Unit& unit : units_) unit.floor = unit.acked;
}

std::string Model::settle(std::uint64_t first, std::uint64_t count, const std::uint8_t* data) {
  const std::uint64_t per = units_per_sector();
  const bool durable = options_.open_is_durable || on_medium_;
  for (std::uint64_t i = 0; i < count * per; ++i) {
    Unit& unit = units_[first * per + i];
    Seen seen;
    std::string wrong = check(first * per + i, unit.acked, data + i * options_.unit, seen);
    if (!wrong.empty()) return wrong;
    const bool zeros = seen.what == Seen::What::zeros;
    unit.acked = unit.issued = zeros ? unit.zeros : seen.version;
    if (!zeros && unit.zeros != kNone && unit.zeros > seen.version) {
      const bool known = unit.older_zeros == kNone || unit.older_zeros <= seen.version;
      unit.zeros = known ? unit.older_zeros : unit.floor;  // unknown: do not complain of zeros
    }
    if (durable) unit.floor = unit.acked;
  }
  return {};
}

std::uint64_t Model::hash() const {
  // Units without history are alike; the hash is of those that were touched.
  std::uint64_t sum = on_medium_ ? 1 : 2;
  for (std::size_t i = 0; i < units_.size(); ++i) {
    const Unit& u = units_[i];
    if (u.issued == 0) continue;
    sum += mix64(mix64(mix64(mix64(i + 1) + u.floor) + u.acked) + u.issued * 0x9e3779b9U + u.zeros);
  }
  return sum;
}

}  // namespace pqblk::sim
