// The keys of one volume as bytes: how a process that unlocked them hands them to one that did not.
//
// Room sealed/. docs/handing-keys.md has the format of the bundle and of the conversation with an
// agent. Bundles and requests come from other processes and are checked as untrusted bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/endian.h"
#include "base/error.h"
#include "sealed/keys.h"

namespace pqblk::sealed {

inline constexpr std::uint16_t kBundleVersion = 1;
// The state of the key area comes last. Written only where the keys have one.
inline constexpr std::uint16_t kBundleVersionBound = 2;
inline constexpr std::uint16_t kTalkVersion = 1;  // requests and refusals
inline constexpr std::size_t kBundleEpochsMax = 64;

struct BundleHead {
  std::uint8_t magic[8];  // "PQBLKBND"
  Le16 version, epochs;
  Le32 current_epoch;
  std::uint8_t uuid[16];
  std::uint8_t integrity[32];
};
static_assert(sizeof(BundleHead) == 64);

struct BundleEpoch {
  Le32 epoch, zero;
  std::uint8_t key[32];
};
static_assert(sizeof(BundleEpoch) == 40);

inline constexpr std::size_t kBundleBytesMax =
    sizeof(BundleHead) + kBundleEpochsMax * sizeof(BundleEpoch) + kKeyAreaStateBytes;

// What a client sends to an agent, once.
struct AgentRequest {
  std::uint8_t magic[8];  // "PQBLKASK"
  Le16 version, zero;
  Le32 more_zero;
  std::uint8_t uuid[16];
};
static_assert(sizeof(AgentRequest) == 32);

enum class Refusal : std::uint16_t { other_volume = 1, not_understood = 2 };

// What an agent answers when it does not send the bundle.
struct AgentRefusal {
  std::uint8_t magic[8];  // "PQBLKREF"
  Le16 version, reason;
  Le32 zero;
};
static_assert(sizeof(AgentRefusal) == 16);

// Memory for a bundle in the clear: out of core dumps, locked where the limit allows, wiped at the
// end.
class BundleMemory {
 public:
  static Result<BundleMemory> make();
  BundleMemory(BundleMemory&& other) noexcept;
  BundleMemory& operator=(BundleMemory&&) = delete;
  ~BundleMemory();
  std::span<std::uint8_t, kBundleBytesMax> bytes() const {
    return std::span<std::uint8_t, kBundleBytesMax>(data_, kBundleBytesMax);
  }

 private:
  explicit BundleMemory(std::uint8_t* data) : data_(data) {}
  std::uint8_t* data_;
};

struct KeyBundle {
  Uuid uuid{};
  VolumeKeys keys;
};

// Kind::invalid_argument: no epoch or too many, one twice, the current one is missing, or a state
// of another size.
Error check_keys(const VolumeKeys& keys);

// Bytes written to `out`. Kinds of check_keys.
Result<std::size_t> write_bundle(const Uuid& uuid, const VolumeKeys& keys,
                                 std::span<std::uint8_t, kBundleBytesMax> out);

// Bytes of the bundle that begins with `head`. Kinds: corrupt, unsupported (a later version).
Result<std::size_t> bundle_bytes(std::span<const std::uint8_t, sizeof(BundleHead)> head);

// All of `bytes`; copies every secret. Kinds: corrupt, unsupported, no_memory.
Result<KeyBundle> parse_bundle(std::span<const std::uint8_t> bytes);

AgentRequest make_request(const Uuid& uuid);
// The volume that is asked for. Kind::corrupt.
Result<Uuid> parse_request(const AgentRequest& request);
AgentRefusal make_refusal(Refusal reason);
// False: not a refusal. `bytes` is what the answer begins with.
bool is_refusal(std::span<const std::uint8_t, sizeof(AgentRefusal)> bytes, Refusal& reason);

}  // namespace pqblk::sealed
