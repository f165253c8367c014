#include "format/qcow2/header_pages.h"

#include <algorithm>
#include <cstring>

namespace pqblk::format::qcow2 {
namespace {

// In one piece where that goes: a header that its owner changes meanwhile is then no mixture.
Task<Error> read_cluster(io::Queue& q, const io::File& file, HeaderPages& out) {
  Error whole = co_await q.read(file, 0, out.bytes.data(), out.bytes.size());
  if (whole.kind() != Kind::io_error) co_return whole;
  for (std::uint64_t at = 0; at < out.bytes.size(); at += HeaderPages::kPage) {
    Error e = co_await q.read(file, at, out.bytes.data() + at, HeaderPages::kPage);
    if (!e) continue;
    if (e.kind() != Kind::io_error || at == 0) co_return e;
    std::memset(out.bytes.data() + at, 0, HeaderPages::kPage);
    out.unreadable.push_back(at);
    if (!out.why) out.why = std::move(e);
  }
  co_return Error();
}

}  // namespace

Task<Result<HeaderPages>> read_header_pages(io::Queue& q, const io::File& file) {
  HeaderPages out{AlignedBuffer(HeaderPages::kPage), {}, {}};
  if (Error e = co_await q.read(file, 0, out.bytes.data(), out.bytes.size())) co_return e;
  const auto there = std::min<std::uint64_t>(file.size, HeaderPages::kPage);
  const auto cluster = header_cluster_size(out.bytes.span().first(there));
  if (!cluster || *cluster <= HeaderPages::kPage) co_return std::move(out);
  out.bytes = AlignedBuffer(
      std::min(*cluster,
               align_up<std::uint64_t>(std::max<std::uint64_t>(file.size, 1), HeaderPages::kPage)));
  if (Error e = co_await read_cluster(q, file, out)) co_return e;
  co_return std::move(out);
}

Result<Header> parse_header_pages(const HeaderPages& pages, std::uint64_t file_size,
                                  bool allow_sealed) {
  const auto there = std::min<std::uint64_t>(pages.bytes.size(), file_size);
  Result<Header> header = parse_header(pages.bytes.span().first(there), file_size, allow_sealed);
  if (pages.unreadable.empty()) return header;
  // What cannot be parsed may be whole: it was not all there.
  if (!header || header->area_end > pages.unreadable.front()) return pages.why;
  return header;
}

}  // namespace pqblk::format::qcow2
