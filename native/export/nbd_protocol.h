// The NBD protocol as bytes: numbers and wire structures.
//
// Room export/. Section names are those of the NBD specification (doc/proto.md of the project
// NetworkBlockDevice/nbd). Every number on the wire is big-endian. Nothing here acts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/endian.h"
#include "base/units.h"

namespace pqblk::exports::nbd {

// ---- limits of this server ----
inline constexpr std::uint32_t kPayloadMax = 32 * kMiB;  // of one read or write: "maximum size"
inline constexpr std::uint32_t kPreferredBlock = 4096;
inline constexpr std::uint32_t kMinimumBlock = 1;         // any offset and length is served
inline constexpr std::uint32_t kNameMax = 4096;           // of an export; "Values", strings
inline constexpr std::uint32_t kOptionMax = 64 * kKiB;    // data of one option; longer is skipped
inline constexpr std::uint32_t kOptionsMax = 256;         // of one negotiation
inline constexpr std::uint32_t kQueriesMax = 64;          // of one meta context option
inline constexpr std::uint32_t kStatusExtentsMax = 1024;  // of one block status reply

// ---- "Newstyle negotiation" ----
inline constexpr std::uint64_t kGreetingMagic = 0x4e42444d41474943;  // "NBDMAGIC"
inline constexpr std::uint64_t kOptionMagic = 0x49484156454f5054;    // "IHAVEOPT"
inline constexpr std::uint64_t kOptionReplyMagic = 0x0003e889045565a9;
inline constexpr std::size_t kExportNamePadding = 124;

enum HandshakeFlag : std::uint16_t { kFixedNewstyle = 1 << 0, kNoZeroes = 1 << 1 };

enum class Option : std::uint32_t {
  export_name = 1,
  abort = 2,
  list = 3,
  starttls = 5,
  info = 6,
  go = 7,
  structured_reply = 8,
  list_meta_context = 9,
  set_meta_context = 10,
};

enum class OptionReply : std::uint32_t {
  ack = 1,
  server = 2,
  info = 3,
  meta_context = 4,
  unsupported = 0x80000001,
  policy = 0x80000002,
  invalid = 0x80000003,
  tls_required = 0x80000005,
  unknown = 0x80000006,
  too_big = 0x80000009,
};

enum class Info : std::uint16_t { export_info = 0, name = 1, description = 2, block_size = 3 };

enum TransmissionFlag : std::uint16_t {
  kHasFlags = 1 << 0,
  kReadOnly = 1 << 1,
  kSendFlush = 1 << 2,
  kSendFua = 1 << 3,
  kSendTrim = 1 << 5,
  kSendWriteZeroes = 1 << 6,
  kSendDf = 1 << 7,
  kCanMultiConn = 1 << 8,
  kSendCache = 1 << 10,
  kSendFastZero = 1 << 11,
};

struct Greeting {
  Be64 magic, option_magic;
  Be16 flags;
};
static_assert(sizeof(Greeting) == 18);

struct OptionHeader {
  Be64 magic;
  Be32 option, length;
};
static_assert(sizeof(OptionHeader) == 16);

struct OptionReplyHeader {
  Be64 magic;
  Be32 option, type, length;
};
static_assert(sizeof(OptionReplyHeader) == 20);

// ---- "Transmission" ----
inline constexpr std::uint32_t kRequestMagic = 0x25609513;
inline constexpr std::uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr std::uint32_t kChunkMagic = 0x668e33ef;

enum class Command : std::uint16_t {
  read = 0,
  write = 1,
  disconnect = 2,
  flush = 3,
  trim = 4,
  cache = 5,
  write_zeroes = 6,
  block_status = 7,
};
inline constexpr std::size_t kCommands = 8;

enum CommandFlag : std::uint16_t {
  kFua = 1 << 0,
  kNoHole = 1 << 1,
  kDf = 1 << 2,
  kReqOne = 1 << 3,
  kFastZero = 1 << 4,
};

enum class Chunk : std::uint16_t {
  none = 0,
  offset_data = 1,
  offset_hole = 2,
  block_status = 5,
  error = 0x8001,
};
inline constexpr std::uint16_t kChunkDone = 1;

inline constexpr std::uint32_t kBaseAllocation = 1;  // the id this server gives to the context
enum AllocationState : std::uint32_t { kStateHole = 1 << 0, kStateZero = 1 << 1 };

// "Error values"
enum class Errno : std::uint32_t {
  ok = 0,
  perm = 1,
  io = 5,
  no_memory = 12,
  invalid = 22,
  no_space = 28,
  overflow = 75,
  not_supported = 95,
  shutdown = 108,
};

struct RequestHeader {
  Be32 magic;
  Be16 flags, type;
  Be64 cookie, offset;
  Be32 length;
};
static_assert(sizeof(RequestHeader) == 28);

struct SimpleReply {
  Be32 magic, error;
  Be64 cookie;
};
static_assert(sizeof(SimpleReply) == 16);

struct ChunkHeader {
  Be32 magic;
  Be16 flags, type;
  Be64 cookie;
  Be32 length;
};
static_assert(sizeof(ChunkHeader) == 20);

struct DataChunk {
  ChunkHeader header;
  Be64 offset;
};
static_assert(sizeof(DataChunk) == 28);

struct HoleChunk {
  ChunkHeader header;
  Be64 offset;
  Be32 length;
};
static_assert(sizeof(HoleChunk) == 32);

struct StatusEntry {
  Be32 length, flags;
};
static_assert(sizeof(StatusEntry) == 8);

struct ErrorChunk {  // followed by the message
  ChunkHeader header;
  Be32 error;
  Be16 message_length;
};
static_assert(sizeof(ErrorChunk) == 26);

}  // namespace pqblk::exports::nbd
