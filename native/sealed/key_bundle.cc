#include "sealed/key_bundle.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace pqblk::sealed {
namespace {

constexpr char kBundleMagic[] = "PQBLKBND";
constexpr char kRequestMagic[] = "PQBLKASK";
constexpr char kRefusalMagic[] = "PQBLKREF";
constexpr std::size_t kMagicBytes = 8;

bool has_magic(const std::uint8_t* bytes, const char* magic) {
  return std::memcmp(bytes, magic, kMagicBytes) == 0;
}

Error bad(std::string message) {
  return Error(Kind::corrupt, std::move(message)).at("read key bundle");
}

std::vector<const DataKey*> by_epoch(const VolumeKeys& keys) {
  std::vector<const DataKey*> sorted;
  for (const DataKey& key : keys.data) sorted.push_back(&key);
  std::sort(sorted.begin(), sorted.end(),
            [](const DataKey* a, const DataKey* b) { return a->epoch < b->epoch; });
  return sorted;
}

}  // namespace

// ---- memory ----

Result<BundleMemory> BundleMemory::make() {
  void* const data =
      ::mmap(nullptr, kBundleBytesMax, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return Error::from_errno(errno, "map secret memory");
  // Best effort, as for every secret: a limit or an old kernel does not make keys unusable.
  static_cast<void>(::mlock(data, kBundleBytesMax));
  ::madvise(data, kBundleBytesMax, MADV_DONTDUMP);
  ::madvise(data, kBundleBytesMax, MADV_WIPEONFORK);
  return BundleMemory(static_cast<std::uint8_t*>(data));
}

BundleMemory::BundleMemory(BundleMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)) {}

BundleMemory::~BundleMemory() {
  if (data_ == nullptr) return;
  crypto::wipe(data_, kBundleBytesMax);
  ::munmap(data_, kBundleBytesMax);
}

// ---- the bundle ----

Error check_keys(const VolumeKeys& keys) {
  const auto refuse = [](std::string message) {
    return Error(Kind::invalid_argument, std::move(message));
  };
  if (keys.integrity.empty()) return refuse("there is no integrity key");
  if (keys.data.empty() || keys.data.size() > kBundleEpochsMax) {
    return refuse("a volume has data keys of 1 to " + std::to_string(kBundleEpochsMax) +
                  " epochs, not " + std::to_string(keys.data.size()));
  }
  bool current = false;
  std::uint32_t last = 0;
  for (const DataKey* key : by_epoch(keys)) {
    if (key->epoch <= last) return refuse("epochs count from 1, each has one data key");
    if (key->key.empty()) return refuse("a data key is missing");
    last = key->epoch;
    current = current || key->epoch == keys.current_epoch;
  }
  if (!current) {
    return refuse("there is no data key of the current epoch, " +
                  std::to_string(keys.current_epoch));
  }
  if (!keys.key_area_state.empty() && keys.key_area_state.size() != kKeyAreaStateBytes) {
    return refuse("the state of a key area has " + std::to_string(kKeyAreaStateBytes) +
                  " bytes, not " + std::to_string(keys.key_area_state.size()));
  }
  return {};
}

Result<std::size_t> write_bundle(const Uuid& uuid, const VolumeKeys& keys,
                                 std::span<std::uint8_t, kBundleBytesMax> out) {
  if (Error e = check_keys(keys)) return e;
  auto* const head = reinterpret_cast<BundleHead*>(out.data());
  std::memcpy(head->magic, kBundleMagic, kMagicBytes);
  head->version = keys.key_area_state.empty() ? kBundleVersion : kBundleVersionBound;
  head->epochs = static_cast<std::uint16_t>(keys.data.size());
  head->current_epoch = keys.current_epoch;
  std::copy(uuid.begin(), uuid.end(), head->uuid);
  std::ranges::copy(keys.integrity.bytes(), head->integrity);
  auto* entry = reinterpret_cast<BundleEpoch*>(out.data() + sizeof(BundleHead));
  for (const DataKey* key : by_epoch(keys)) {
    entry->epoch = key->epoch;
    entry->zero = 0U;
    std::ranges::copy(key->key.bytes(), entry->key);
    ++entry;
  }
  auto* const end =
      std::ranges::copy(keys.key_area_state, reinterpret_cast<std::uint8_t*>(entry)).out;
  return static_cast<std::size_t>(end - out.data());
}

