// The bytes of a sealed disk that are not QCOW2's own: one declaration of each structure.
//
// Room sealed/. This file mirrors docs/format.md, section by section; it computes nothing but sizes
// and field encodings. It knows neither keys nor I/O.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/endian.h"
#include "base/units.h"
#include "sealed/keys.h"

namespace pqblk::sealed {

inline constexpr std::uint32_t kFormatVersion = 1;
inline constexpr std::uint32_t kExtensionType = 0x50514231;  // "PQB1"
inline constexpr std::size_t kHeaderMacBytes = 512;          // the MAC covers bytes 0..511
inline constexpr std::uint64_t kPage = 4096;
inline constexpr std::uint32_t kClusterBitsMin = 12;
inline constexpr std::uint32_t kClusterBitsMax = 21;

using Mac32 = std::array<std::uint8_t, 32>;

// Section 1: payload of the header extension.
struct ExtensionRaw {
  Be32 format_version;
  Be32 reader_version;
  std::uint8_t suite;
  std::uint8_t kdf;
  std::uint8_t backing_policy;
  std::uint8_t zero0[5];
  std::uint8_t uuid[16];
  Be64 key_area[2];
  Be32 key_area_length;
  Be32 zero1;
  Be64 session_table[2];
  Be32 session_table_length;
  Be32 zero2;
  Be64 log_offset;
  Be64 log_length;
  std::uint8_t backing_uuid[16];
  std::uint8_t reserved[248];
  std::uint8_t mac[32];
};
static_assert(sizeof(ExtensionRaw) == 392);
static_assert(offsetof(ExtensionRaw, uuid) == 16 && offsetof(ExtensionRaw, key_area) == 32);
static_assert(offsetof(ExtensionRaw, session_table) == 56 &&
              offsetof(ExtensionRaw, log_offset) == 80);
static_assert(offsetof(ExtensionRaw, backing_uuid) == 96 && offsetof(ExtensionRaw, mac) == 360);

inline constexpr std::size_t kExtensionAt = 112 + 8;  // payload's offset in the file
static_assert(kExtensionAt + sizeof(ExtensionRaw) == kHeaderMacBytes);

// Section 3: session table.
inline constexpr std::size_t kSessionEntryBytes = 128;
inline constexpr std::uint64_t kSessionTableMax = 64 * kMiB;  // one copy
inline constexpr std::uint32_t kSessionIdMax = (1u << 30) - 1;

struct SessionHeadRaw {
  std::uint8_t magic[8];
  Be32 version;
  Be32 high_water;
  std::uint8_t zero[80];
  std::uint8_t mac[32];
};
static_assert(sizeof(SessionHeadRaw) == kSessionEntryBytes);

struct SessionEntryRaw {
  Be32 id;
  Be32 epoch;
  Be64 created;
  std::uint8_t salt[32];
  std::uint8_t zero[48];
  std::uint8_t mac[32];
};
static_assert(sizeof(SessionEntryRaw) == kSessionEntryBytes);
inline constexpr char kSessionMagic[] = "PQBLKSES";

// Section 4: sector entries.
enum class State : std::uint8_t { never = 0, data = 1, zero = 2 };

struct Entry {
  std::uint8_t tag[16];
  std::uint8_t nonce[12];
  Be32 word;

  static Entry never() {
    Entry e;
    std::memset(&e, 0, sizeof e);
    return e;
  }
  static Entry zero() {
    Entry e = never();
    e.word = static_cast<std::uint32_t>(State::zero) << 30;
    return e;
  }
  // What stands for a malformed entry in memory: data of a session that never is, so it cannot be
  // opened, and whoever overwrites it need not know.
  static Entry malformed() {
    Entry e = never();
    e.word = static_cast<std::uint32_t>(State::data) << 30;
    return e;
  }
  void set(State state, std::uint32_t session) {
    word = (static_cast<std::uint32_t>(state) << 30) | session;
  }
  // The state as stored; 3 is not a state and is_valid() refuses it.
  State state() const { return static_cast<State>(word.get() >> 30); }
  std::uint32_t session() const { return word.get() & kSessionIdMax; }
  bool operator==(const Entry& o) const { return std::memcmp(this, &o, sizeof *this) == 0; }
  // Never and zero entries are exactly their canonical bytes.
  bool is_valid() const {
    if (state() == State::data) return session() != 0;
    return *this == never() || *this == zero();
  }
};
static_assert(sizeof(Entry) == 32);
static_assert(kSectorSize == 4096, "SealedGeometry shifts by what follows from these two");

inline constexpr std::uint32_t kEntriesPerPage = static_cast<std::uint32_t>(kPage / sizeof(Entry));

// Section 4: where sectors and their entries live.
struct EntryPlace {
  Slot slot;                 // of the entry cluster
  std::uint64_t offset = 0;  // bytes within it
};

struct SealedGeometry {
  std::uint32_t cluster_bits = 16;
  std::uint64_t size = 0;  // guest bytes

