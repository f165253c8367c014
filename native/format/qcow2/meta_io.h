// Metadata transfers of one image: aligned, checked against the map of metadata, counted.
//
// Room format/qcow2: the only place from which metadata reaches the file. Offsets are multiples of
// piece(), which is what the device takes at least (512 or more); QCOW2 structures start on
// clusters, and an image whose clusters are smaller than that is refused at open.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/aligned.h"
#include "base/error.h"
#include "base/task.h"
#include "base/units.h"
#include "format/qcow2/metadata_map.h"
#include "io/queue.h"

namespace pqblk::format::qcow2 {

class MetaIo {
 public:
  MetaIo(const io::File& file, const Layout& layout);

  // Memory is an AlignedBuffer; sizes are multiples of piece().
  Task<Error> read(io::Queue& q, HostOffset at, void* data, std::size_t size);
  Task<Error> write(io::Queue& q, Part part, HostOffset at, const void* data, std::size_t size);
  // Zeros over a whole structure (a new table), in bounded writes.
  Task<Error> write_zeroes(io::Queue& q, Part part, HostOffset at, std::uint64_t length);
  Task<Error> sync(io::Queue& q);  // fdatasync
  // Replaces the plain fdatasync where the owner must know of every failure; set before first use.
  std::function<Task<Error>(io::Queue& q)> sync_by;

  const io::File& file() const { return file_; }
  MetadataMap& map() { return map_; }
  std::uint32_t piece() const { return piece_; }

  // One past the last byte that a valid entry may name: the file's size at open, then everything
  // handed out by the allocator.
  std::uint64_t host_end() const { return host_end_.load(std::memory_order_relaxed); }
  void raise_host_end(std::uint64_t bytes);

  std::uint64_t reads() const { return reads_.load(std::memory_order_relaxed); }
  std::uint64_t writes() const { return writes_.load(std::memory_order_relaxed); }

 private:
  const io::File& file_;
  MetadataMap map_;
  const std::uint32_t piece_;
  std::atomic<std::uint64_t> host_end_;
  std::atomic<std::uint64_t> reads_{0};
  std::atomic<std::uint64_t> writes_{0};
};

}  // namespace pqblk::format::qcow2
