// Data beyond the size of the disk: what a header leaves there that was put back and is of before
// the disk was grown. See sealed_backend.h.
//
// Whoever writes takes the size for where the data ends: a write of the whole last cluster moves it
// without what it holds beyond, a discard unmaps it, one of the whole last span forgets the entries
// of all that comes after. So such a disk takes no write before it has grown again.
//
// Cheap for a disk that has none: its last L2 table, and the entries of the rest of its last
// cluster. Of other clusters entries are looked at only where one is mapped.

#include <algorithm>

#include "image/sealed_backend.h"

namespace pqblk::image {

using namespace sealed;  // NOLINT

// Of a slot that contradicts the specification nothing can be read, so it holds nothing. Nor does
// what the medium does not give out prove anything: a bad page is no reason to write nowhere.
Task<Result<bool>> SealedBackend::is_mapped(QueueContext& q, Slot slot) {
  std::uint64_t raw = 0;
  if (mapping_now(slot, raw)) co_return l2_host(raw) != 0;
  Result<std::uint64_t> got = co_await mapping(q.io, slot);
  if (!got) {
    const Kind kind = got.error().kind();
    if (kind == Kind::corrupt || kind == Kind::io_error) co_return false;
    co_return got.take_error();
  }
  co_return l2_host(*got) != 0;
}

// Whether a sector has data that opens, or may do so under another key or on a better day. An entry
// that nothing opens is none that anybody wrote.
Task<Result<bool>> SealedBackend::holds_data(QueueContext& q, Sector s, const Resolved& r) {
  if (r.version.entry.state() != State::data) co_return false;
  if (sessions_->lacks_key(r.version.entry.session())) co_return true;
  if (sessions_->epoch_of(r.version.entry.session()) == 0) co_return false;
  QueueContext::Buffer buffer = q.buffer(kSectorSize);
  Error e = co_await load_ciphertext(q, 1, &r, buffer.data());
  if (e.kind() == Kind::io_error) co_return true;
  if (e) co_return e;
  {
    KeyLease keys;
    e = open_sector(q, s, r, buffer.data(), buffer.data(), keys);
  }
  crypto::wipe(buffer.data(), kSectorSize);
  if (e && e.kind() != Kind::integrity) co_return e;
  co_return e.ok();
}

// Where the data of sectors [begin, end) of one cluster ends, a sector; 0: there is none.
Task<Result<std::uint64_t>> SealedBackend::data_end_in(QueueContext& q, std::uint64_t begin,
                                                       std::uint64_t end) {
  std::vector<Resolved> r(end - begin);
  const std::function<void(Sector)> unknown = [](Sector) {};
  const auto count = static_cast<std::uint32_t>(r.size());
  if (Error e = co_await resolve_readable(q.io, {begin}, count, r.data(), unknown)) co_return e;
  for (std::uint64_t s = end; s-- > begin;) {
    Result<bool> holds = co_await holds_data(q, {s}, r[s - begin]);
    if (!holds) co_return holds.take_error();
    if (*holds) co_return s + 1;
  }
  co_return std::uint64_t{0};
}

// The same of all clusters in [first, end) of one entry cluster, `first` a sector of any of them;
// of others than its cluster to the cluster's end.
Task<Result<std::uint64_t>> SealedBackend::data_end_in_span(QueueContext& q, std::uint64_t first,
                                                            std::uint64_t end) {
  const std::uint64_t spc = geometry_.sectors_per_cluster();
  for (std::uint64_t c = div_ceil(end, spc); c-- > first / spc;) {
    Result<bool> mapped = co_await is_mapped(q, geometry_.data_slot({c}));
    if (!mapped) co_return mapped.take_error();
    if (!*mapped) continue;
    const std::uint64_t begin = std::max(first, c * spc);
    Result<std::uint64_t> found = co_await data_end_in(q, begin, (c + 1) * spc);
    if (!found) co_return found.take_error();
    if (*found != 0) co_return begin == c* spc ? (c + 1) * spc : *found;
    co_await yield();  // a long look at memory holds up nobody
  }
  co_return std::uint64_t{0};
}

// From the last span on: the first that is found ends the search.
Task<Result<std::uint64_t>> SealedBackend::end_beyond_size(QueueContext& q) {
  const std::uint64_t n = geometry_.table_entries();
  const std::uint64_t first = geometry_.sectors();
  const std::uint64_t first_table = geometry_.table_of(geometry_.cluster_of({first}));
  for (std::uint64_t table = meta_->tables().l1_size(); table-- > first_table;) {
    if (meta_->tables().l1_entry(table) == 0) continue;
    for (std::uint64_t i = n; i-- > geometry_.data_clusters();) {
      const Slot slot{table * n + i};
      const std::uint64_t end = geometry_.end_sector_of_entry_slot(slot).value;
      if (end <= first) break;
      Result<bool> mapped = co_await is_mapped(q, slot);
      if (!mapped) co_return mapped.take_error();
      if (!*mapped) continue;
      const std::uint64_t begin = geometry_.first_sector_of_entry_slot(slot).value;
      Result<std::uint64_t> found = co_await data_end_in_span(q, std::max(begin, first), end);
      if (!found) co_return found.take_error();
      if (*found != 0) co_return *found << kSectorShift;
    }
  }
  co_return std::uint64_t{0};
}

Error SealedBackend::beyond_error(std::uint64_t end) const {
  const std::string text = std::to_string(end);
  return Error(Kind::corrupt,
               "the header is of before the disk was grown, which has data up to byte " + text +
                   ", beyond its size, that writes would destroy: `pqblk resize DISK " + text +
                   "` comes first")
      .in(file_.path);
}

Task<Error> SealedBackend::require_within_size(QueueContext& q) {
  Result<std::uint64_t> end = co_await end_beyond_size(q);
  if (!end) co_return end.take_error();
  co_return *end == 0 ? Error() : beyond_error(*end);
}

// After recovery: what is in a log that was left behind counts as well. A repair writes no guest
// data and goes by the tables alone.
Task<Error> SealedBackend::look_beyond_size(QueueContext& q) {
  if (options_.read_only || options_.for_check) co_return Error();
  Result<std::uint64_t> end = co_await end_beyond_size(q);
  if (!end) co_return end.take_error();
  beyond_end_ = *end;
  co_return options_.to_resize ? Error() : require_no_data_beyond();
}

Error SealedBackend::require_no_data_beyond() const {
  return beyond_end_ == 0 ? Error() : beyond_error(beyond_end_);
}

}  // namespace pqblk::image
