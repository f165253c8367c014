// The operation state machine by itself: each raw result, and what must follow from it.

#include "io/operation.h"

#include <doctest/doctest.h>
#include <linux/falloc.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

namespace pqblk::io {

namespace {

constexpr int kUntouched = 0x5a;

struct Transfer {
  File file;
  std::array<char, 8192> data;
  Op op;

  Transfer(OpType type, std::size_t size, bool direct = false) {
    data.fill(kUntouched);
    file.direct = direct;
    file.offset_align = direct ? 512 : 1;
    op.type = type;
    op.file = &file;
    op.single = {data.data(), size};
    begin(op);
  }
};

}  // namespace

TEST_CASE("a whole transfer finishes at once") {
  Transfer t(OpType::write, 4096);
  CHECK(t.op.length == 4096);
  CHECK(advance(t.op, 4096) == Step::finished);
  CHECK(t.op.result == 0);
  CHECK(t.op.done == 4096);
}

TEST_CASE("a short transfer goes on behind what was moved") {
  Transfer t(OpType::read, 4096);
  CHECK(advance(t.op, 1000) == Step::resubmit);
  CHECK(t.op.done == 1000);
  CHECK(t.op.iov->iov_base == t.data.data() + 1000);
  CHECK(t.op.iov->iov_len == 3096);
  CHECK(advance(t.op, 3096) == Step::finished);
  CHECK(t.op.result == 0);
}

TEST_CASE("an interrupted operation is repeated, but not for ever") {
  for (const int err : {EINTR, EAGAIN}) {
    Transfer t(OpType::write, 4096);
    for (std::uint32_t i = 0; i < kRetriesMax; ++i) REQUIRE(advance(t.op, -err) == Step::resubmit);
    CHECK(advance(t.op, -err) == Step::finished);
    CHECK(t.op.result == -EIO);
  }
  Transfer t(OpType::write, 4096);  // progress starts the count anew
  for (std::uint32_t i = 0; i < kRetriesMax; ++i) REQUIRE(advance(t.op, -EINTR) == Step::resubmit);
  REQUIRE(advance(t.op, 512) == Step::resubmit);
  CHECK(advance(t.op, -EINTR) == Step::resubmit);
}

TEST_CASE("the end of the file reads as zeros, and only the rest is touched") {
  Transfer t(OpType::read, 4096);
  REQUIRE(advance(t.op, 100) == Step::resubmit);
  CHECK(advance(t.op, 0) == Step::finished);
  CHECK(t.op.result == 0);
  CHECK(t.data[99] == kUntouched);
  CHECK(t.data[100] == 0);
  CHECK(t.data[4095] == 0);
  CHECK(t.data[4096] == kUntouched);
}

TEST_CASE("a direct read that ends off a block is at the end of the file") {
  Transfer at_end(OpType::read, 4096, true);
  CHECK(advance(at_end.op, 700) == Step::finished);
  CHECK(at_end.data[700] == 0);
  CHECK(at_end.data[699] == kUntouched);
  Transfer inside(OpType::read, 4096, true);
  CHECK(advance(inside.op, 512) == Step::resubmit);
}

TEST_CASE("a write that moves nothing fails instead of spinning") {
  Transfer t(OpType::write, 4096);
  CHECK(advance(t.op, 0) == Step::finished);
  CHECK(t.op.result == -EIO);
}

TEST_CASE("errors are final and keep their number, also after a part was moved") {
  Transfer t(OpType::write, 4096);
  REQUIRE(advance(t.op, 512) == Step::resubmit);
  CHECK(advance(t.op, -ENOSPC) == Step::finished);
  CHECK(t.op.result == -ENOSPC);
  CHECK(t.op.done == 512);
}

TEST_CASE("buffer lists advance across entries and skip empty ones") {
  Transfer t(OpType::read, 1);
  std::vector<iovec> list = {{t.data.data(), 0},       {t.data.data(), 10},
                             {t.data.data() + 10, 0},  {t.data.data() + 10, 0},
                             {t.data.data() + 10, 20}, {t.data.data() + 30, 5},
                             {t.data.data() + 35, 0}};
  t.op.iov = list.data();
  t.op.iov_count = static_cast<std::uint32_t>(list.size());
  begin(t.op);
  CHECK(t.op.length == 35);
  CHECK(t.op.iov == &list[1]);
  REQUIRE(advance(t.op, 10) == Step::resubmit);
  CHECK(t.op.iov == &list[4]);
  REQUIRE(advance(t.op, 22) == Step::resubmit);
  CHECK(t.op.iov == &list[5]);
  CHECK(t.op.iov->iov_len == 3);
  CHECK(advance(t.op, 3) == Step::finished);
}

TEST_CASE("long buffer lists go in several transfers") {
  Transfer t(OpType::write, 1);
  std::vector<iovec> list(kIovecsPerTransfer + 1, iovec{t.data.data(), 1});
  t.op.iov = list.data();
  t.op.iov_count = static_cast<std::uint32_t>(list.size());
  begin(t.op);
  CHECK(transfer_count(t.op) == kIovecsPerTransfer);
  REQUIRE(advance(t.op, kIovecsPerTransfer) == Step::resubmit);
  CHECK(transfer_count(t.op) == 1);
  CHECK(advance(t.op, 1) == Step::finished);
}

TEST_CASE("a failed fdatasync is never repeated") {
  Transfer t(OpType::fdatasync, 0);
  CHECK(advance(t.op, -EIO) == Step::finished);
  CHECK(t.op.result == -EIO);
}

TEST_CASE("zeroing falls back to punch and allocate, and an error on the way is kept") {
  Transfer t(OpType::fallocate, 0);
  t.op.mode = FallocateMode::zero;
  begin(t.op);
  CHECK(fallocate_flags(t.op) == FALLOC_FL_ZERO_RANGE);
  REQUIRE(advance(t.op, -EOPNOTSUPP) == Step::resubmit);
  CHECK(fallocate_flags(t.op) == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE));
  REQUIRE(advance(t.op, 0) == Step::resubmit);
  CHECK(fallocate_flags(t.op) == 0);
  SUBCASE("allocated") { CHECK(advance(t.op, 0) == Step::finished); }
  SUBCASE("no allocation here") { CHECK(advance(t.op, -EOPNOTSUPP) == Step::finished); }
  SUBCASE("full") {
    CHECK(advance(t.op, -ENOSPC) == Step::finished);
    CHECK(t.op.result == -ENOSPC);
    return;
  }
  CHECK(t.op.result == 0);
}

TEST_CASE("zeroing that nothing supports says so") {
  Transfer t(OpType::fallocate, 0);
  t.op.mode = FallocateMode::zero;
  begin(t.op);
  REQUIRE(advance(t.op, -EOPNOTSUPP) == Step::resubmit);
  CHECK(advance(t.op, -EOPNOTSUPP) == Step::finished);
  CHECK(t.op.result == -EOPNOTSUPP);
}

TEST_CASE("a block device is allocated as far as it reaches") {
  Transfer t(OpType::fallocate, 0);
  t.file.block_device = true;
  t.file.size = 1 << 20;
  t.op.length = 1 << 20;
  CHECK(advance(t.op, -EOPNOTSUPP) == Step::finished);
  CHECK(t.op.result == 0);
  t.op.offset = 1;
  CHECK(advance(t.op, -EOPNOTSUPP) == Step::finished);
  CHECK(t.op.result == -ENOSPC);
}

}  // namespace pqblk::io