  // n, e and d of the specification: a table's entries, those of them that map entry clusters (one
  // in 128), and the others. All but d are powers of two, and d is 127 * e: hot paths divide by a
  // constant or shift.
  std::uint64_t cluster_size() const { return std::uint64_t{1} << cluster_bits; }
  std::uint64_t table_entries() const { return cluster_size() / 8; }                  // n
  std::uint64_t entry_clusters() const { return table_entries() / 128; }              // e
  std::uint64_t data_clusters() const { return table_entries() - entry_clusters(); }  // d
  std::uint64_t sectors_per_cluster() const { return cluster_size() / kSectorSize; }
  std::uint64_t sectors() const { return div_ceil<std::uint64_t>(size, kSectorSize); }
  std::uint64_t clusters() const { return div_ceil<std::uint64_t>(size, cluster_size()); }
  std::uint64_t l1_entries() const { return div_ceil(clusters(), data_clusters()); }
  std::uint64_t entries_per_cluster() const { return cluster_size() / sizeof(Entry); }

  ClusterIndex cluster_of(Sector s) const { return {s.value >> (cluster_bits - kSectorShift)}; }
  std::uint64_t offset_in_cluster(Sector s) const {
    return (s.value << kSectorShift) & (cluster_size() - 1);
  }
  std::uint64_t table_of(ClusterIndex c) const { return (c.value >> (cluster_bits - 10)) / 127; }
  Slot data_slot(ClusterIndex c) const {  // the tables before it, and their entry clusters' slots
    return {c.value + (table_of(c) << (cluster_bits - 10))};
  }
  EntryPlace entry_place(Sector s) const {
    const ClusterIndex c = cluster_of(s);
    const std::uint64_t table = table_of(c);
    // Position of the sector among those of its table.
    const std::uint64_t position = s.value - table * sectors_per_table();
    const std::uint64_t index = position >> (cluster_bits - 5);
    return {{(table << (cluster_bits - 3)) + data_clusters() + index},
            (position << 5) & (cluster_size() - 1)};
  }
  Slot entry_slot(Sector s) const { return entry_place(s).slot; }
  std::uint64_t entry_offset(Sector s) const { return entry_place(s).offset; }
  bool is_entry_slot(Slot slot) const { return slot.value % table_entries() >= data_clusters(); }
  // The cluster of a data slot, and the first sector whose entry lies in an entry slot.
  ClusterIndex cluster_of_slot(Slot slot) const {
    return {slot.value / table_entries() * data_clusters() + slot.value % table_entries()};
  }
  Sector first_sector_of_entry_slot(Slot slot) const {
    const std::uint64_t l1 = slot.value / table_entries();
    const std::uint64_t index = slot.value % table_entries() - data_clusters();
    return {l1 * data_clusters() * sectors_per_cluster() + index * entries_per_cluster()};
  }
  // One past the last sector whose entry lies in an entry slot; the last entry clusters of a table
  // are not full, or hold nothing, because a table maps d data clusters only.
  Sector end_sector_of_entry_slot(Slot slot) const {
    const std::uint64_t end = first_sector_of_entry_slot(slot).value + entries_per_cluster();
    const std::uint64_t table_end = (slot.value / table_entries() + 1) * sectors_per_table();
    return {end < table_end ? end : table_end};
  }
  // The same for the entry slot of a sector, without a division.
  Sector end_of_entry_cluster(Sector s) const {
    const std::uint64_t begin = table_of(cluster_of(s)) * sectors_per_table();
    const std::uint64_t end = ((s.value - begin) | (entries_per_cluster() - 1)) + 1;
    return {begin + (end < sectors_per_table() ? end : sectors_per_table())};
  }

