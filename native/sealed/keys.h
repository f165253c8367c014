// The secrets a sealed disk is opened with, as the key layer hands them down.
//
// Room sealed/. The engine never sees the volume master key (docs/format.md, "Keys").
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "crypto/kdf.h"

namespace pqblk::sealed {

using Uuid = std::array<std::uint8_t, 16>;

struct DataKey {
  std::uint32_t epoch = 0;
  crypto::SecretKey key;
};

struct VolumeKeys {
  crypto::SecretKey integrity;      // MACs of header, session table, log header
  std::vector<DataKey> data;        // every epoch that sessions may still name
  std::uint32_t current_epoch = 0;  // new sessions use this one
};

}  // namespace pqblk::sealed
