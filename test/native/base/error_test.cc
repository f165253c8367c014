// Error: the kind table, what is kept of a failure, and the line that people read.
#include "base/error.h"

#include <doctest/doctest.h>

#include <cerrno>
#include <memory>
#include <set>

using pqblk::Error;
using pqblk::Kind;
using pqblk::Result;

namespace {
constexpr int kKindCount = static_cast<int>(Kind::no_memory) + 1;
}

TEST_CASE("every kind has a name of its own and an errno that leads back to it") {
  std::set<std::string_view> names;
  for (int i = 0; i < kKindCount; ++i) {
    const Kind kind = static_cast<Kind>(i);
    CAPTURE(pqblk::kind_name(kind));
    CHECK(names.insert(pqblk::kind_name(kind)).second);
    CHECK((pqblk::kind_errno(kind) > 0) == (kind != Kind::ok));
    // EPERM from the kernel is `permission`; gate_refused is ours alone and only maps outwards.
    if (kind != Kind::gate_refused) {
      CHECK(pqblk::kind_from_errno(pqblk::kind_errno(kind)) == kind);
    }
  }
  CHECK(pqblk::kind_name(Kind::io_error) == "io_error");
  CHECK(pqblk::kind_name(Kind::needs_recovery) == "needs_recovery");
}

TEST_CASE("errno values map to the kind a caller acts on") {
  CHECK(pqblk::kind_from_errno(ENOSPC) == Kind::no_space);
  CHECK(pqblk::kind_from_errno(EDQUOT) == Kind::no_space);
  CHECK(pqblk::kind_from_errno(EPERM) == Kind::permission);
  CHECK(pqblk::kind_from_errno(EAGAIN) == Kind::locked);
  CHECK(pqblk::kind_from_errno(ENOSYS) == Kind::unsupported);
  CHECK(pqblk::kind_from_errno(ENOTTY) == Kind::io_error);
}

TEST_CASE("a failure keeps its place and the kernel's number") {
  const Error error = Error::from_errno(ENOSPC, "write", "disk.qcow2", 4096);
  CHECK(error);
  CHECK(error.kind() == Kind::no_space);
  CHECK(error.os_errno() == ENOSPC);
  CHECK(error.to_string() == "disk.qcow2: write at 4096: No space left on device");
  CHECK(Error::from_errno(0, "write").kind() == Kind::io_error);
}

TEST_CASE("the innermost place wins") {
  Error inner = Error(Kind::corrupt, "bad magic").at("read header", 0).in("inner.qcow2");
  const Error error = std::move(inner).at("open backing file", 512).in("outer.qcow2");
  CHECK(error.to_string() == "inner.qcow2: read header at 0: bad magic");
  CHECK(error.os_errno() == 0);
}

TEST_CASE("the line for people leaves out what is not known") {
  CHECK(Error().to_string() == "ok");
  CHECK(Error(Kind::closed, "").to_string() == "closed");
  CHECK(Error(Kind::closed, "the disk was closed").to_string() == "the disk was closed");
  CHECK(Error(Kind::closed, "x").at("read").to_string() == "read: x");
  CHECK(Error(Kind::closed, "x").in("p").to_string() == "p: x");
}

TEST_CASE("Result holds a value or an error, movable either way") {
  Result<std::unique_ptr<int>> value(std::make_unique<int>(7));
  REQUIRE(value);
  CHECK(**value == 7);
  Result<int> failed(Error(Kind::locked, "held by pid 1"));
  REQUIRE_FALSE(failed);
  CHECK(failed.error().kind() == Kind::locked);
  const Error taken = failed.take_error();
  CHECK(taken.message() == "held by pid 1");
}

TEST_CASE("an error is copied whole, and moving one leaves none behind") {
  Error one = Error::from_errno(EIO, "read", "disk.raw", 512);
  const Error copy = one;
  CHECK(copy.to_string() == one.to_string());
  CHECK(copy.os_errno() == EIO);
  const Error moved = std::move(one);
  CHECK(moved.to_string() == copy.to_string());
  CHECK(one.ok());  // NOLINT: that is what is asked
  one = copy;
  CHECK(one.offset() == 512);
  one = Error();
  CHECK(one.ok());
  CHECK(one.path().empty());
  CHECK(Error(Kind::ok, "nothing").ok());
  CHECK(Error().in("p").at("read", 1).ok());
}
