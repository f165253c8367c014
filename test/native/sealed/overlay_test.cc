// The overlay against plain maps: random puts, mappings, freezes and drops, then every look-up.
#include "sealed/overlay.h"

#include <doctest/doctest.h>

#include <cstring>
#include <map>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "effort.h"

using namespace pqblk;          // NOLINT
using namespace pqblk::sealed;  // NOLINT

namespace {

Entry entry_of(std::uint32_t number) {
  Entry e = Entry::never();
  e.tag[0] = static_cast<std::uint8_t>(number);
  e.tag[1] = static_cast<std::uint8_t>(number >> 8);
  e.set(State::data, 1);
  return e;
}

struct Generation {
  std::map<std::uint64_t, Entry> sectors;
  std::map<std::uint64_t, SlotVersion> slots;
};

struct Model {
  explicit Model(const SealedGeometry& g) : geometry(g) {}
  const SealedGeometry& geometry;
  Generation current, frozen;

  void put_slot(Slot slot, std::uint64_t entry, std::uint64_t old) {
    const auto before = current.slots.find(slot.value);
    const std::uint64_t first = before == current.slots.end() ? old : before->second.first_old;
    current.slots[slot.value] = {entry, old, 0, first};
    if (!geometry.is_entry_slot(slot) || (entry & kL2Zero) == 0) return;
    for (std::uint64_t s = geometry.first_sector_of_entry_slot(slot).value;
         s < geometry.end_sector_of_entry_slot(slot).value; ++s) {
      current.sectors.erase(s);
    }
  }
  // What the sector is; nothing: ask home.
  std::optional<Entry> find(Sector s) const {
    for (const Generation* g : {&current, &frozen}) {
      if (const auto at = g->sectors.find(s.value); at != g->sectors.end()) return at->second;
      const auto slot = g->slots.find(geometry.entry_slot(s).value);
      if (slot == g->slots.end()) continue;
      const SlotVersion& v = slot->second;
      if (((v.entry | v.old) & kL2Zero) != 0) return Entry::zero();
      if (l2_host(v.old) == 0) return Entry::never();
    }
    return std::nullopt;
  }
};

}  // namespace

TEST_CASE("the overlay answers as plain maps do") {
  const SealedGeometry g{12, 1200 * kSectorSize};  // three tables, many entry slots
  for (std::uint64_t seed = 1; seed <= test::effort(60); ++seed) {
    std::mt19937_64 random(seed);
    Overlay overlay(g);
    Model model(g);
    std::map<std::uint64_t, std::uint64_t> entry_maps;  // as the engine would know them
    for (std::uint32_t step = 0; step < 600; ++step) {
      const Sector s{random() % g.sectors()};
      const std::uint64_t what = random() % 20;
      if (what < 12) {
        overlay.put(s, Version{entry_of(step), {}, 0, step});
        model.current.sectors[s.value] = entry_of(step);
      } else if (what < 14) {
        const std::uint64_t count =
            std::min<std::uint64_t>(1 + random() % 40, g.sectors() - s.value);
        overlay.put_zero_range(s, count, step);
        for (std::uint64_t i = 0; i < count; ++i)
          model.current.sectors[s.value + i] = Entry::zero();
      } else if (what < 16) {
        const Slot slot = g.entry_slot(s);
        std::uint64_t& now = entry_maps[slot.value];
        const std::uint64_t next =
            random() % 2 == 0 ? kL2Zero : kL2Copied | (1 + random() % 1000) * g.cluster_size();
        overlay.put_slot(slot, next, now, step);
        model.put_slot(slot, next, now);
        now = next;
      } else if (what < 18) {
        const Slot slot = g.data_slot(g.cluster_of(s));
        const std::uint64_t next = (1 + random() % 1000) * g.cluster_size();
        overlay.put_slot(slot, next, 0, step);
        model.put_slot(slot, next, 0);
      } else if (model.frozen.sectors.empty() && model.frozen.slots.empty()) {
        overlay.freeze();
        std::swap(model.current, model.frozen);
      } else {
        const auto sectors = overlay.frozen_sectors();
        REQUIRE(sectors.size() == model.frozen.sectors.size());
        auto want = model.frozen.sectors.begin();
        for (const auto& [sector, version] : sectors) {
          CHECK(sector.value == want->first);
          CHECK(version->entry == want->second);
          ++want;
        }
        overlay.drop_frozen();
        model.frozen = {};
      }
      if (step % 50 != 0) continue;
      for (std::uint64_t i = 0; i < g.sectors(); ++i) {
        Version found;
        const std::optional<Entry> want = model.find({i});
        REQUIRE(overlay.find({i}, found) == want.has_value());
        if (want) CHECK(found.entry == *want);
      }
    }
    CHECK(overlay.sectors(false) == model.current.sectors.size());
    CHECK(overlay.sectors(true) == model.frozen.sectors.size());
  }
}

