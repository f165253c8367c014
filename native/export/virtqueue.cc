#include "export/virtqueue.h"

namespace pqblk::exports {

std::uint64_t RingSetup::driver_bytes(std::uint64_t features, std::uint32_t size) {
  if ((features & kFeaturePacked) != 0) return 4;
  return 4 + std::uint64_t{2} * size + 2;  // flags, idx, ring, used_event
}

std::uint64_t RingSetup::device_bytes(std::uint64_t features, std::uint32_t size) {
  if ((features & kFeaturePacked) != 0) return 4;
  return 4 + std::uint64_t{8} * size + 2;  // flags, idx, ring, avail_event
}

Result<std::unique_ptr<Virtqueue>> Virtqueue::open(const GuestMemory& memory, RingSetup setup) {
  const auto misaligned = [](const std::uint8_t* place, std::uintptr_t align) {
    return place == nullptr || reinterpret_cast<std::uintptr_t>(place) % align != 0;
  };
  if (setup.size == 0 || setup.size > kRingSizeMax) {
    return Error(Kind::invalid_argument, "a ring of " + std::to_string(setup.size) +
                                             " descriptors; up to " + std::to_string(kRingSizeMax) +
                                             " are possible");
  }
  if (misaligned(setup.descriptors, 16) || misaligned(setup.driver, 2) ||
      misaligned(setup.device, 4)) {
    return Error(Kind::invalid_argument, "a ring that is not in guest memory or not aligned");
  }
  return (setup.features & kFeaturePacked) != 0 ? open_packed(memory, setup)
                                                : open_split(memory, setup);
}

void Virtqueue::collect(Chain& chain, std::uint64_t guest, std::uint32_t length, bool writable) {
  if (length == 0) {
    chain.fault = "a buffer of no length";
    return;
  }
  if (!writable && chain.iov.size() != chain.readable) {
    chain.fault = "a readable buffer after a writable one";
    return;
  }
  if (chain.iov.size() >= kSegmentsMax) {
    chain.fault = "too many buffers";
    std::vector<iovec> last;  // this may be the one that ends in the status byte
    const bool there = memory_.translate(guest + (length - 1), 1, last);
    if (writable)
      chain.last_writable = there ? static_cast<std::uint8_t*>(last[0].iov_base) : nullptr;
    return;
  }
  if (std::uint8_t* host = at(guest, length)) [[likely]] {
    chain.iov.push_back({host, length});
  } else if (!memory_.translate(guest, length, chain.iov)) {
    chain.fault = "a buffer outside of the guest's memory";
    // The status byte is the very last; what came before is not it.
    if (writable) chain.last_writable = nullptr;
    return;
  }
  if (writable) {
    const iovec& last = chain.iov.back();
    chain.last_writable = static_cast<std::uint8_t*>(last.iov_base) + (last.iov_len - 1);
    chain.writable_bytes += length;
  } else {
    chain.readable = static_cast<std::uint32_t>(chain.iov.size());
    chain.readable_bytes += length;
  }
}

}  // namespace pqblk::exports
