#include "format/qcow2/check.h"

#include <algorithm>
#include <cassert>

#include "format/qcow2/checker.h"

namespace pqblk::format::qcow2 {
namespace {

constexpr std::size_t kWrongMax = 1 << 20;
constexpr std::size_t kChangesAtOnce = 64;

std::string text(std::uint64_t n) { return std::to_string(n); }

}  // namespace

Checker::Checker(io::Queue& q, Metadata& metadata, const CheckOptions& options)
    : q_(q),
      metadata_(metadata),
      meta_(metadata.io()),
      options_(options),
      layout_(metadata.layout()),
      version_(metadata.header().version),
      counts_(layout_.clusters(meta_.host_end())) {
  steps_ = metadata.header().l1_size;
  for (const Snapshot& snapshot : metadata.snapshots()) steps_ += snapshot.l1_size;
  report_.total_clusters = layout_.clusters(metadata.header().size);
}

void Checker::note(std::string message) {
  if (report_.messages.size() < kCheckMessagesMax) report_.messages.push_back(std::move(message));
}

void Checker::corruption(std::string message) {
  ++report_.corruptions;
  note(std::move(message));
}

Error Checker::progress() {
  ++steps_done_;
  if (options_.progress && !options_.progress(steps_done_, steps_)) {
    return Error(Kind::canceled, "stopped on request");
  }
  return Error();
}

// Stored counts against found ones.
Task<Error> Checker::compare() {
  Refcounts& refcounts = metadata_.refcounts();
  const std::uint64_t per_block = layout_.refcount_block_entries();
  std::uint64_t end = counts_.clusters();
  for (std::uint64_t i = refcounts.table_size(); i-- > 0;) {
    if (!refcounts.block_usable(i)) continue;
    end = std::max(end, (i + 1) * per_block);
    break;
  }
  for (std::uint64_t cluster = 0; cluster < end;) {
    const std::uint64_t index = cluster / per_block;
    const bool usable = refcounts.block_usable(index);
    std::uint64_t n = std::min(end, (index + 1) * per_block) - cluster;
    if (cluster < counts_.clusters()) n = std::min(n, counts_.clusters() - cluster);
    std::uint64_t stored = 0;
    if (usable) {
      const HostOffset at{cluster << layout_.cluster_bits};
      Error error = co_await refcounts.get_run(q_, at, n, n, stored);
      if (error) co_return error;
    }
    if (cluster < counts_.clusters()) {
      for (std::uint64_t i = 0; i < n; ++i) compare_run(cluster + i, 1, stored, usable);
    } else if (stored != 0) {
      compare_run(cluster, n, stored, usable);  // behind the file nothing is referred to
    }
    cluster += n;
  }
  co_return Error();
}

// `clusters` with equal stored counts and equal references.
void Checker::compare_run(std::uint64_t cluster, std::uint64_t clusters, std::uint64_t stored,
                          bool block_usable) {
  const std::uint64_t found = counts_.get(cluster);
  if (stored == found) return;
  if (stored > found) {
    report_.leaks += clusters;
  } else {
    report_.corruptions += clusters;
    if (!block_usable) structure_damaged_ = true;
  }
  if (report_.messages.size() < kCheckMessagesMax) {
    note("cluster " + text(cluster) + ": refcount " + text(stored) + ", references " + text(found));
  }
  if (wrong_.size() < kWrongMax) {
    wrong_.push_back({cluster, clusters, stored});
  } else {
    too_many_wrong_ = true;
  }
}

// What nothing refers to goes back to the file system; one that cannot punch holes keeps it. Where
// entries are malformed it could be data that belongs to one of them.
Task<void> Checker::punch_leaks() {
  if (report_.corruptions != 0) co_return;
  for (std::size_t i = 0; i < wrong_.size();) {
    const std::uint64_t first = wrong_[i].cluster;
    std::uint64_t end = first;
    for (; i < wrong_.size() && wrong_[i].cluster == end && counts_.get(end) == 0; ++i) {
      end += wrong_[i].clusters;
    }
    if (end == first) {
      ++i;
      continue;
    }
    Error kept =
        co_await q_.fallocate(meta_.file(), io::FallocateMode::punch, first << layout_.cluster_bits,
                              (end - first) << layout_.cluster_bits);
    static_cast<void>(kept.ok());
  }
}

Task<Error> Checker::repair_counts() {
  Refcounts& refcounts = metadata_.refcounts();
  if (structure_damaged_ || too_many_wrong_) {
    for (const auto& [first, clusters] : structure_) {
      for (std::uint64_t i = 0; i < clusters; ++i) counts_.subtract(first + i);
    }
    const std::uint64_t end = counts_.end();
    Error error = co_await refcounts.rebuild(
        q_, end, [this](std::uint64_t cluster) { return counts_.get(cluster); });
    if (error) co_return error;
    report_.leaks_fixed += std::exchange(report_.leaks, 0);
    // Malformed entries of the mapping stay; everything about counts is right now.
    report_.corruptions_fixed += report_.corruptions - mapping_corruptions_;
    report_.corruptions = mapping_corruptions_;
    co_return Error();
  }
  co_await punch_leaks();
  std::size_t step = 0;
  for (const Wrong& wrong : wrong_) {
    // With its slice in memory a change suspends nowhere, and without optimisation the stack grows
    // with each such step.
    if (++step % kChangesAtOnce == 0) co_await yield();
    const std::uint64_t found = counts_.get(wrong.cluster);
    if (found > layout_.refcount_max()) continue;  // stays a corruption
    Error error =
        co_await refcounts.set(q_, {wrong.cluster << layout_.cluster_bits}, wrong.clusters, found);
    if (error) co_return error;
    if (wrong.stored > found) {
      report_.leaks -= wrong.clusters;
      report_.leaks_fixed += wrong.clusters;
    } else {
      report_.corruptions -= wrong.clusters;
      report_.corruptions_fixed += wrong.clusters;
    }
  }
  Error error = co_await refcounts.make_durable(q_);
  co_return error;
}

// COPIED says that the refcount is exactly one; a wrong one makes a write hit a snapshot.
bool Checker::copied_wrong(std::uint64_t raw, std::uint64_t host) const {
  const bool exactly_one = counts_.get(host >> layout_.cluster_bits) == 1;
  return ((raw & kCopied) != 0) != exactly_one;
}

Task<Error> Checker::check_copied_l2(std::uint64_t l1_index) {
  const std::uint64_t l1_raw = metadata_.tables().l1_entry(l1_index);
  const HostOffset at = Tables::l1_host(l1_raw);
  const std::size_t words_each = layout_.l2_entry_bytes() / 8;
  const std::size_t slice = layout_.slice_bytes();
  const bool own_table = counts_.get(at.bytes >> layout_.cluster_bits) == 1;
  AlignedBuffer buffer(slice);
  std::uint64_t slot = l1_index << layout_.l2_bits();
  for (std::uint64_t done = 0; done < layout_.cluster_size(); done += slice) {
    Error error = co_await meta_.read(q_, at + done, buffer.data(), slice);
    if (error) co_return error;
    auto* words = reinterpret_cast<Be64*>(buffer.data());
    bool changed = false;
    for (std::size_t i = 0; i < slice / 8; i += words_each, ++slot) {
      const std::uint64_t raw = words[i];
      if (options_.entry_override && options_.entry_override({slot}, raw) != raw) continue;
      const L2Entry entry = decode_entry(
          layout_, version_, raw, words_each == 2 ? words[i + 1].get() : 0, meta_.host_end());
      if (entry.kind != EntryKind::data && entry.kind != EntryKind::zero_allocated) continue;
      if (!copied_wrong(raw, entry.host.bytes)) continue;
      note("slot " + text(slot) + ": the COPIED flag is wrong");
      // A table that a snapshot shares is not ours to change; writing copies it first.
      if (!options_.repair || !own_table) {
        ++report_.corruptions;
        continue;
      }
      words[i] = raw ^ kCopied;
      ++report_.corruptions_fixed;
      changed = true;
    }
    if (!changed) continue;
    error = co_await meta_.write(q_, Part::l2, at + done, buffer.data(), slice);
    if (error) co_return error;
  }
  co_return Error();
}

Task<Error> Checker::check_copied() {
  Tables& tables = metadata_.tables();
  for (std::uint64_t i = 0; i < tables.l1_size(); ++i) {
    const std::uint64_t raw = tables.l1_entry(i);
    if (tables.l1_state(raw) != Tables::L1State::table) continue;
    if (copied_wrong(raw, Tables::l1_host(raw).bytes)) {
      note("L1 entry " + text(i) + ": the COPIED flag is wrong");
      if (options_.repair) {
        Error error = co_await tables.repair_l1_entry(q_, i, raw ^ kCopied);
        if (error) co_return error;
        ++report_.corruptions_fixed;
      } else {
        ++report_.corruptions;
      }
    }
    Error error = co_await check_copied_l2(i);
    if (error) co_return error;
  }
  co_return Error();
}

Task<Error> Checker::finish_repair() {
  metadata_.tables().drop_cache();
  Error error = co_await meta_.sync(q_);
  Header& header = metadata_.header();
  const std::uint64_t bits = bit(kDirtyBit) | bit(kCorruptBit);
  // In a sealed image both bits belong to its own layer.
  if (error || report_.corruptions != 0 || header.version < 3 || header.sealed() ||
      (header.incompatible & bits) == 0) {
    co_return error;
  }
  header.incompatible &= ~bits;
  error = co_await metadata_.write_header_fields(q_);
  if (!error) error = co_await meta_.sync(q_);
  co_return error;
}

Task<Result<CheckReport>> Checker::run() {
  assert(!options_.repair || !metadata_.read_only());
  metadata_.tables().drop_cache();
  Error error = co_await count_references();
  if (error) co_return error;
  report_.image_end = counts_.end() << layout_.cluster_bits;
  mapping_corruptions_ = report_.corruptions - structure_corruptions_;
  error = co_await compare();
  const bool only_leaks = report_.corruptions == 0 && !structure_damaged_ && !too_many_wrong_;
  if (!error && options_.repair && (structure_damaged_ || !wrong_.empty()) &&
      (only_leaks || !options_.leaks_only)) {
    error = co_await repair_counts();
  }
  if (!error && !options_.leaks_only) error = co_await check_copied();
  if (!error && options_.repair) error = co_await finish_repair();
  if (error) co_return error;
  co_return std::move(report_);
}

Task<Result<CheckReport>> check(io::Queue& q, Metadata& metadata, const CheckOptions& options) {
  Checker checker(q, metadata, options);
  Result<CheckReport> report = co_await checker.run();
  co_return report;
}

}  // namespace pqblk::format::qcow2
