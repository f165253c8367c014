// FrontTable: finds what was published, nothing that was withdrawn, and never believes a page that
// became another's.
#include "base/front_table.h"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <memory>
#include <set>
#include <thread>
#include <vector>

using pqblk::FrontTable;
using pqblk::load_word;
using pqblk::store_words;

namespace {

struct alignas(8) Page {
  std::array<std::uint8_t, 64> bytes{};
  void fill(std::uint64_t word) {
    std::array<std::uint64_t, 8> words;
    words.fill(word);
    store_words(bytes.data(), words.data(), sizeof words);
  }
};

}  // namespace

TEST_CASE("a front table finds pages until they are withdrawn") {
  FrontTable table(64);
  Page a, b;
  CHECK(table.find(7).value == 0);
  table.publish(7, a.bytes.data());
  table.publish(6, b.bytes.data());  // its neighbour, of the same set
  const FrontTable::Found found = table.find(7);
  CHECK(found.page() == a.bytes.data());
  CHECK(found.holds());
  CHECK(table.find(6).page() == b.bytes.data());
  table.withdraw(6);
  CHECK_FALSE(found.holds());  // any change of the set
  CHECK(table.find(6).value == 0);
  CHECK(table.find(7).page() == a.bytes.data());
  table.withdraw(7);
  CHECK(table.find(7).value == 0);
  CHECK(FrontTable(0).find(7).value == 0);
}

TEST_CASE("key 0 and the largest key are keys like others") {
  FrontTable table(2);
  Page a, b;
  table.publish(0, a.bytes.data());
  table.publish(~std::uint64_t{0} - 1, b.bytes.data());
  CHECK(table.find(0).page() == a.bytes.data());
  CHECK(table.find(~std::uint64_t{0} - 1).page() == b.bytes.data());
}

TEST_CASE("a working set with a stride is found as one without") {
  constexpr std::uint64_t kKeys = 800;
  Page page;
  for (const std::uint64_t stride : {1, 2, 64, 127, 128, 1024, 4096}) {
    CAPTURE(stride);
    FrontTable table(8192);
    for (std::uint64_t i = 0; i < kKeys; ++i) table.publish(i * stride, page.bytes.data());
    std::uint64_t found = 0;
    for (std::uint64_t i = 0; i < kKeys; ++i) found += table.find(i * stride).value != 0 ? 1 : 0;
    CHECK(found > kKeys * 95 / 100);
  }
}

TEST_CASE("a front table tells what was found since it was asked") {
  FrontTable table(64);
  Page a;
  table.publish(3, a.bytes.data());
  CHECK_FALSE(table.take_used(3));
  static_cast<void>(table.find(3));
  CHECK(table.take_used(3));
  CHECK_FALSE(table.take_used(3));
}

TEST_CASE("a full set keeps what is used and gives up what is not") {
  FrontTable table(2);  // of two sets, three keys each
  std::vector<Page> pages(128);
  const auto there = [&] {
    std::set<std::uint64_t> keys;
    for (std::uint64_t key = 0; key < pages.size(); ++key) {
      const FrontTable::Found found = table.find(key);
      if (found.value == 0) continue;
      CHECK(found.page() == pages[key].bytes.data());
      keys.insert(key);
    }
    return keys;
  };
  std::set<std::uint64_t> first;
  for (std::uint64_t key = 0; key < 64; ++key) {
    table.publish(key, pages[key].bytes.data());
    const std::set<std::uint64_t> now = there();
    if (first.size() == 6) CHECK(now == first);  // all of them are found again and again
    first = now;
  }
  CHECK(first.size() == 6);
  for (std::uint64_t key = 64; key < 128; ++key) table.publish(key, pages[key].bytes.data());
  const std::set<std::uint64_t> last = there();
  CHECK(last.size() == 6);
  CHECK(*last.rbegin() >= 64);
}

TEST_CASE("what was read while a page changed does not hold") {
  FrontTable table(64);
  Page page;
  page.fill(1);
  table.publish(5, page.bytes.data());
  const FrontTable::Found before = table.find(5);
  CHECK(load_word(before.page()) == 1);
  {
    const FrontTable::Change change = table.change(5);
    CHECK_FALSE(before.holds());
    CHECK(table.find(5).value == 0);
    page.fill(2);
  }
  CHECK_FALSE(before.holds());
  const FrontTable::Found after = table.find(5);
  CHECK(load_word(after.page()) == 2);
  CHECK(after.holds());
}

TEST_CASE("a page whose memory serves another key, and then the same again, does not hold") {
  FrontTable table(64);
  Page page;
  page.fill(5);
  table.publish(5, page.bytes.data());
  const FrontTable::Found before = table.find(5);
  for (const std::uint64_t key : {std::uint64_t{9}, std::uint64_t{5}}) {
    table.withdraw(14 - key);
    page.fill(key);
    table.publish(key, page.bytes.data());
    CHECK_FALSE(before.holds());
  }
}

// These two with threads, for ThreadSanitizer and whatever else the machine brings about.
TEST_CASE("a change of several words is seen whole or not at all") {
  constexpr std::uint64_t kChanges = 20000;
  FrontTable table(64);
  Page page;
  page.fill(0);
  table.publish(5, page.bytes.data());
  std::atomic<bool> over{false};
  std::uint64_t torn = 0, seen = 0;
  std::thread reader([&] {
    while (!over.load()) {
      const FrontTable::Found found = table.find(5);
      if (found.value == 0) continue;
      const std::uint64_t first = load_word(found.page());
      const std::uint64_t last = load_word(found.page() + 56);
      if (!found.holds()) continue;
      ++seen;
      if (first != last) ++torn;
    }
  });
  for (std::uint64_t i = 1; i <= kChanges; ++i) {
    const FrontTable::Change change = table.change(5);
    page.fill(i);
  }
  over.store(true);
  reader.join();
  CHECK(torn == 0);
  MESSAGE(seen << " reads held");
}

// As a cache does: a page is withdrawn, its memory filled for another key, and published as that.
// Every word says whose it is.
TEST_CASE("memory that went to another page is not believed") {
  constexpr std::uint64_t kMoves = 20000, kKeys = 8;
  FrontTable table(8);
  std::array<Page, 2> memory;
  std::atomic<bool> over{false};
  std::uint64_t wrong = 0;
  std::thread reader([&] {
    for (std::uint64_t key = 0; !over.load(); key = (key + 1) % kKeys) {
      const FrontTable::Found found = table.find(key);
      if (found.value == 0) continue;
      const std::uint64_t word = load_word(found.page() + 8);
      if (found.holds() && word != key) ++wrong;
    }
  });
  std::array<std::uint64_t, 2> holds{0, 1};
  for (std::size_t i = 0; i < 2; ++i) {
    memory[i].fill(holds[i]);
    table.publish(holds[i], memory[i].bytes.data());
  }
  for (std::uint64_t move = 2; move < kMoves; ++move) {
    const std::size_t i = move % 2;
    table.withdraw(holds[i]);
    holds[i] = move % kKeys;
    memory[i].fill(holds[i]);
    table.publish(holds[i], memory[i].bytes.data());
  }
  over.store(true);
  reader.join();
  CHECK(wrong == 0);
}
