// Internal snapshots, read over: the table is parsed and checked so that our writes leave what it
// refers to alone.
//
// Room format/qcow2. Spec: "Snapshots".
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/endian.h"
#include "base/error.h"
#include "base/task.h"
#include "format/qcow2/header.h"
#include "format/qcow2/meta_io.h"

namespace pqblk::format::qcow2 {

struct SnapshotRecord {  // fixed part of a table entry
  Be64 l1_table_offset;
  Be32 l1_size;
  Be16 id_size;
  Be16 name_size;
  Be32 date_sec;
  Be32 date_nsec;
  Be64 vm_clock_nsec;
  Be32 vm_state_size;
  Be32 extra_data_size;
};
static_assert(sizeof(SnapshotRecord) == 40);

struct Snapshot {
  std::string id;
  std::string name;
  HostOffset l1_offset;
  std::uint32_t l1_size = 0;
  std::uint64_t disk_size = 0;  // bytes; 0 when the entry does not say (version 2)
  std::uint64_t vm_state_size = 0;
  std::uint32_t date_sec = 0;
};

// Parses `count` entries from the table's bytes. `table_bytes` receives the length used.
Result<std::vector<Snapshot>> parse_snapshots(std::span<const std::uint8_t> bytes,
                                              const Header& header, std::uint64_t file_size,
                                              std::uint64_t& table_bytes);

Task<Result<std::vector<Snapshot>>> load_snapshots(io::Queue& q, MetaIo& meta, const Header& header,
                                                   std::uint64_t& table_bytes);

}  // namespace pqblk::format::qcow2