Result<std::size_t> bundle_bytes(std::span<const std::uint8_t, sizeof(BundleHead)> bytes) {
  const auto& head = *reinterpret_cast<const BundleHead*>(bytes.data());
  if (!has_magic(head.magic, kBundleMagic)) return bad("this is no key bundle (magic)");
  if (head.version != kBundleVersion && head.version != kBundleVersionBound) {
    return Error(Kind::unsupported, "key bundle of version " + std::to_string(head.version.get()) +
                                        ", expected at most " + std::to_string(kBundleVersionBound))
        .at("read key bundle");
  }
  const std::size_t epochs = head.epochs;
  if (epochs == 0 || epochs > kBundleEpochsMax) {
    return bad("a bundle has 1 to " + std::to_string(kBundleEpochsMax) + " epochs, not " +
               std::to_string(epochs));
  }
  const std::size_t state = head.version == kBundleVersionBound ? kKeyAreaStateBytes : 0;
  return sizeof(BundleHead) + epochs * sizeof(BundleEpoch) + state;
}

Result<KeyBundle> parse_bundle(std::span<const std::uint8_t> bytes) {
  if (bytes.size() < sizeof(BundleHead)) return bad("the bundle ends in its head");
  auto size = bundle_bytes(bytes.first<sizeof(BundleHead)>());
  if (!size) return size.take_error();
  if (bytes.size() != *size) {
    return bad("the bundle has " + std::to_string(bytes.size()) + " bytes, expected " +
               std::to_string(*size));
  }
  const auto& head = *reinterpret_cast<const BundleHead*>(bytes.data());
  KeyBundle bundle;
  std::copy(std::begin(head.uuid), std::end(head.uuid), bundle.uuid.begin());
  bundle.keys.current_epoch = head.current_epoch;
  auto integrity = crypto::SecretKey::copy_of(head.integrity);
  if (!integrity) return integrity.take_error();
  bundle.keys.integrity = std::move(*integrity);
  std::uint32_t last = 0;
  const std::size_t state_at = sizeof(BundleHead) + head.epochs * sizeof(BundleEpoch);
  for (std::size_t at = sizeof(BundleHead); at < state_at; at += sizeof(BundleEpoch)) {
    const auto& entry = *reinterpret_cast<const BundleEpoch*>(bytes.data() + at);
    if (entry.zero != 0U) return bad("a byte that must be zero is not");
    if (entry.epoch <= last) return bad("the epochs do not ascend from 1");
    last = entry.epoch;
    auto key = crypto::SecretKey::copy_of(entry.key);
    if (!key) return key.take_error();
    bundle.keys.data.push_back({last, std::move(*key)});
  }
  const auto state = bytes.subspan(state_at);
  bundle.keys.key_area_state.assign(state.begin(), state.end());
  if (Error e = check_keys(bundle.keys)) return bad(e.message());
  return bundle;
}

// ---- the conversation with an agent ----

AgentRequest make_request(const Uuid& uuid) {
  AgentRequest request;
  std::memcpy(request.magic, kRequestMagic, kMagicBytes);
  request.version = kTalkVersion;
  request.zero = std::uint16_t{0};
  request.more_zero = 0U;
  std::copy(uuid.begin(), uuid.end(), request.uuid);
  return request;
}

Result<Uuid> parse_request(const AgentRequest& request) {
  if (!has_magic(request.magic, kRequestMagic) || request.version != kTalkVersion ||
      request.zero != 0U || request.more_zero != 0U) {
    return Error(Kind::corrupt, "this is no request for keys");
  }
  Uuid uuid;
  std::copy(std::begin(request.uuid), std::end(request.uuid), uuid.begin());
  return uuid;
}

AgentRefusal make_refusal(Refusal reason) {
  AgentRefusal refusal;
  std::memcpy(refusal.magic, kRefusalMagic, kMagicBytes);
  refusal.version = kTalkVersion;
  refusal.reason = static_cast<std::uint16_t>(reason);
  refusal.zero = 0U;
  return refusal;
}

bool is_refusal(std::span<const std::uint8_t, sizeof(AgentRefusal)> bytes, Refusal& reason) {
  const auto& refusal = *reinterpret_cast<const AgentRefusal*>(bytes.data());
  if (!has_magic(refusal.magic, kRefusalMagic)) return false;
  reason = static_cast<Refusal>(refusal.reason.get());
  return true;
}

}  // namespace pqblk::sealed
