#include "image/qcow2_image.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

#include "format/qcow2/compressed.h"

namespace pqblk::image {
namespace {

constexpr std::uint64_t kTransferMax = 2 * kMiB;
constexpr std::size_t kInlineIovecs = 8;

}  // namespace

using qcow2::EntryKind;
using qcow2::L2Entry;

Qcow2Image::Qcow2Image(const io::File& file, std::unique_ptr<qcow2::Metadata> metadata,
                       std::unique_ptr<io::File> grown, std::unique_ptr<Backend> backing)
    : grown_(std::move(grown)),
      file_(grown_ ? *grown_ : file),
      metadata_(std::move(metadata)),
      backing_(std::move(backing)),
      tables_(metadata_->tables()),
      layout_(metadata_->layout()),
      version_(metadata_->header().version),
      size_(metadata_->header().size) {}

Geometry Qcow2Image::geometry() const {
  Geometry g;
  g.size = size_.load(std::memory_order_relaxed);
  g.request_align = std::max<std::uint32_t>(kVirtioSectorSize, file_.offset_align);
  g.memory_align = file_.memory_align;
  g.cluster_size = static_cast<std::uint32_t>(layout_.cluster_size());
  g.max_transfer = kTransferMax;
  return g;
}

BackendStats Qcow2Image::stats() const {
  BackendStats s;
  s.metadata_reads = metadata_->io().reads();
  s.metadata_writes = metadata_->io().writes();
  s.l2_hits = tables_.cache_hits();
  s.l2_misses = tables_.cache_misses();
  return s;
}

bool Qcow2Image::reads_zero(const L2Entry& entry) const {
  if (entry.kind == EntryKind::zero_plain || entry.kind == EntryKind::zero_allocated) return true;
  if (entry.allocated != 0 || entry.kind == EntryKind::compressed) return false;
  if (entry.kind == EntryKind::data && !layout_.extended_l2) return false;
  return backing_ == nullptr || (layout_.extended_l2 && entry.zero == ~0u);
}

// The part of one cluster from `in_cluster` on that is handled alike.
Qcow2Image::Run Qcow2Image::classify(const L2Entry& entry, std::uint64_t in_cluster,
                                     Purpose purpose) const {
  const Source nothing = backing_ ? Source::backing : Source::zero;
  Run run{Source::allocate, layout_.cluster_size() - in_cluster, entry.host + in_cluster, 0};
  const bool writes = purpose == Purpose::overwrite;
  if (entry.kind == EntryKind::compressed) {
    if (writes) return run;
    return {Source::compressed, run.length, entry.host, entry.compressed_bytes};
  }
  if (writes && (entry.kind != EntryKind::data || !entry.copied)) return run;
  if (!layout_.extended_l2) {
    switch (entry.kind) {
      case EntryKind::data:
        run.source = Source::data;
        break;
      case EntryKind::unallocated:
        run.source = nothing;
        break;
      default:
        run.source = Source::zero;
    }
    return run;
  }
  const auto state = [&](std::uint64_t sub) {
    if ((entry.allocated >> sub & 1) != 0) return Source::data;
    if (writes) return Source::allocate;
    return (entry.zero >> sub & 1) != 0 ? Source::zero : nothing;
  };
  const std::uint64_t sub_size = layout_.subcluster_size();
  std::uint64_t sub = in_cluster / sub_size;
  run.source = state(sub);
  if (run.source == Source::allocate) return run;
  while (sub < qcow2::kSubclusters && state(sub) == run.source) ++sub;
  run.length = sub * sub_size - in_cluster;
  return run;
}

// The fast path: true when the entries were at hand. Extends over clusters as long as they follow
// each other on the host.
bool Qcow2Image::cached_run(std::uint64_t offset, std::uint64_t length, Purpose purpose, Run& run) {
  L2Entry entry;
  if (!tables_.cached_entry({cluster_of(offset)}, entry)) return false;
  run = classify(entry, in_cluster(offset), purpose);
  while (run.length < length && in_cluster(offset + run.length) == 0 &&
         run.source != Source::compressed && run.source != Source::allocate) {
    if (!tables_.cached_entry({cluster_of(offset + run.length)}, entry)) break;
    const Run next = classify(entry, 0, purpose);
    if (next.source != run.source) break;
    if (run.source == Source::data && next.host != run.host + run.length) break;
    run.length += next.length;
  }
  run.length = std::min(run.length, length);
  return true;
}

Task<Error> Qcow2Image::load_run(QueueContext& q, std::uint64_t offset, std::uint64_t length,
                                 Purpose purpose, Run& run) {
  Result<L2Entry> entry = co_await tables_.entry(q.io, {cluster_of(offset)});
  if (!entry) co_return entry.take_error().in(file_.path);
  run = classify(*entry, in_cluster(offset), purpose);
  run.length = std::min(run.length, length);
  co_return Error();
}

Task<Error> Qcow2Image::transfer(QueueContext& q, bool reads, HostOffset host, GuestBuffers data) {
  const iovec& first = data.iov.front();
  if (first.iov_len - data.skip >= data.size) {
    auto* p = static_cast<std::uint8_t*>(first.iov_base) + data.skip;
    if (reads) co_return co_await q.io.read(file_, host.bytes, p, data.size);
    co_return co_await q.io.write(file_, host.bytes, p, data.size);
  }
  std::array<iovec, kInlineIovecs> few;
  std::vector<iovec> many;
  iovec* iov = few.data();
  if (data.iov.size() > few.size()) {
    many.resize(data.iov.size());
    iov = many.data();
  }
  std::size_t count = 0;
  std::uint64_t left = data.size;
  std::size_t skip = data.skip;
  for (const iovec& v : data.iov) {
    if (left == 0) break;
    const std::size_t n = static_cast<std::size_t>(std::min<std::uint64_t>(v.iov_len - skip, left));
    if (n != 0) iov[count++] = {static_cast<std::uint8_t*>(v.iov_base) + skip, n};
    left -= n;
    skip = 0;
  }
  if (reads) co_return co_await q.io.readv(file_, host.bytes, {iov, count});
  co_return co_await q.io.writev(file_, host.bytes, {iov, count});
}

Task<Error> Qcow2Image::read_compressed(QueueContext& q, const Run& run, std::uint64_t offset,
                                        GuestBuffers data) {
  const std::uint64_t align = file_.offset_align;
  const std::uint64_t from = align_down(run.host.bytes, align);
  const std::uint64_t end = align_up(run.host.bytes + run.compressed_bytes, align);
  const QueueContext::Buffer stored = q.buffer(static_cast<std::size_t>(end - from));
  Error error =
      co_await q.io.read(file_, from, stored.data(), static_cast<std::size_t>(end - from));
  if (error) co_return error;
  const QueueContext::Buffer cluster = q.buffer(static_cast<std::size_t>(layout_.cluster_size()));
  const std::span<std::uint8_t> whole{cluster.data(),
                                      static_cast<std::size_t>(layout_.cluster_size())};
  error = qcow2::decompress(metadata_->header().compression,
                            {stored.data() + (run.host.bytes - from), run.compressed_bytes}, whole);
  if (error) co_return std::move(error).in(file_.path).at("read", run.host.bytes);
  data.copy_in(cluster.data() + in_cluster(offset));
  co_return Error();
}

Task<Error> Qcow2Image::read_unlocked(QueueContext& q, std::uint64_t offset, GuestBuffers data) {
  for (std::uint64_t done = 0; done < data.size;) {
    Run run;
    if (!cached_run(offset + done, data.size - done, Purpose::read, run)) {
      Error error = co_await load_run(q, offset + done, data.size - done, Purpose::read, run);
      if (error) co_return error;
    }
    const GuestBuffers part = data.part(done, run.length);
    Error error;
    switch (run.source) {
      case Source::data:
        error = co_await transfer(q, true, run.host, part);
        break;
      case Source::backing:
        error = co_await backing_->read(q, {offset + done}, part);
        break;
      case Source::compressed:
        error = co_await read_compressed(q, run, offset + done, part);
        break;
      default:
        part.zero();
    }
    if (error) co_return error;
    done += run.length;
  }
  co_return Error();
}

// The one case that has to be fast: a single buffer that lies in one run of known, allocated
// clusters. It needs no coroutine below its caller's.
std::uint8_t* Qcow2Image::single_run(const QueueContext& q, std::uint64_t offset,
                                     const GuestBuffers& data, Purpose purpose, HostOffset& host) {
  const iovec& first = data.iov.front();
  if (first.iov_len - data.skip < data.size) return nullptr;
  auto* const memory = static_cast<std::uint8_t*>(first.iov_base) + data.skip;
  std::uint64_t raw = 0;
  if (in_cluster(offset) + data.size <= layout_.cluster_size() &&
      tables_.plain_entry({cluster_of(offset)}, q.index, raw) &&
      (purpose == Purpose::read || (raw & qcow2::kCopied) != 0)) {
    host = {(raw & ~qcow2::kCopied) + in_cluster(offset)};
    return memory;
  }
  Run run;
  if (!cached_run(offset, data.size, purpose, run)) return nullptr;
  if (run.source != Source::data || run.length != data.size) return nullptr;
  host = run.host;
  return memory;
}

Task<Error> Qcow2Image::read(QueueContext& q, GuestOffset at, GuestBuffers data) {
  const qcow2::Readers::Inside inside(metadata_->readers(), q.index);
  HostOffset host;
  if (std::uint8_t* to = single_run(q, at.bytes, data, Purpose::read, host)) {
    co_return co_await q.io.read(file_, host.bytes, to, data.size);
  }
  co_return co_await read_unlocked(q, at.bytes, data);
}

Error Qcow2Image::check_writable() const {
  if (metadata_->read_only()) return Error(Kind::read_only, "the image is open read-only");
  if (!metadata_->writable()) {
    return Error(Kind::io_error, "an earlier flush failed: the image takes no more writes");
  }
  return Error();
}

Task<Error> Qcow2Image::write_unlocked(QueueContext& q, std::uint64_t offset, GuestBuffers data) {
  for (std::uint64_t done = 0; done < data.size;) {
    Run run;
    if (!cached_run(offset + done, data.size - done, Purpose::overwrite, run)) {
      Error error = co_await load_run(q, offset + done, data.size - done, Purpose::overwrite, run);
      if (error.kind() == Kind::corrupt) error = co_await corrupt_found(q, std::move(error));
      if (error) co_return error;
    }
    std::uint64_t n = run.length;
    Error error;
    if (run.source == Source::data) {
      error = co_await transfer(q, false, run.host, data.part(done, n));
    } else {
      error = co_await write_allocating(q, offset + done, data.part(done, data.size - done), n);
    }
    if (error) co_return error;
    done += n;
  }
  co_return Error();
}

Task<Error> Qcow2Image::write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) {
  Error error = check_writable();
  if (error) co_return error;
  {
    const qcow2::Readers::Inside inside(metadata_->readers(), q.index);
    HostOffset host;
    if (const std::uint8_t* from = single_run(q, at.bytes, data, Purpose::overwrite, host)) {
      error = co_await q.io.write(file_, host.bytes, from, data.size);
    } else {
      error = co_await write_unlocked(q, at.bytes, data);
    }
  }
  // A full file system may get space back from a flush: discarded clusters are free only after it.
  if (error.kind() == Kind::no_space && !(error = co_await flush(q))) {
    const qcow2::Readers::Inside inside(metadata_->readers(), q.index);
    error = co_await write_unlocked(q, at.bytes, data);
  }
  if (!error && metadata_->crowded()) error = co_await metadata_->relieve(q.io);
  if (!error && fua) error = co_await flush(q);
  co_return error;
}

