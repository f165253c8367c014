#include "format/qcow2/metadata.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "format/qcow2/header_pages.h"

namespace pqblk::format::qcow2 {
namespace {

Error no_image(const io::File& file, Error error) {
  return std::move(error).in(file.path).at("open qcow2");
}

}  // namespace

Metadata::Metadata(const io::File& file, Header header, OpenOptions options)
    : options_(options),
      header_(std::move(header)),
      meta_(file, header_.layout),
      refcounts_(meta_, header_, kRefcountCacheBytes),
      allocator_(meta_, refcounts_),
      tables_(meta_, header_, allocator_, options.l2_cache_bytes, options.read_only) {
  refcounts_.switch_header = [this](io::Queue& q) -> Task<Error> {
    Error error = co_await write_header_fields(q);
    if (!error) error = co_await meta_.sync(q);
    co_return error;
  };
}

Task<Result<std::unique_ptr<Metadata>>> Metadata::open(io::Queue& q, const io::File& file,
                                                       OpenOptions options) {
  Result<HeaderPages> pages = co_await read_header_pages(q, file);
  if (!pages) co_return pages.take_error();
  const std::size_t there =
      static_cast<std::size_t>(std::min<std::uint64_t>(file.size, HeaderPages::kPage));
  Result<std::uint64_t> cluster = header_cluster_size(pages->bytes.span().first(there));
  if (!cluster) co_return no_image(file, cluster.take_error());
  if (*cluster < file.offset_align) {
    co_return no_image(
        file, Error(Kind::unsupported, "clusters of " + std::to_string(*cluster) +
                                           " bytes are smaller than the device's blocks of " +
                                           std::to_string(file.offset_align) +
                                           " bytes: open it without O_DIRECT"));
  }
  Result<Header> header = parse_header_pages(*pages, file.size, options.allow_sealed);
  if (!header && header.error().kind() == Kind::io_error) co_return header.take_error();
  if (!header) co_return no_image(file, header.take_error());

  options.read_only = options.read_only || file.read_only;
  std::unique_ptr<Metadata> metadata(new Metadata(file, std::move(*header), options));
  metadata->header_cluster_ = AlignedBuffer(std::max<std::size_t>(*cluster, HeaderPages::kPage));
  std::memcpy(metadata->header_cluster_.data(), pages->bytes.data(),
              std::min(metadata->header_cluster_.size(), pages->bytes.size()));
  Error error = metadata->check_openable();
  if (!error) error = co_await metadata->load(q);
  if (error) co_return no_image(file, std::move(error));
  co_return std::move(metadata);
}

Error Metadata::check_openable() const {
  // A sealed disk gives both bits its own meaning at open; check and repair need damaged images.
  if (options_.read_only || options_.for_check || options_.allow_sealed) return Error();
  if (header_.has(kCorruptBit)) {
    return Error(Kind::corrupt,
                 "the image is marked corrupt: repair it (check --repair), or open it read-only");
  }
  if (header_.has(kDirtyBit)) {
    return Error(
        Kind::needs_recovery,
        "the image was not closed cleanly and its refcounts may be wrong: repair it first");
  }
  return Error();
}

Task<Error> Metadata::load(io::Queue& q) {
  Result<std::vector<Snapshot>> snapshots =
      co_await load_snapshots(q, meta_, header_, snapshot_table_bytes_);
  if (!snapshots) co_return snapshots.take_error();
  snapshots_ = std::move(*snapshots);

  MetadataMap& map = meta_.map();
  map.add_range({0}, header_.layout.cluster_size(), Part::header);
  map.add_range(header_.l1_offset, std::uint64_t{header_.l1_size} * 8, Part::l1);
  map.add_range(header_.refcount_table_offset,
                std::uint64_t{header_.refcount_table_clusters} << header_.layout.cluster_bits,
                Part::refcount_table);
  map.add_range(header_.snapshots_offset, snapshot_table_bytes_, Part::snapshot_table);
  for (const Snapshot& snapshot : snapshots_) {
    map.add_range(snapshot.l1_offset, std::uint64_t{snapshot.l1_size} * 8, Part::inactive_l1);
  }
  Error error = co_await refcounts_.load(q);
  if (!error) error = co_await tables_.load(q);
  if (!error && !options_.read_only && !options_.for_check && !options_.allow_sealed) {
    error = co_await clear_autoclear(q);
  }
  co_return error;
}

Task<Error> Metadata::clear_autoclear(io::Queue& q) {
  // None of the structures behind these bits (bitmaps) is maintained here, so the specification
  // wants them gone before the first write.
  if (header_.version < 3 || header_.autoclear == 0) co_return Error();
  header_.autoclear = 0;
  Error error = co_await write_header_fields(q);
  if (!error) error = co_await meta_.sync(q);
  co_return error;
}

void Metadata::add_region(HostOffset at, std::uint64_t length, std::string name) {
  assert(header_.layout.cluster_aligned(at.bytes));
  meta_.map().add_range(at, length, Part::region, std::move(name));
}

void Metadata::remove_region(HostOffset at) { meta_.map().remove_range(at, Part::region); }

Task<Error> Metadata::write_first_piece(io::Queue& q) {
  if (seal_header) seal_header(header_cluster_.span().first(kAtomicHeaderBytes));
  Error error = co_await meta_.write(q, Part::header, {0}, header_cluster_.data(), meta_.piece());
  co_return error;
}

Task<Error> Metadata::write_header_fields(io::Queue& q) {
  AsyncMutex::Guard guard = co_await header_lock_.lock();
  header_.patch(header_cluster_.span());
  Error error = co_await write_first_piece(q);
  co_return error;
}

Task<Error> Metadata::write_header(io::Queue& q) {
  AsyncMutex::Guard guard = co_await header_lock_.lock();
  Result<std::vector<std::uint8_t>> bytes = header_.serialise();
  if (!bytes) co_return bytes.take_error();
  std::memcpy(header_cluster_.data(), bytes->data(), bytes->size());
  header_.header_length = kHeaderLengthV3 + static_cast<std::uint32_t>(header_.extra_fields.size());
  const std::size_t tail = bytes->size() - meta_.piece();
  if (tail != 0) {
    Error error = co_await meta_.write(q, Part::header, {meta_.piece()},
                                       header_cluster_.data() + meta_.piece(), tail);
    if (!error) error = co_await meta_.sync(q);
    if (error) co_return error;
  }
  Error error = co_await write_first_piece(q);
  if (!error) error = co_await meta_.sync(q);
  co_return error;
}

Task<Error> Metadata::mark_corrupt(io::Queue& q) {
  if (header_.version < 3 || options_.read_only || header_.has(kCorruptBit)) co_return Error();
  header_.incompatible |= bit(kCorruptBit);
  Error error = co_await write_header_fields(q);
  if (!error) error = co_await meta_.sync(q);
  co_return error;
}

Error Metadata::sync_failed(Error error) {
  // After a failed fdatasync the kernel may have dropped the pages: no later one can be believed.
  broken_ = error;
  broken_flag_.store(true, std::memory_order_release);
  return error;
}

Task<Error> Metadata::flush(io::Queue& q) {
  const std::uint64_t ticket = flush_asked_.fetch_add(1, std::memory_order_seq_cst) + 1;
  AsyncMutex::Guard guard = co_await flush_lock_.lock();
  if (broken_) co_return Error(broken_);
  // A flush that began after this one was asked for has already covered it.
  if (flush_done_ >= ticket) co_return Error();
  const std::uint64_t covers = flush_asked_.load(std::memory_order_seq_cst);
  Error error = co_await flush_once(q);
  if (!error) flush_done_ = covers;
  co_return error;
}

Task<Error> Metadata::flush_once(io::Queue& q) {
  // Taken first: the entries that gave these clusters up were set before, so they are staged now.
  std::vector<HostRun> freed = allocator_.take_pending();
  Tables::Staged staged = tables_.stage();
  Refcounts::TableStage table;
  Error error = co_await refcounts_.write_blocks(q, table);
  if (!error) {
    error = co_await meta_.sync(q);
    if (error) error = sync_failed(std::move(error));
  }
  bool wrote = false;
  if (error) {
    refcounts_.restore(table);
  } else {
    error = co_await refcounts_.write_table(q, table, wrote);
  }
  if (!error && wrote) {
    error = co_await meta_.sync(q);
    if (error) error = sync_failed(std::move(error));
  }
  const bool home = !staged.empty();
  if (error) {
    tables_.restore(staged);
  } else if (home) {
    error = co_await tables_.write(q, staged);
    if (!error) {
      error = co_await meta_.sync(q);
      if (error) error = sync_failed(std::move(error));
    }
  }
  if (error) {
    allocator_.put_pending(std::move(freed));
    co_return error;
  }
  flushed_.insert(flushed_.end(), freed.begin(), freed.end());
  error = co_await reclaim(q);
  co_return error;
}

// Lowers what the last flushes unmapped, as far as its old readers are done. Never waits for them:
// a writer that flushes to relieve the cache is a reader itself.
Task<Error> Metadata::reclaim(io::Queue& q) {
  while (readers_.drained()) {
    const std::vector<HostRun> ready = std::exchange(draining_, {});
    Error error = co_await allocator_.free_now(q, ready, punch_freed);
    if (error) co_return error;  // leaked
    if (flushed_.empty()) co_return Error();
    draining_.swap(flushed_);
    readers_.flip();
  }
  co_return Error();
}

Task<Error> Metadata::relieve(io::Queue& q) {
  if (!crowded()) co_return Error();
  Error error = co_await flush(q);
  co_return error;
}

Task<Error> Metadata::close(io::Queue& q) {
  if (options_.read_only) co_return Error();
  // The second flush writes the refcounts that the first one lowered.
  for (int round = 0; round < 2; ++round) {
    Error error = co_await flush(q);
    if (error) co_return error;
  }
  co_return Error();
}

Task<Error> Metadata::grow(io::Queue& q, std::uint64_t new_size, std::uint64_t slots) {
  const Layout& layout = header_.layout;
  assert(new_size >= header_.size);
  if (!snapshots_.empty() && header_.version < 3) {
    co_return Error(Kind::unsupported, "a version 2 image with snapshots cannot change its size");
  }
  const std::uint64_t entries = layout.l1_entries(slots != 0 ? slots : layout.clusters(new_size));
  if (entries * 8 > kL1BytesMax) {
    co_return Error(Kind::out_of_range, "too large for clusters of this size (L1 over 32 MiB)");
  }
  const HostOffset old_offset = header_.l1_offset;
  const std::uint64_t old_clusters = layout.clusters(std::uint64_t{header_.l1_size} * 8);
  const bool moves = entries > tables_.l1_size();
  if (moves) {
    Result<HostRun> run = co_await allocator_.take(q, layout.clusters(entries * 8));
    if (!run) co_return run.take_error();
    Error error = co_await refcounts_.make_durable(q);
    if (!error) error = co_await tables_.move_l1(q, run->at, entries);
    if (error) {  // nothing names the new place yet; the first error is the one to report
      static_cast<void>((co_await allocator_.give_back(q, *run)).ok());
      co_return error;
    }
    header_.l1_offset = run->at;
    header_.l1_size = static_cast<std::uint32_t>(entries);
  }
  const std::uint64_t old_size = std::exchange(header_.size, new_size);
  Error error = co_await write_header_fields(q);
  if (!error) error = co_await meta_.sync(q);
  if (error) {
    // Which header the medium holds is unknown: neither place of L1 is reused.
    header_.size = old_size;
    co_return sync_failed(std::move(error));
  }
  if (moves && old_clusters != 0) {
    meta_.map().remove_range(old_offset, Part::l1);
    error = co_await refcounts_.add(q, old_offset, old_clusters, -1);
    if (!error) error = co_await refcounts_.make_durable(q);
  }
  co_return error;
}

}  // namespace pqblk::format::qcow2
