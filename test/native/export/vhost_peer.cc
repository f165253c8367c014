// A small guest for tests of `pqblk serve --vhost-user`: connects, writes, flushes and reads back
// on each ring, asks for one thing that does not exist, says `done`, and stays idle until its stdin
// ends.
//
//   vhost_peer SOCKET RINGS
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "export/vhost_user_client.h"

using namespace pqblk::exports::test;  // NOLINT

namespace {

enum : std::uint32_t { kIn = 0, kOut = 1, kFlush = 4 };
constexpr std::uint32_t kBytes = 4096, kSectors = kBytes / 512;
constexpr std::uint64_t kNowhere = std::uint64_t{1} << 40U;  // sectors

void expect(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "vhost_peer: %s\n", what.c_str());
  std::exit(1);
}

void use(FrontEnd& guest, std::uint32_t ring) {
  const std::string name = "ring " + std::to_string(ring) + ": ";
  const std::uint64_t sector = std::uint64_t{ring} * kSectors;
  const auto mark = static_cast<std::uint8_t>(ring + 1);
  std::fill_n(guest.data(ring, 0), kBytes, mark);
  expect(guest.run(ring, kOut, sector, kBytes) == 0, name + "write");
  expect(guest.run(ring, kFlush, 0, 0) == 0, name + "flush");
  std::fill_n(guest.data(ring, 0), kBytes, std::uint8_t{0});
  expect(guest.run(ring, kIn, sector, kBytes) == 0, name + "read");
  const std::uint8_t* data = guest.data(ring, 0);
  expect(std::all_of(data, data + kBytes, [&](std::uint8_t b) { return b == mark; }),
         name + "other data than was written");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  FrontEndOptions options;
  options.rings = static_cast<std::uint32_t>(std::stoul(argv[2]));
  FrontEnd guest(options);
  const std::string problem = guest.connect(argv[1]);
  expect(problem.empty(), problem);
  for (std::uint32_t ring = 0; ring < options.rings; ++ring) use(guest, ring);
  expect(guest.run(0, kIn, kNowhere, kBytes) == 1, "a read beyond the end went well");
  std::puts("done");
  std::fflush(stdout);
  char byte = 0;
  while (::read(STDIN_FILENO, &byte, 1) > 0) {
  }
  return 0;
}
