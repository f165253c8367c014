// Someone with write access to the file, against a disk that was not closed: the log is cut,
// changed, replayed. Each sector then reads as a version that it had, or as an error; never as
// anything else.
#include <doctest/doctest.h>

#include <functional>

#include "effort.h"
#include "sealed/log_scan.h"
#include "sealed/sealed_lab.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT

namespace {

// Versions 1 are at home, versions 2 to 5 in the log, as W, WD, Z and MAP records.
const SealedShape kShape{
    .sectors = 40, .overlay_sectors_max = 1 << 20, .session_sectors_max = 1 << 20};

void must(const Error& e) { REQUIRE_MESSAGE(!e, e.to_string()); }

struct Exhibit {
  sim::Device before;  // closed, version 1 everywhere below 30
  sim::Device early;   // the next life, killed after version 2
  sim::Device image;   // the same life, killed at its end
  std::vector<std::string> truth;
  Places at;
};

const Exhibit& exhibit() {
  static const Exhibit instance = [] {
    Exhibit x;
    Lab first(kShape);
    must(first.create());
    must(first.open());
    must(first.write(0, 1, 30));
    must(first.close());
    x.before = killed(first.image());
    Lab second(kShape, x.before);
    must(second.open());
    for (std::uint64_t s = 0; s < 12; ++s) must(second.write(s, 2));
    must(second.flush());
    x.early = killed(second.image());
    must(second.write(4, 3, 2));  // a whole cluster: it moves
    must(second.zero(6, 3));
    must(second.write(7, 4));
    must(second.write(32, 5));  // a new cluster
    must(second.flush());
    x.image = killed(second.image());
    Lab reader(kShape, x.image);
    must(reader.open());
    CHECK(reader.backend().recovery().damaged == 0);
    x.truth = reader.look_at_all();
    x.at = places_of(x.image.cache());
    return x;
  }();
  return instance;
}

// Any version that the sector ever had, or a clear error.
bool had(std::uint64_t s, const std::string& seen) {
  if (seen == "integrity" || seen == "corrupt") return true;
  if (seen == "zeros") return s >= 30 || (s >= 6 && s < 9);
  if (seen == "v1") return s < 30;
  if (seen == "v2") return s < 12;
  if (seen == "v3") return s == 4 || s == 5;
  if (seen == "v4") return s == 7;
  return seen == "v5" && s == 32;
}

// Opens, reads, writes on and reads once more.
std::string examine(const sim::Device& image) {
  std::string opened;
  for (const bool read_only : {true, false}) {
    Lab lab(kShape, image);
    Error e = lab.open(read_only);
    opened = e ? std::string(kind_name(e.kind())) : "ok";
    if (e) continue;
    for (std::uint64_t s = 0; s < kShape.sectors; ++s) {
      const std::string seen = lab.look(s);
      CHECK_MESSAGE(had(s, seen), "sector " << s << " is " << seen);
    }
    if (read_only) continue;
    must(lab.write(20, 9));
    CHECK(lab.look(20) == "v9");
    must(lab.close());
  }
  return opened;
}

// Byte ranges of the log's blocks in the ring, from the tail.
struct Block {
  std::uint64_t at = 0, bytes = 0, header_bytes = 0;
};
std::vector<Block> blocks_of(const sim::Device& image) {
  const auto& x = exhibit().at.extension;
  const sealed::SealedGeometry g{kShape.cluster_bits, kShape.sectors * kSectorSize};
  std::vector<Block> blocks;
  std::uint64_t page = 0;  // a new session begins at the ring's start
  const std::uint64_t pages = (x.log_length - sealed::kLogHeadBytes) / sealed::kPage;
  while (page < pages) {
    const std::uint64_t at = x.log_offset + sealed::kLogHeadBytes + page * sealed::kPage;
    std::vector<std::uint8_t> bytes(sealed::kPage * std::min<std::uint64_t>(4, pages - page));
    image.cache().read(at, bytes.data(), bytes.size());
    auto view = sealed::parse_block(bytes, pages - page, g);
    if (!view || view->raw.sequence != blocks.size() + 1) break;
    blocks.push_back({at, view->total_pages * sealed::kPage,
                      sizeof(sealed::LogBlockRaw) + view->raw.record_bytes});
    page += view->total_pages;
  }
  return blocks;
}

void flip(sim::Device& image, std::uint64_t at, std::uint64_t bit) {
  std::uint8_t byte = 0;
  image.cache().read(at, &byte, 1);
  byte = static_cast<std::uint8_t>(byte ^ (1u << bit));
  image.overwrite(at, &byte, 1);
}

void copy(sim::Device& to, std::uint64_t at, const sim::Device& from, std::uint64_t source,
          std::uint64_t length) {
  std::vector<std::uint8_t> bytes(length);
  from.cache().read(source, bytes.data(), length);
  to.overwrite(at, bytes.data(), length);
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("a log that nobody touched gives back everything") {
  const auto& truth = exhibit().truth;
  for (std::uint64_t s = 0; s < kShape.sectors; ++s) {
    const char* want = s == 4 || s == 5  ? "v3"
                       : s == 7          ? "v4"
                       : s >= 6 && s < 9 ? "zeros"
                       : s < 12          ? "v2"
                       : s < 30          ? "v1"
                       : s == 32         ? "v5"
                                         : "zeros";
    CHECK(truth[s] == want);
  }
  CHECK(blocks_of(exhibit().image).size() >= 10);
}

TEST_CASE("a cut log gives older versions, no others") {
  for (const Block& block : blocks_of(exhibit().image)) {
    sim::Device image = exhibit().image;
    const std::vector<std::uint8_t> zeros(block.bytes);
    image.overwrite(block.at, zeros.data(), zeros.size());
    CHECK(examine(image) == "ok");
  }
}

TEST_CASE("a changed log block ends the log") {
  const std::uint64_t step = effort(40) < 40 ? 97 : 7;
  for (const Block& block : blocks_of(exhibit().image)) {
    for (std::uint64_t byte = 0; byte < block.header_bytes; byte += step) {
      sim::Device image = exhibit().image;
      flip(image, block.at + byte, byte % 8);
      CHECK(examine(image) == "ok");
    }
    for (std::uint64_t byte = sealed::kPage; byte < block.bytes; byte += 999) {
      sim::Device image = exhibit().image;
      flip(image, block.at + byte, byte % 8);
      CHECK(examine(image) == "ok");
    }
  }
}

TEST_CASE("log blocks in another order or place end the log") {
  const auto blocks = blocks_of(exhibit().image);
  for (std::size_t i = 0; i + 1 < blocks.size(); ++i) {
    if (blocks[i].bytes != blocks[i + 1].bytes) continue;
    sim::Device swapped = exhibit().image, doubled = swapped;
    copy(swapped, blocks[i].at, exhibit().image, blocks[i + 1].at, blocks[i].bytes);
    copy(doubled, blocks[i + 1].at, exhibit().image, blocks[i].at, blocks[i].bytes);
    copy(swapped, blocks[i + 1].at, exhibit().image, blocks[i].at, blocks[i].bytes);
    CHECK(examine(swapped) == "ok");
    CHECK(examine(doubled) == "ok");
  }
}

TEST_CASE("an older log gives older versions, no others") {
  const auto& x = exhibit().at.extension;
  sim::Device image = exhibit().image;  // the same life's log, earlier
  copy(image, x.log_offset, exhibit().early, x.log_offset, x.log_length);
  CHECK(examine(image) == "ok");
  // A log that went home, on the disk of a later life, and the other way round.
  Lab later(kShape, exhibit().image);
  must(later.open());
  must(later.close());
  sim::Device home = killed(later.image());
  copy(home, x.log_offset, exhibit().image, x.log_offset, x.log_length);
  CHECK(examine(home) == "ok");
  sim::Device none = exhibit().image;
  copy(none, x.log_offset, exhibit().before, x.log_offset, x.log_length);
  CHECK(examine(none) == "ok");
}

// The log's header and its blocks from two branches of one image.
TEST_CASE("the log of another copy of the image does not authenticate") {
  const auto& x = exhibit().at.extension;
  Lab branch(kShape, exhibit().before);
  must(branch.open());
  must(branch.write(0, 2, 12));
  must(branch.write(13, 1));
  sim::Device image = exhibit().image;
  copy(image, x.log_offset + sealed::kLogHeadBytes, killed(branch.image()),
       x.log_offset + sealed::kLogHeadBytes, x.log_length - sealed::kLogHeadBytes);
  CHECK(examine(image) == "ok");
  copy(image, x.log_offset, killed(branch.image()), x.log_offset, x.log_length);
  CHECK(examine(image) == "ok");  // its session has another key
}

TEST_SUITE_END();