Task<Error> Qcow2Image::flush(QueueContext& q) {
  if (metadata_->read_only()) co_return Error();
  Error error = co_await metadata_->flush(q.io);
  if (error.kind() == Kind::corrupt) error = co_await corrupt_found(q, std::move(error));
  co_return error;
}

Task<Error> Qcow2Image::load_entries(QueueContext& q, std::uint64_t first, std::uint64_t end,
                                     std::vector<L2Entry>& out) {
  out.clear();
  for (std::uint64_t cluster = first; cluster < end; ++cluster) {
    L2Entry entry;
    if (!tables_.cached_entry({cluster}, entry)) {
      Result<L2Entry> loaded = co_await tables_.entry(q.io, {cluster});
      if (!loaded) co_return loaded.take_error();
      entry = *loaded;
    }
    out.push_back(entry);
  }
  co_return Error();
}

// The structure contradicted itself where we were about to change it: nobody may write to it again
// before a repair.
Task<Error> Qcow2Image::corrupt_found(QueueContext& q, Error error) {
  Error ignored = co_await metadata_->mark_corrupt(q.io);  // the cause is the error to report
  static_cast<void>(ignored.ok());
  co_return std::move(error).in(file_.path);
}

Task<Result<Extent>> Qcow2Image::extent(QueueContext& q, GuestOffset at, std::uint64_t length) {
  const qcow2::Readers::Inside inside(metadata_->readers(), q.index);
  Run run;
  if (!cached_run(at.bytes, length, Purpose::read, run)) {
    Error error = co_await load_run(q, at.bytes, length, Purpose::read, run);
    if (error) co_return error;
  }
  if (run.source == Source::backing) {
    Result<Extent> below = co_await backing_->extent(q, at, run.length);
    co_return below;
  }
  if (run.source != Source::zero) co_return Extent{run.length, ExtentKind::data};
  L2Entry entry;
  const bool plain = tables_.cached_entry({cluster_of(at.bytes)}, entry) &&
                     entry.kind == EntryKind::unallocated && entry.zero == 0;
  co_return Extent{run.length, plain ? ExtentKind::hole : ExtentKind::zero};
}

