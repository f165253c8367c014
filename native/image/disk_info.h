// What a disk's file says of itself, without opening it as a disk: no keys, no lock, no writing.
//
// Room image/. A running owner may change the file meanwhile: the answer is a look, not a promise.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "image/disk.h"
#include "sealed/backend_api.h"
#include "storage/file.h"

namespace pqblk::image {

struct Qcow2Facts {
  std::uint32_t version = 3;
  std::uint32_t refcount_bits = 16;
  std::string compression;  // "zlib", "zstd"
  bool extended_l2 = false, lazy_refcounts = false, dirty = false, corrupt = false;
  std::string backing_name, backing_format;
  std::uint32_t snapshots = 0;
};

struct DiskInfo {
  std::string path;
  Format format = Format::raw;
  std::uint64_t size = 0;             // guest bytes
  std::uint64_t file_size = 0;        // bytes
  std::uint64_t allocated_bytes = 0;  // what the file takes on its file system
  std::uint32_t cluster_size = 0;     // 0: raw
  std::optional<storage::LockHolder> holder;
  std::string durability_class;
  std::optional<Qcow2Facts> qcow2;
  std::optional<sealed::PublicInfo> sealed;
};

// Blocking. Without a format the file's magic decides: good enough to describe a file, never to
// open a disk, since a guest can write what it likes into a raw one.
Result<DiskInfo> read_disk_info(const std::string& path, std::optional<Format> format);

// Blocking. Replaces the key area of a sealed disk that nobody has open (exclusive lock), see
// sealed::replace_key_area.
Error replace_key_area(const std::string& path, const sealed::KeyAreaChange& change);

}  // namespace pqblk::image
