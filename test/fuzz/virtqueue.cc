// Fuzzes both rings and the in-flight region: hostile guest memory in, chains out. What must hold:
// no crash, no endless loop, every piece of memory of every chain lies inside of the guest's
// memory, and no store of the device outside of it.
//
// Input: 8 bytes of choices, then the guest's memory from its start, then zeros. The rings lie at
// fixed places in it, so that seeds are easy to make and mutations hit.
#include "export/virtqueue.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

using namespace pqblk;
using namespace pqblk::exports;

namespace {

constexpr std::uint64_t kGuest = 0x4000, kBytes = 16384, kRingSize = 16;
constexpr std::uint64_t kDriverAt = 16 * kRingSize, kDeviceAt = 512, kRegionAt = 1024;
constexpr std::uint32_t kTakesMax = 64;

struct World {
  int fd = ::memfd_create("fuzz", MFD_CLOEXEC);
  GuestMemory memory;
  std::uint8_t* data = nullptr;
  World() {
    if (::ftruncate(fd, kBytes) != 0 || memory.add({kGuest, kGuest, kBytes, 0}, fd))
      __builtin_trap();
    data = memory.at(kGuest, kBytes);
  }
};

void check(const World& world, const Chain& chain) {
  if (chain.readable > chain.iov.size() || chain.iov.size() > kSegmentsMax) __builtin_trap();
  std::uint64_t bytes = 0;
  for (const iovec& v : chain.iov) {
    const auto* begin = static_cast<const std::uint8_t*>(v.iov_base);
    const bool inside = begin >= world.data && v.iov_len <= kBytes &&
                        begin + v.iov_len <= world.data + kBytes && v.iov_len != 0;
    if (!inside) __builtin_trap();
    bytes += v.iov_len;
  }
  if (bytes != chain.readable_bytes + chain.writable_bytes) __builtin_trap();
  if (chain.last_writable == nullptr) return;
  if (chain.last_writable < world.data || chain.last_writable >= world.data + kBytes) {
    __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* input, std::size_t size) {
  static World world;
  if (size < 8 || size > kBytes) return 0;
  std::memset(world.data, 0, kBytes);
  std::memcpy(world.data, input + 8, size - 8);
  const std::uint8_t choices = input[0];
  RingSetup setup;
  setup.size = (choices & 1) != 0 ? 12 : kRingSize;  // split rings refuse the first
  if ((choices & 2) != 0) setup.features |= kFeaturePacked;
  if ((choices & 4) != 0) setup.features |= kFeatureIndirect;
  if ((choices & 8) != 0) setup.features |= kFeatureEventIdx;
  if ((choices & 16) != 0) setup.inflight.data = world.data + kRegionAt;
  std::memcpy(&setup.base, input + 1, 4);
  setup.descriptors = world.data;
  setup.driver = world.data + kDriverAt;
  setup.device = world.data + kDeviceAt;
  auto queue = Virtqueue::open(world.memory, setup);
  if (!queue) return 0;
  std::vector<Chain> out;
  Chain chain;
  for (std::uint32_t i = 0; i < kTakesMax && out.size() < setup.size; ++i) {
    const Take result = (*queue)->take(chain);
    if (result == Take::broken && (*queue)->trouble() == nullptr) __builtin_trap();
    if (result != Take::chain) break;
    check(world, chain);
    out.push_back(chain);
    if ((input[5] >> (i % 8) & 1) == 0) continue;  // given back early, out of order
    (*queue)->put(out.back(), i);
    out.pop_back();
    if ((input[6] & 1) != 0) (*queue)->publish();
    if ((input[6] & 2) != 0) static_cast<void>((*queue)->wants_call());
  }
  for (const Chain& left : out) (*queue)->put(left, 1);
  (*queue)->publish();
  static_cast<void>((*queue)->wants_call());
  static_cast<void>((*queue)->ask_for_kicks());
  (*queue)->decline_kicks();
  return 0;
}
