// Fuzzes the parser of log blocks: hostile pages in, records out, for several shapes of disk. What
// must hold: no crash, and every record it lets through lies inside the disk and inside its block.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "sealed/log_scan.h"

using namespace pqblk;
using namespace pqblk::sealed;

namespace {

constexpr std::size_t kInputMax = (kBlockHeaderPagesMax + 1) * kPage;

void check(const BlockView& view, const SealedGeometry& g, std::uint64_t pages_to_end) {
  if (view.total_pages > pages_to_end) __builtin_trap();
  for (const LogRecord& r : view.records) {
    bool ok = true;
    switch (r.type) {
      case RecordType::w:
        ok = r.sector.value < g.sectors() && r.entry.is_valid();
        break;
      case RecordType::wd:
        ok = r.sector.value < g.sectors() && r.place < view.payload_pages;
        break;
      case RecordType::z:
        ok = r.count != 0 && r.sector.value + r.count <= g.sectors();
        break;
      case RecordType::map:
        ok = r.slot.value < g.l1_entries() * g.table_entries();
        break;
    }
    if (!ok) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0 || size > kInputMax) return 0;
  // A short input is a page with zeros behind it.
  std::vector<std::uint8_t> pages(align_up<std::size_t>(size, kPage));
  std::copy(data, data + size, pages.begin());
  for (const std::uint32_t bits : {12u, 16u, 21u}) {
    const SealedGeometry g{bits, std::uint64_t{1} << 33};
    for (const std::uint64_t left : {std::uint64_t{1}, std::uint64_t{62}, std::uint64_t{1} << 20}) {
      const auto view = parse_block(pages, left, g);
      if (view) check(*view, g, left);
    }
  }
  return 0;
}