TEST_CASE("ciphertext is let go once it has landed, by the version that wrote it only") {
  const SealedGeometry g{16, kMiB};
  CipherPool pool(0);
  Overlay overlay(g);
  overlay.put({3}, Version{entry_of(1), take_cipher(pool, kSectorSize), 0, 1});
  overlay.put({3}, Version{entry_of(2), take_cipher(pool, kSectorSize), 0, 2});
  CHECK(pool.live_bytes() == kSectorSize);
  overlay.landed({3}, std::array{entry_of(1)});  // late news of an older version
  Version v;
  REQUIRE(overlay.find({3}, v));
  CHECK(static_cast<bool>(v.cipher));
  v = {};
  overlay.freeze();
  overlay.landed({3}, std::array{entry_of(2)});
  REQUIRE(overlay.find({3}, v));
  CHECK(!v.cipher);
  CHECK(pool.live_bytes() == 0);
}

TEST_CASE("runs of sectors across entry clusters are put, and land, as one by one") {
  const SealedGeometry g{12, 1200 * kSectorSize};
  struct Held {
    std::uint32_t run, index;  // says its entry
    bool cipher;
  };
  for (std::uint64_t seed = 1; seed <= test::effort(60); ++seed) {
    std::mt19937_64 random(seed);
    CipherPool pool(0);
    std::map<std::uint64_t, Held> current, frozen;
    std::vector<std::pair<std::uint64_t, std::vector<Entry>>> runs;
    {
      Overlay overlay(g);
      for (std::uint32_t step = 0; step < 300; ++step) {
        const std::uint64_t what = random() % 10;
        if (what < 5 || runs.empty()) {
          const std::uint64_t first = random() % g.sectors();
          const std::uint64_t count =
              std::min<std::uint64_t>(1 + random() % 250, g.sectors() - first);
          CipherRef cipher = take_cipher(pool, count * kSectorSize);
          std::vector<Entry> entries;
          const auto run = static_cast<std::uint32_t>(runs.size());
          for (std::uint32_t i = 0; i < count; ++i) {
            entries.push_back(entry_of(run * 256 + i));
            entries.back().tag[2] = static_cast<std::uint8_t>(run);
            std::memcpy(cipher.data() + i * kSectorSize, &entries.back(), sizeof(Entry));
            current[first + i] = {run, i, true};
          }
          CipherShares shares(cipher, count);
          overlay.put_run({first}, entries, shares, step);
          runs.emplace_back(first, std::move(entries));
        } else if (what < 9) {
          const std::uint64_t run = random() % runs.size();
          const auto& [first, entries] = runs[run];
          const std::size_t begin = random() % entries.size();
          const std::size_t count = 1 + random() % (entries.size() - begin);
          overlay.landed({first + begin}, std::span(entries).subspan(begin, count));
          for (auto* generation : {&current, &frozen}) {
            for (std::size_t i = begin; i < begin + count; ++i) {
              const auto held = generation->find(first + i);
              if (held != generation->end() && held->second.run == run) held->second.cipher = false;
            }
          }
        } else if (frozen.empty()) {
          overlay.freeze();
          std::swap(current, frozen);
        } else {
          overlay.drop_frozen();
          frozen.clear();
        }
        if (step % 30 != 0) continue;
        for (std::uint64_t s = 0; s < g.sectors(); ++s) {
          const auto* generation = current.contains(s) ? &current : &frozen;
          Version found;
          REQUIRE(overlay.find({s}, found) == generation->contains(s));
          if (!generation->contains(s)) continue;
          const Held& held = generation->at(s);
          const Entry& want = runs[held.run].second[held.index];
          CHECK(found.entry == want);
          REQUIRE(static_cast<bool>(found.cipher) == held.cipher);
          if (held.cipher) CHECK(std::memcmp(found.cipher.data(), &want, sizeof want) == 0);
        }
      }
      CHECK(overlay.sectors(false) == current.size());
      CHECK(overlay.sectors(true) == frozen.size());
    }
    CHECK(pool.live_bytes() == 0);
  }
}

TEST_CASE("clusters that were mapped and unmapped within a generation are named as dropped") {
  const SealedGeometry g{16, kGiB};
  Overlay overlay(g);
  const Slot slot = g.data_slot({5});
  const std::uint64_t a = 10 * g.cluster_size(), b = 11 * g.cluster_size(),
                      c = 12 * g.cluster_size();
  overlay.put_slot(slot, b, a, 1);
  overlay.put_slot(slot, 0, b, 2);
  overlay.put_slot(slot, c, 0, 3);
  overlay.freeze();
  const auto dropped = overlay.frozen_dropped();
  REQUIRE(dropped.size() == 1);
  CHECK(dropped[0].bytes == b);
  const auto slots = overlay.frozen_slots();
  REQUIRE(slots.size() == 1);
  CHECK(slots[0].version.first_old == a);
  CHECK(slots[0].version.entry == c);
}
