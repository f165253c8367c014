// Where sectors and their entries live: the shifts of SealedGeometry against the specification's
// own words (docs/format.md section 4), which divide.
#include <doctest/doctest.h>

#include <random>

#include "sealed/layout.h"

using namespace pqblk;  // NOLINT

TEST_CASE("geometry: shifts say what the specification says") {
  std::mt19937_64 random(1);
  for (std::uint32_t bits = sealed::kClusterBitsMin; bits <= sealed::kClusterBitsMax; ++bits) {
    const sealed::SealedGeometry g{bits, std::uint64_t{1} << 60};
    const std::uint64_t cluster = std::uint64_t{1} << bits;
    const std::uint64_t n = cluster / 8, e = n / 128, d = n - e;
    const std::uint64_t per_cluster = cluster / 4096;
    for (int i = 0; i < 20'000; ++i) {
      // Near the seams of tables, where a mistake would hide, and anywhere.
      const std::uint64_t seam = random() % 1000 * d * per_cluster;
      const std::uint64_t s = i % 2 == 0 ? seam + random() % 8 : random() >> 14;
      const std::uint64_t c = s / per_cluster;
      const std::uint64_t position = c % d * per_cluster + s % per_cluster;
      const sealed::EntryPlace at = g.entry_place({s});
      CHECK(g.data_slot({c}).value == c / d * n + c % d);
      CHECK(at.slot.value == c / d * n + d + position / (cluster / 32));
      CHECK(at.offset == position % (cluster / 32) * 32);
      CHECK(g.is_entry_slot(at.slot));
      CHECK(!g.is_entry_slot(g.data_slot({c})));
      CHECK(g.cluster_of_slot(g.data_slot({c})).value == c);
      CHECK(g.first_sector_of_entry_slot(at.slot).value <= s);
      CHECK(g.end_sector_of_entry_slot(at.slot).value > s);
      CHECK(g.end_of_entry_cluster({s}) == g.end_sector_of_entry_slot(at.slot));
      // All entry clusters of a table together have its sectors; those beyond the last one none.
      const std::uint64_t any = c / d * n + d + random() % e;
      const std::uint64_t first = (c / d * d * per_cluster) + (any % n - d) * (cluster / 32);
      const std::uint64_t table_end = (c / d + 1) * d * per_cluster;
      CHECK(g.first_sector_of_entry_slot({any}).value == first);
      CHECK(g.end_sector_of_entry_slot({any}).value == std::min(first + cluster / 32, table_end));
    }
  }
}
