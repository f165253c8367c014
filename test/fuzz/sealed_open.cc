// Fuzzes whole sealed images: a real image, closed or left behind by a crash, is damaged as the
// input says, opened, read, written and closed. What must hold: no crash, no hang; a sector reads
// as something that was once written to it, as zeros, or not at all; what is written now is read
// now.
//
// An input is a byte of choices, then patches of 5 bytes: area, place (2 bytes), how, value.

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <set>
#include <vector>

#include "base/aligned.h"
#include "image/sealed_backend.h"
#include "memory_queue.h"

using namespace pqblk;
using namespace pqblk::image;
using namespace pqblk::sealed;

namespace {

constexpr std::uint64_t kSectors = 48;
constexpr std::uint32_t kClusterBits = 13;
constexpr std::size_t kPatchBytes = 5;
constexpr std::size_t kPatchesMax = 64;

enum Choice : std::uint8_t { kDirty = 1, kSign = 2, kReadOnly = 4 };

crypto::SecretKey key_of(std::uint8_t fill) {
  std::array<std::uint8_t, 32> bytes;
  bytes.fill(fill);
  return std::move(*crypto::SecretKey::copy_of(bytes));
}

VolumeKeys keys() {
  VolumeKeys k;
  k.integrity = key_of(1);
  k.data.push_back({1, key_of(2)});
  k.current_epoch = 1;
  return k;
}

constexpr Uuid kUuid{1, 2, 3};

SealedOptions how_to_open(bool read_only) {
  SealedOptions o;
  o.keys = keys();
  o.expected_uuid = kUuid;
  o.read_only = read_only;
  o.limits.l2_cache = 64 * kKiB;
  o.limits.entry_cache = 64 * kKiB;
  o.limits.pending_data = 64 * kKiB;
  o.rest_ns = 0;  // what a log holds is what recovery is tried with
  return o;
}

// A sector's whole content is one byte, repeated.
Error write_sector(fuzz::MemoryQueue& q, QueueContext& c, Backend& disk, std::uint64_t sector,
                   std::uint8_t fill) {
  AlignedBuffer buffer(kSectorSize);
  std::fill_n(buffer.data(), kSectorSize, fill);
  iovec iov{buffer.data(), kSectorSize};
  return q.run(disk.write(c, {sector * kSectorSize}, {{&iov, 1}, 0, kSectorSize}, false));
}

// The byte, or -1 when the sector does not read. A mixed sector is a fault.
int read_sector(fuzz::MemoryQueue& q, QueueContext& c, Backend& disk, std::uint64_t sector) {
  AlignedBuffer buffer(kSectorSize);
  iovec iov{buffer.data(), kSectorSize};
  if (q.run(disk.read(c, {sector * kSectorSize}, {{&iov, 1}, 0, kSectorSize}))) return -1;
  const std::uint8_t* bytes = buffer.data();
  if (!std::all_of(bytes, bytes + kSectorSize, [&](std::uint8_t b) { return b == bytes[0]; })) {
    __builtin_trap();
  }
  return bytes[0];
}

struct Area {
  std::uint64_t at, length;
};

struct Specimen {
  std::vector<std::uint8_t> closed, dirty;
  std::array<std::set<int>, kSectors> ever;
  std::vector<Area> areas;
};

void write_history(fuzz::MemoryQueue& q, QueueContext& c, Backend& disk, Specimen& s, int from,
                   int to) {
  for (int fill = from; fill < to; ++fill) {
    for (std::uint64_t i = 0; i < 5; ++i) {
      const std::uint64_t sector = (static_cast<std::uint64_t>(fill) * 7 + i * i) % kSectors;
      if (write_sector(q, c, disk, sector, static_cast<std::uint8_t>(fill))) __builtin_trap();
      s.ever[sector].insert(fill);
    }
    if (fill % 3 == 0 && q.run(disk.flush(c))) __builtin_trap();
  }
  if (q.run(disk.discard(c, {8 * kSectorSize}, 3 * kSectorSize))) __builtin_trap();
}

std::unique_ptr<SealedBackend> open(fuzz::MemoryQueue& q, QueueContext& c, bool read_only) {
  auto opened = q.run(SealedBackend::open(c, q.file(), how_to_open(read_only)));
  return opened ? std::move(*opened) : nullptr;
}

Specimen make_specimen() {
  Specimen s;
  for (auto& versions : s.ever) versions.insert(0);
  fuzz::MemoryQueue q({});
  QueueContext c(q, 0);
  CreateOptions options;
  options.size = kSectors * kSectorSize;
  options.cluster_bits = kClusterBits;
  options.uuid = kUuid;
  options.log_bytes = kLogMinBytes;
  options.key_area.assign(kKeyAreaBytes, 0x5a);
  const VolumeKeys k = keys();
  if (q.run(create_image(q, q.file(), options, k))) __builtin_trap();
  q.reopen();
  auto disk = open(q, c, false);
  write_history(q, c, *disk, s, 1, 10);
  if (q.run(disk->close(c))) __builtin_trap();
  const Extension e = disk->extension();
  disk.reset();
  s.closed = q.bytes();
  q.reopen();
  disk = open(q, c, false);
  write_history(q, c, *disk, s, 10, 20);
  s.dirty = q.bytes();
  if (q.run(disk->close(c))) __builtin_trap();
  s.areas = {{0, 512},
             {e.log_offset, 64 * kPage},
             {e.session_table[0], 512},
             {e.session_table[1], 512},
             {e.key_area[0], kPage + 256},
             {e.key_area[1], kPage + 256},
             {512, s.dirty.size() - 512}};
  return s;
}

void damage(std::vector<std::uint8_t>& image, const Specimen& s, const std::uint8_t* data,
            std::size_t size) {
  for (std::size_t n = 0; n < kPatchesMax && size >= kPatchBytes; ++n) {
    const Area& area = s.areas[data[0] % s.areas.size()];
    // 16 bits reach every byte of a small area, and one byte of each 16 or so of the whole image.
    const std::uint64_t place = data[1] | std::uint64_t{data[2]} << 8;
    const std::uint64_t at =
        area.at + (area.length <= 0x10000 ? place % area.length : place * area.length / 0x10000);
    if (at < image.size()) {
      switch (data[3] % 4) {
        case 0:
          image[at] ^= data[4];
          break;
        case 1:
          image[at] = data[4];
          break;
        case 2:
          std::fill_n(&image[at], std::min<std::size_t>(512, image.size() - at), data[4]);
          break;
        default: {  // another page of the image comes here
          const std::uint64_t to = align_down<std::uint64_t>(at, kPage);
          const std::uint64_t from = data[4] % (image.size() / kPage) * kPage;
          std::copy_n(&image[from], std::min<std::size_t>(kPage, image.size() - to), &image[to]);
        }
      }
    }
    data += kPatchBytes;
    size -= kPatchBytes;
  }
}

void sign(std::vector<std::uint8_t>& image) {
  const VolumeKeys k = keys();
  auto mac = derive_mac_keys(k.integrity, kUuid);
  if (!mac) __builtin_trap();
  sign_header(*mac, std::span<std::uint8_t, kHeaderMacBytes>(image.data(), kHeaderMacBytes), "");
}

void expect_known(fuzz::MemoryQueue& q, QueueContext& c, Backend& disk,
                  const std::array<std::set<int>, kSectors>& ever) {
  const std::uint64_t sectors = std::min(kSectors, disk.geometry().size / kSectorSize);
  for (std::uint64_t i = 0; i < sectors; ++i) {
    const int seen = read_sector(q, c, disk, i);
    if (seen >= 0 && !ever[i].contains(seen)) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Specimen specimen = make_specimen();
  if (size == 0) return 0;
  const std::uint8_t choice = data[0];
  std::vector<std::uint8_t> image = (choice & kDirty) != 0 ? specimen.dirty : specimen.closed;
  damage(image, specimen, data + 1, size - 1);
  if ((choice & kSign) != 0) sign(image);
  fuzz::MemoryQueue q(std::move(image));
  QueueContext c(q, 0);
  static_cast<void>(q.run(read_public_info(q, q.file())));
  auto disk = open(q, c, (choice & kReadOnly) != 0);
  if (disk == nullptr) return 0;
  expect_known(q, c, *disk, specimen.ever);
  if ((choice & kReadOnly) == 0) {
    auto ever = specimen.ever;
    for (const std::uint64_t sector : {std::uint64_t{0}, std::uint64_t{9}, std::uint64_t{33}}) {
      if (sector >= disk->geometry().size / kSectorSize) continue;
      const bool written = !write_sector(q, c, *disk, sector, 0xee);
      ever[sector].insert(0xee);
      if (written && read_sector(q, c, *disk, sector) != 0xee) __builtin_trap();
    }
    const bool closed = !q.run(disk->close(c));
    disk.reset();
    q.reopen();
    if (!closed) return 0;
    disk = open(q, c, true);
    if (disk == nullptr) return 0;
    expect_known(q, c, *disk, ever);
  }
  static_cast<void>(q.run(disk->close(c)).ok());
  return 0;
}
