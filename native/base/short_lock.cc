// Waiting for a ShortLock; see short_lock.h.

#include "base/short_lock.h"

#include <sched.h>
#include <time.h>

namespace pqblk {
namespace {

constexpr int kSpins = 200;            // a few microseconds, the longest such a lock is held
constexpr int kYields = 20;            // its holder may have lost the core
constexpr long kSleepNs = 50 * 1000L;  // and may have a lower priority than we do

}  // namespace

void ShortLock::wait() {
  for (int tries = 0;; ++tries) {
    if (!held_.load(std::memory_order_relaxed) && try_lock()) return;
    if (tries < kSpins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else if (tries < kSpins + kYields) {
      ::sched_yield();
    } else {
      const timespec step{0, kSleepNs};
      ::nanosleep(&step, nullptr);
    }
  }
}

}  // namespace pqblk
