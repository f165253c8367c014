// Reading a log back: from the tail, block by block, up to the first that does not authenticate.
//
// Room sealed/. Parsing is pure (bytes in, records out) and is fuzzed; every byte is hostile until
// the block's MAC holds, and every field is checked all the same. docs/format.md, section 6.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/task.h"
#include "io/queue.h"
#include "sealed/extension.h"
#include "sealed/layout.h"
#include "sealed/log.h"
#include "sealed/sessions.h"

namespace pqblk::sealed {

struct LogRecord {
  RecordType type = RecordType::w;
  std::uint64_t sequence = 0;
  Sector sector;            // w, wd, z (first)
  std::uint64_t count = 1;  // z
  Entry entry = Entry::never();
  std::uint64_t place = 0;  // wd: host offset of the ciphertext
  Slot slot;                // map
  std::uint64_t new_entry = 0;
  std::uint64_t old_entry = 0;
};

struct BlockView {
  LogBlockRaw raw;
  std::uint32_t header_pages = 0;
  std::uint32_t payload_pages = 0;  // written after the header pages (0 for a skip block)
  std::uint32_t total_pages = 0;
  std::vector<LogRecord> records;  // sequence set; place = payload page index for wd
};

// Structure of one block; `pages` holds its header pages at least. No authentication.
Result<BlockView> parse_block(std::span<const std::uint8_t> pages, std::uint64_t pages_to_end,
                              const SealedGeometry& geometry);

struct LogScan {
  std::vector<LogRecord> records;  // in order
  std::uint64_t covered = 0;
  std::uint64_t blocks = 0;
  std::uint64_t next = 0;  // sequence number of the first block that was not found
};

// `session` is the keys of header.session. An empty log (session 0) scans as nothing.
Task<Result<LogScan>> scan_log(io::Queue& io, const io::File& file, const Extension& extension,
                               const LogHeader& header, const SealedGeometry& geometry,
                               Sessions& sessions);

// What the ring's first page says beside a log header whose other copy is missing. Blocks begin
// there: a generation's first one, and the first of each further round.
enum class Ahead : std::uint8_t {
  nothing,  // that this header would not lead to
  begin,    // of the next generation, which its first block names as the lost copy did
  lost,     // a newer generation, of which no more is known
  round,    // this generation, further on than the header's tail: lost where nothing follows that
};
struct LogAhead {
  Ahead what = Ahead::nothing;
  LogHeader begin;  // with the serial of the copy that was found: the next one takes the lost place
};
Task<Result<LogAhead>> look_ahead(io::Queue& io, const io::File& file, const Extension& extension,
                                  const LogHeader& header, const SealedGeometry& geometry,
                                  Sessions& sessions);

// Whether blocks of the ring show that a log is more than what was found of it, `next` being the
// first block that was not: they say that it was durable, or one of a newer generation.
Task<Result<bool>> shows_more(io::Queue& io, const io::File& file, const Extension& extension,
                              const LogHeader& header, std::uint64_t next,
                              const SealedGeometry& geometry, Sessions& sessions);

// AAD of a sector (docs/format.md, section 4).
struct SectorAad {
  std::uint8_t bytes[36];
  SectorAad(const Uuid& uuid, Sector s, std::uint32_t session, State state);
  std::span<const std::uint8_t> span() const { return bytes; }
};

// Opens a sector; `plain` may be the place of `ciphertext`. Kind::integrity when it does not open
// under this entry; any other error says nothing about that. `keys` serves the next sector too.
Error open_sector(Sessions& sessions, const Uuid& uuid, Sector s, const Entry& entry,
                  const std::uint8_t* ciphertext, std::uint8_t* plain, KeyLease& keys);

// Does this ciphertext open under this entry? `scratch` (4096 bytes) receives plaintext and is
// wiped.
Result<bool> sector_opens(Sessions& sessions, const Uuid& uuid, Sector s, const Entry& entry,
                          const std::uint8_t* ciphertext, std::uint8_t* scratch, KeyLease& keys);

}  // namespace pqblk::sealed