Task<Error> Qcow2Image::resize(QueueContext& q, std::uint64_t new_size) {
  Error error = check_writable();
  if (error) co_return error;
  const std::uint64_t old_size = size_.load(std::memory_order_relaxed);
  if (new_size < old_size || new_size % kVirtioSectorSize != 0) {
    co_return Error(Kind::invalid_argument, "a disk can only grow, to a multiple of 512 bytes");
  }
  error = co_await flush(q);
  if (!error) error = co_await metadata_->grow(q.io, new_size);
  if (error) co_return error;
  // The new part reads as zeros: neither what the last cluster held behind the old end nor a longer
  // backing file shines through.
  const std::uint64_t backing_end = backing_ ? backing_->geometry().size : 0;
  const std::uint64_t stale =
      std::min(new_size, std::max(backing_end, layout_.align_to_cluster(old_size)));
  if (stale > old_size) error = co_await write_zeroes(q, {old_size}, stale - old_size, kZeroUnmap);
  if (!error) error = co_await flush(q);
  if (!error) size_.store(new_size, std::memory_order_relaxed);
  co_return error;
}

Task<Error> Qcow2Image::close(QueueContext& q) {
  Error error = co_await metadata_->close(q.io);
  if (error.kind() == Kind::corrupt) error = co_await corrupt_found(q, std::move(error));
  if (backing_) {
    Error below = co_await backing_->close(q);
    if (!error) error = std::move(below);
  }
  co_return error;
}

}  // namespace pqblk::image
