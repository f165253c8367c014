#include "format/qcow2/create.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "format/qcow2/metadata.h"

namespace pqblk::format::qcow2 {
namespace {

constexpr std::uint64_t kHostBlock = 4096;  // what file systems allocate at least, as a rule

// Where the structures of an empty image lie, in clusters: header, refcount table, refcount
// blocks, L1.
struct Plan {
  Header header;
  std::uint64_t table_clusters = 0;
  std::uint64_t blocks = 0;
  std::uint64_t l1_clusters = 0;
  std::uint64_t first_block() const { return 1 + table_clusters; }
  std::uint64_t first_l1() const { return first_block() + blocks; }
  std::uint64_t end() const { return first_l1() + l1_clusters; }
};

Header make_header(const CreateOptions& options) {
  Header header;
  header.version = options.version;
  header.layout.cluster_bits = options.cluster_bits;
  header.layout.refcount_order =
      static_cast<std::uint32_t>(std::countr_zero(options.refcount_bits));
  header.layout.extended_l2 = options.extended_l2;
  header.size = options.size;
  header.compression = options.compression;
  header.incompatible = options.extra_incompatible;
  if (options.extended_l2) header.incompatible |= bit(kExtendedL2Bit);
  if (options.compression != Compression::zlib) header.incompatible |= bit(kCompressionBit);
  if (!options.sealed_extension.empty()) {
    header.set_extension(kExtensionSealed, options.sealed_extension);
  }
  header.backing_name = options.backing_name;
  if (options.backing_name) header.set_backing_format(options.backing_format);
  return header;
}

Plan make_plan(const CreateOptions& options) {
  Plan plan;
  plan.header = make_header(options);
  Header& header = plan.header;
  const Layout& layout = header.layout;
  const std::uint64_t slots = options.slots != 0 ? options.slots : header.slots();
  const std::uint64_t entries = std::max<std::uint64_t>(layout.l1_entries(slots), 1);
  plan.l1_clusters = layout.clusters(entries * 8);
  for (;;) {
    const std::uint64_t blocks = div_ceil(plan.end(), layout.refcount_block_entries());
    const std::uint64_t table = layout.clusters(std::max(blocks, plan.blocks) * 8);
    if (blocks <= plan.blocks && table <= plan.table_clusters) break;
    plan.blocks = std::max(blocks, plan.blocks);
    plan.table_clusters = std::max(table, plan.table_clusters);
  }
  header.l1_size = static_cast<std::uint32_t>(entries);
  header.l1_offset = {plan.first_l1() << layout.cluster_bits};
  header.refcount_table_offset = {layout.cluster_size()};
  header.refcount_table_clusters = static_cast<std::uint32_t>(plan.table_clusters);
  // The feature names help other tools to explain a refusal; tiny clusters may have no room.
  if (header.version >= 3) {
    header.set_feature_names();
    if (!header.serialise()) header.set_extension(kExtensionFeatureNames, {});
  }
  return plan;
}

Task<Error> write_plain(io::Queue& q, const io::File& file, std::uint64_t offset,
                        const std::uint8_t* data, std::size_t size) {
  Error error = co_await q.write(file, offset, data, size);
  co_return error;
}

Task<Error> write_structures(io::Queue& q, const io::File& file, const Plan& plan) {
  const Layout& layout = plan.header.layout;
  const std::size_t cluster = static_cast<std::size_t>(layout.cluster_size());
  const std::uint64_t per_block = layout.refcount_block_entries();
  AlignedBuffer table(static_cast<std::size_t>(plan.table_clusters) << layout.cluster_bits);
  auto* entries = reinterpret_cast<Be64*>(table.data());
  Error error;
  AlignedBuffer block(cluster);
  for (std::uint64_t i = 0; i < plan.blocks && !error; ++i) {
    entries[i] = (plan.first_block() + i) << layout.cluster_bits;
    std::memset(block.data(), 0, cluster);
    const std::uint64_t used = std::min(plan.end() - i * per_block, per_block);
    for (std::uint64_t n = 0; n < used; ++n)
      set_refcount(block.data(), layout.refcount_order, n, 1);
    error = co_await write_plain(q, file, entries[i], block.data(), cluster);
  }
  if (!error) {
    error = co_await write_plain(q, file, plan.header.refcount_table_offset.bytes, table.data(),
                                 table.size());
  }
  AlignedBuffer l1(static_cast<std::size_t>(plan.l1_clusters) << layout.cluster_bits);
  if (!error) {
    error = co_await write_plain(q, file, plan.header.l1_offset.bytes, l1.data(), l1.size());
  }
  if (!error) error = co_await q.fdatasync(file);
  co_return error;
}

// Maps every cluster of the disk and gives it space as asked.
Task<Error> preallocate(io::Queue& q, io::File file, const CreateOptions& options) {
  const OpenOptions plain;
  Result<std::unique_ptr<Metadata>> opened = co_await Metadata::open(q, file, plain);
  if (!opened) co_return opened.take_error();
  Metadata& metadata = **opened;
  const Layout& layout = metadata.layout();
  ProgressCount count{options.progress, options.size};
  std::vector<SlotUpdate> updates;
  const std::uint64_t bitmap = layout.extended_l2 ? subcluster_bitmap(~0u, 0) : 0;
  for (std::uint64_t slot = 0; slot < metadata.header().slots();) {
    Error error = co_await metadata.tables().ensure_table_lazy(q, {slot});
    if (error) co_return error;
    const std::uint64_t table_end = (layout.l1_index({slot}) + 1) << layout.l2_bits();
    const std::uint64_t want = std::min(table_end, metadata.header().slots()) - slot;
    Result<HostRun> run = co_await metadata.allocator().take(q, want, false);
    if (!run) co_return run.take_error();
    const std::uint64_t bytes = run->clusters << layout.cluster_bits;
    if (!run->fresh && options.preallocation != Preallocation::full) {
      error = co_await zero_range(q, file, run->at.bytes, bytes);
    }
    if (!error) {
      error = co_await fill_range(q, file, run->at.bytes, bytes, options.preallocation, count);
    }
    if (error) co_return error;
    updates.clear();
    for (std::uint64_t i = 0; i < run->clusters; ++i) {
      updates.push_back({{slot + i}, data_entry(run->at + (i << layout.cluster_bits)), bitmap});
    }
    error = co_await metadata.tables().set(q, updates);
    if (!error) error = co_await metadata.relieve(q);
    if (error) co_return error;
    slot += run->clusters;
  }
  // What was only mapped lies beyond the end of the file until the file reaches there.
  if (!file.block_device) {
    Error error = co_await q.truncate(file, metadata.io().host_end());
    if (error) co_return error;
  }
  Error error = co_await metadata.close(q);
  co_return error;
}

}  // namespace

Error check_create(const CreateOptions& options) {
  const auto refuse = [](std::string message) {
    return Error(Kind::invalid_argument, std::move(message));
  };
  if (options.size == 0 || options.size % kVirtioSectorSize != 0) {
    return refuse("a disk's size is a multiple of 512 bytes, not zero");
  }
  if (options.version != 2 && options.version != 3) return refuse("qcow2 version must be 2 or 3");
  if (options.cluster_bits < kClusterBitsMin || options.cluster_bits > kClusterBitsMax) {
    return refuse("the cluster size must be a power of two from 512 bytes to 2 MiB");
  }
  if (!std::has_single_bit(options.refcount_bits) || options.refcount_bits > 64) {
    return refuse("refcount bits must be 1, 2, 4, 8, 16, 32 or 64");
  }
  if (options.version == 2 &&
      (options.refcount_bits != 16 || options.extended_l2 ||
       options.compression != Compression::zlib || options.extra_incompatible != 0)) {
    return refuse("version 2 has 16 refcount bits, plain L2 entries and zlib only");
  }
  if (options.extended_l2 && options.cluster_bits < kClusterBitsMinExtended) {
    return refuse("extended L2 entries need clusters of 16 KiB or more");
  }
  if (options.backing_name) {
    if (options.backing_name->empty() || options.backing_name->size() > kBackingNameMax) {
      return refuse("a backing file name has 1 to 1023 bytes");
    }
    if (options.backing_format.empty() || options.backing_format.size() > kBackingFormatMax) {
      return refuse("a backing file needs its format (raw or qcow2): formats are never probed");
    }
    if (options.preallocation != Preallocation::off) {
      return refuse("preallocation would hide the backing file");
    }
  }
  const Header header = make_header(options);
  const std::uint64_t slots = options.slots != 0 ? options.slots : header.slots();
  if (header.layout.l1_entries(slots) * 8 > kL1BytesMax) {
    return Error(Kind::out_of_range, "the disk is too large for clusters of " +
                                         std::to_string(header.layout.cluster_size()) +
                                         " bytes (its L1 table would be over 32 MiB)");
  }
  Result<std::vector<std::uint8_t>> bytes = make_plan(options).header.serialise();
  return bytes ? Error() : bytes.take_error();
}

std::uint64_t create_space(const CreateOptions& options) {
  const Plan plan = make_plan(options);
  const Layout& layout = plan.header.layout;
  std::uint64_t bytes = plan.end() << layout.cluster_bits;
  if (options.preallocation != Preallocation::off) {
    const std::uint64_t slots = plan.header.slots();
    const std::uint64_t tables = layout.l1_entries(slots);
    const std::uint64_t blocks = div_ceil(slots + tables, layout.refcount_block_entries());
    // Tables lie scattered between data: each takes a block of the file system at least.
    bytes += (tables + blocks) * std::max(layout.cluster_size(), kHostBlock);
    if (options.preallocation != Preallocation::metadata) bytes += slots << layout.cluster_bits;
  }
  return bytes;
}

Task<Error> create(io::Queue& q, const io::File& file, const CreateOptions& options) {
  Error error = check_create(options);
  if (error) co_return error;
  const Plan plan = make_plan(options);
  const Layout& layout = plan.header.layout;
  if (layout.cluster_size() < file.offset_align) {
    co_return Error(Kind::unsupported,
                    "clusters are smaller than the device's blocks: create without O_DIRECT");
  }
  const std::uint64_t bytes = plan.end() << layout.cluster_bits;
  if (file.block_device && bytes > file.size) {
    co_return Error(Kind::no_space, "the block device is too small for the image");
  }
  if (!file.block_device) error = co_await q.truncate(file, bytes);
  if (!error) error = co_await write_structures(q, file, plan);
  if (error) co_return error;
  // The header comes last: before it, the file is no image at all.
  Result<std::vector<std::uint8_t>> header = plan.header.serialise();
  if (!header) co_return header.take_error();
  AlignedBuffer cluster(header->size());
  std::memcpy(cluster.data(), header->data(), header->size());
  error = co_await write_plain(q, file, 0, cluster.data(), cluster.size());
  if (!error) error = co_await q.fdatasync(file);
  if (error || options.preallocation == Preallocation::off) co_return error;
  io::File grown = file;
  if (!file.block_device) grown.size = bytes;
  error = co_await preallocate(q, std::move(grown), options);
  co_return error;
}

}  // namespace pqblk::format::qcow2