 private:
  std::uint64_t sectors_per_table() const {
    return data_clusters() << (cluster_bits - kSectorShift);
  }
};

// Section 5: key area.
struct KeyAreaHeadRaw {
  std::uint8_t magic[8];
  Be64 number;
  Be32 blob_length;
  std::uint8_t zero[12];
  std::uint8_t checksum[32];
};
static_assert(sizeof(KeyAreaHeadRaw) == 64);
inline constexpr char kKeyAreaMagic[] = "PQBLKKEY";
inline constexpr std::uint64_t kKeyAreaCopyBytes = kPage + 64 * kKiB;

// Section 6: log.
struct LogHeaderRaw {
  std::uint8_t magic[8];
  Be64 serial;
  std::uint8_t log_uuid[16];
  Be64 generation;
  Be32 session;
  Be32 zero0;
  Be64 tail_page;
  Be64 tail_sequence;
  std::uint8_t previous_mac[16];
  std::uint8_t zero1[48];
  std::uint8_t mac[32];
};
static_assert(sizeof(LogHeaderRaw) == 160 && offsetof(LogHeaderRaw, mac) == 128);
inline constexpr char kLogMagic[] = "PQBLKLOG";
inline constexpr std::uint64_t kLogHeadBytes = 2 * kPage;
inline constexpr std::uint64_t kLogMinBytes = 256 * kKiB;
inline constexpr std::uint64_t kLogMaxBytes = 4 * kGiB;

struct LogBlockRaw {
  std::uint8_t magic[4];
  Be16 header_pages;
  Be16 flags;
  std::uint8_t log_uuid[16];
  Be64 generation;
  Be32 session;
  Be32 payload_pages;
  Be64 sequence;
  Be64 covered;
  Be32 record_count;
  Be32 record_bytes;
  std::uint8_t previous_mac[16];
  std::uint8_t mac[16];
};
static_assert(sizeof(LogBlockRaw) == 96 && offsetof(LogBlockRaw, mac) == 80);
inline constexpr char kBlockMagic[] = "PQLB";
inline constexpr std::uint16_t kBlockSkip = 1;
inline constexpr std::uint32_t kBlockHeaderPagesMax = 4;
inline constexpr std::uint32_t kBlockPayloadPagesMax = 256;  // of other than skip blocks
inline constexpr std::uint32_t kBlockRecordBytesMax =
    static_cast<std::uint32_t>(kBlockHeaderPagesMax * kPage - sizeof(LogBlockRaw));

enum class RecordType : std::uint8_t { w = 1, wd = 2, z = 3, map = 4 };
enum class MapKind : std::uint8_t { data = 0, entry = 1 };

struct RecordW {  // W and WD
  std::uint8_t type;
  std::uint8_t zero[3];
  Be32 payload;  // WD: page index in the block; W: zero
  Be64 sector;
  Entry entry;
};
static_assert(sizeof(RecordW) == 48);

struct RecordZ {
  std::uint8_t type;
  std::uint8_t zero[7];
  Be64 first;
  Be64 count;
};
static_assert(sizeof(RecordZ) == 24);

struct RecordMap {
  std::uint8_t type;
  std::uint8_t kind;
  std::uint8_t zero[6];
  Be64 slot;
  Be64 new_entry;
  Be64 old_entry;
};
static_assert(sizeof(RecordMap) == 32);

// L2 entries as the log and the overlay see them (QCOW2 specification, "L2 table entry").
inline constexpr std::uint64_t kL2Copied = std::uint64_t{1} << 63;
inline constexpr std::uint64_t kL2Zero = 1;
inline constexpr std::uint64_t kL2OffsetMask = 0x00fffffffffffe00;
constexpr std::uint64_t l2_host(std::uint64_t entry) { return entry & kL2OffsetMask; }

}  // namespace pqblk::sealed
