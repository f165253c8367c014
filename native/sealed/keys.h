// The secrets a sealed disk is opened with, as the key layer hands them down.
//
// Room sealed/. The engine never sees the volume master key (docs/format.md, "Keys").
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "crypto/kdf.h"

namespace pqblk::sealed {

using Uuid = std::array<std::uint8_t, 16>;

inline constexpr std::size_t kKeyAreaStateBytes = 64;

struct DataKey {
  std::uint32_t epoch = 0;
  crypto::SecretKey key;
};

struct VolumeKeys {
  crypto::SecretKey integrity;      // MACs of header, session table, log header
  std::vector<DataKey> data;        // every epoch that sessions may still name
  std::uint32_t current_epoch = 0;  // new sessions use this one
  // state_of() the key area that they were taken from (backend_api.h). An open is refused with
  // Kind::locked when that was replaced meanwhile: it may have lost one of these. Empty: not asked.
  std::vector<std::uint8_t> key_area_state;  // kKeyAreaStateBytes
};

}  // namespace pqblk::sealed
