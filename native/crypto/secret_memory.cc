#include "crypto/secret_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <vector>

#include "crypto/kdf.h"

namespace pqblk::crypto {
namespace {

std::atomic<bool> all_locked{true};

std::size_t round_up(std::size_t size, std::size_t unit) { return (size + unit - 1) / unit * unit; }

// Between two pages that nobody may touch. The advice is best effort: an old kernel or a sandbox
// that refuses it does not make the disk unusable.
Result<std::uint8_t*> map_region(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t size = round_up(bytes, page);
  void* base = ::mmap(nullptr, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return Error::from_errno(errno, "map secret memory");
  auto* region = static_cast<std::uint8_t*>(base) + page;
  if (::mprotect(region, size, PROT_READ | PROT_WRITE) != 0) {
    Error error = Error::from_errno(errno, "map secret memory");
    ::munmap(base, size + 2 * page);
    return error;
  }
  if (::mlock(region, size) != 0) all_locked.store(false, std::memory_order_relaxed);
  ::madvise(region, size, MADV_DONTDUMP);
  ::madvise(region, size, MADV_WIPEONFORK);
  return region;
}

// The bookkeeping lives in ordinary memory: a forked child, whose regions read as zeros, can still
// allocate and release.
class Pool {
 public:
  Pool(std::size_t slot_bytes, std::size_t region_bytes, std::size_t regions_max)
      : slot_bytes_(slot_bytes), region_bytes_(region_bytes), regions_max_(regions_max) {}

  Result<void*> allocate() {
    const std::scoped_lock lock(mutex_);
    if (free_.empty()) {
      if (Error error = grow()) return error;
    }
    void* slot = free_.back();
    free_.pop_back();
    return slot;
  }

  void release(void* slot) {
    wipe(slot, slot_bytes_);
    const std::scoped_lock lock(mutex_);
    assert(owns(slot));
    free_.push_back(slot);  // never allocates: grow() reserved a place for every slot
  }

  std::size_t used() {
    const std::scoped_lock lock(mutex_);
    return regions_.size() * (region_bytes_ / slot_bytes_) - free_.size();
  }

 private:
  Error grow() {
    if (regions_.size() == regions_max_) {
      const std::size_t slots = regions_max_ * (region_bytes_ / slot_bytes_);
      return Error(Kind::no_memory, "all " + std::to_string(slots) + " slots for keys are in use")
          .at("allocate secret memory");
    }
    auto region = map_region(region_bytes_);
    if (!region) return region.take_error();
    regions_.push_back(*region);
    const std::size_t slots = region_bytes_ / slot_bytes_;
    free_.reserve(regions_.size() * slots);
    for (std::size_t i = slots; i-- > 0;) free_.push_back(*region + i * slot_bytes_);
    return {};
  }

  bool owns(const void* slot) const {
    const auto* p = static_cast<const std::uint8_t*>(slot);
    return std::any_of(regions_.begin(), regions_.end(), [&](const std::uint8_t* region) {
      return p >= region && p < region + region_bytes_ &&
             static_cast<std::size_t>(p - region) % slot_bytes_ == 0;
    });
  }

  const std::size_t slot_bytes_;
  const std::size_t region_bytes_;
  const std::size_t regions_max_;
  std::mutex mutex_;
  std::vector<std::uint8_t*> regions_;
  std::vector<void*> free_;
};

static_assert(kAeadStateSlotBytes % 64 == 0, "every slot of a region is aligned as the first");

// Never destroyed: keys in objects of static lifetime are released after main returns.
Pool& pool_of(SecretSlot kind) {
  static Pool& keys = *new Pool(kSecretKeySlotBytes, kKeyRegionBytes, kKeyRegionsMax);
  static Pool& states = *new Pool(kAeadStateSlotBytes, kAeadStateRegionBytes, kAeadStateRegionsMax);
  return kind == SecretSlot::key ? keys : states;
}

}  // namespace

Result<void*> secret_allocate(SecretSlot kind) { return pool_of(kind).allocate(); }

void secret_release(SecretSlot kind, void* slot) { pool_of(kind).release(slot); }

std::size_t secret_slots_used(SecretSlot kind) { return pool_of(kind).used(); }

bool secret_memory_locked() { return all_locked.load(std::memory_order_relaxed); }

}  // namespace pqblk::crypto
