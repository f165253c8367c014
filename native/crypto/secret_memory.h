// Memory for keys: locked, left out of core dumps, wiped in a forked child, between guard pages.
//
// Internal to room crypto/, but for the question whether it is locked. Slots of two sizes, because
// there are two kinds of secrets: 32 raw bytes and an expanded AEAD key. A slot is zeroed when it
// is given and wiped when it is taken back.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"

namespace pqblk::crypto {

enum class SecretSlot : std::uint8_t { key, aead_state };

inline constexpr std::size_t kSecretKeySlotBytes = 32;
inline constexpr std::size_t kAeadStateSlotBytes = 1600;

// Regions are mapped as they are needed and kept. These bounds are 16,384 keys and 5,120 states.
inline constexpr std::size_t kKeyRegionBytes = 4096;
inline constexpr std::size_t kAeadStateRegionBytes = 32768;
inline constexpr std::size_t kKeyRegionsMax = 128;
inline constexpr std::size_t kAeadStateRegionsMax = 256;
// States that are left for those who give them back at once, or cannot do without.
inline constexpr std::size_t kAeadStatesReserved = 1024;

// A zeroed slot, aligned to 64 bytes for a state. Kind::no_memory at the bound. Thread-safe.
Result<void*> secret_allocate(SecretSlot kind);
void secret_release(SecretSlot kind, void* slot);  // wipes; `slot` came from secret_allocate

// Slots of the kind that are given out now. Thread-safe.
std::size_t secret_slots_used(SecretSlot kind);

// False once a region could not be locked (RLIMIT_MEMLOCK): its secrets may reach swap.
bool secret_memory_locked();

}  // namespace pqblk::crypto
