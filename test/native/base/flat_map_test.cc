// FlatMap against std::unordered_map under random insertions, erasures and look-ups.
#include "base/flat_map.h"

#include <doctest/doctest.h>

#include <memory>
#include <random>
#include <unordered_map>

using pqblk::FlatMap;

TEST_CASE("a flat map does what an unordered map does") {
  for (const std::uint64_t spread :
       {std::uint64_t{1}, std::uint64_t{1} << 20, std::uint64_t{1} << 44}) {
    std::mt19937_64 random(spread);
    FlatMap<std::unique_ptr<std::uint64_t>> map;
    std::unordered_map<std::uint64_t, std::uint64_t> model;
    for (std::uint64_t step = 0; step < 40000; ++step) {
      // Few keys, so that probe chains form and are broken up; `spread` sets their low bits to
      // zero.
      const std::uint64_t key = random() % (64 + step / 40) * spread;
      if (random() % 3 != 0) {
        map[key] = std::make_unique<std::uint64_t>(step);
        model[key] = step;
      } else {
        CHECK(map.erase(key) == (model.erase(key) == 1));
      }
      CHECK(map.size() == model.size());
      if (step % 500 != 0) continue;
      for (std::uint64_t k = 0; k < 64 + step / 40; ++k) {
        const auto* found = map.find(k * spread);
        const auto want = model.find(k * spread);
        REQUIRE((found != nullptr) == (want != model.end()));
        if (found != nullptr) CHECK(**found == want->second);
      }
      std::size_t visited = 0;
      map.for_each([&](std::uint64_t k, const auto& value) {
        CHECK(*value == model.at(k));
        ++visited;
      });
      CHECK(visited == model.size());
    }
    map.clear();
    CHECK(map.empty());
    CHECK(map.find(0) == nullptr);
    CHECK(!map.erase(0));
  }
}
