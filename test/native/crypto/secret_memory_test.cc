// Secret memory: what the kernel was told about it, and that nothing is left in it.
#include "crypto/secret_memory.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

using namespace pqblk::crypto;
using pqblk::Kind;

namespace {

// The sanitizers turn mlock() into nothing, and say that it was done.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

struct Mapping {
  std::uintptr_t begin = 0, end = 0;
  std::set<std::string> flags;  // VmFlags of proc(5)
};

Mapping mapping_of(const void* address) {
  const auto wanted = reinterpret_cast<std::uintptr_t>(address);
  std::ifstream smaps("/proc/self/smaps");
  Mapping found;
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) {
      inside = wanted >= begin && wanted < end;
      if (inside) found.begin = begin, found.end = end;
    } else if (inside && line.starts_with("VmFlags:")) {
      std::istringstream words(line.substr(8));
      for (std::string word; words >> word;) found.flags.insert(word);
    }
  }
  return found;
}

// True when `action` in a forked child ran to its end and said yes.
template <typename Action>
bool child_says(Action action) {
  std::cout.flush();  // or the child that dies of a signal may say it again
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(STDERR_FILENO);
    for (const int signal : {SIGSEGV, SIGBUS, SIGABRT}) std::signal(signal, SIG_DFL);
    ::_exit(action() ? 42 : 1);
  }
  REQUIRE(child > 0);
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 42;
}

bool all_are(const void* memory, std::size_t size, std::uint8_t value) {
  const auto* p = static_cast<const std::uint8_t*>(memory);
  return std::all_of(p, p + size, [&](std::uint8_t byte) { return byte == value; });
}

struct SlotKind {
  SecretSlot kind;
  std::size_t bytes;
  std::size_t slots_max;
};
constexpr SlotKind kKinds[] = {
    {SecretSlot::key, kSecretKeySlotBytes, kKeyRegionsMax*(kKeyRegionBytes / kSecretKeySlotBytes)},
    {SecretSlot::aead_state, kAeadStateSlotBytes,
     kAeadStateRegionsMax*(kAeadStateRegionBytes / kAeadStateSlotBytes)},
};

}  // namespace

TEST_CASE("the kernel knows that these pages are secret") {
  for (const SlotKind& kind : kKinds) {
    auto slot = secret_allocate(kind.kind);
    REQUIRE(slot);
    const Mapping mapping = mapping_of(*slot);
    CHECK(mapping.flags.contains("dd"));  // not in core dumps
    CHECK(mapping.flags.contains("wf"));  // wiped on fork
    if (secret_memory_locked()) {
      CHECK(mapping.flags.contains("lo") != kSanitized);
    } else {
      std::printf("NOTE: RLIMIT_MEMLOCK keeps secret memory from being locked here\n");
    }
    secret_release(kind.kind, *slot);
  }
}

TEST_CASE("a forked child reads zeros, and the parent still has its secret") {
  for (const SlotKind& kind : kKinds) {
    auto slot = secret_allocate(kind.kind);
    REQUIRE(slot);
    std::memset(*slot, 0x5A, kind.bytes);
    CHECK(child_says([&] { return all_are(*slot, kind.bytes, 0); }));
    CHECK(all_are(*slot, kind.bytes, 0x5A));
    secret_release(kind.kind, *slot);
  }
}

TEST_CASE("guard pages stop a run over either end") {
  auto slot = secret_allocate(SecretSlot::key);
  REQUIRE(slot);
  const Mapping mapping = mapping_of(*slot);
  const auto read_at = [](std::uintptr_t address) {
    return *reinterpret_cast<const volatile std::uint8_t*>(address) == 0;
  };
  CHECK(child_says([&] { return read_at(mapping.begin) && read_at(mapping.end - 1); }));
  CHECK_FALSE(child_says([&] { return read_at(mapping.begin - 1) || true; }));
  CHECK_FALSE(child_says([&] { return read_at(mapping.end) || true; }));
  secret_release(SecretSlot::key, *slot);
}

TEST_CASE("a slot is wiped when it is taken back") {
  for (const SlotKind& kind : kKinds) {
    auto slot = secret_allocate(kind.kind);
    REQUIRE(slot);
    CHECK(all_are(*slot, kind.bytes, 0));
    std::memset(*slot, 0x77, kind.bytes);
    secret_release(kind.kind, *slot);
    CHECK(all_are(*slot, kind.bytes, 0));  // the region stays mapped
  }
}

TEST_CASE("slots are apart and aligned, and their number is bounded") {
  for (const SlotKind& kind : kKinds) {
    std::set<std::uintptr_t> slots;
    for (;;) {
      auto slot = secret_allocate(kind.kind);
      if (!slot) {
        CHECK(slot.error().kind() == Kind::no_memory);
        break;
      }
      REQUIRE(slots.insert(reinterpret_cast<std::uintptr_t>(*slot)).second);
      REQUIRE(slots.size() <= kind.slots_max);
    }
    CHECK(slots.size() == kind.slots_max);
    std::uintptr_t last = 0;
    bool apart = true, aligned = true;
    for (const std::uintptr_t slot : slots) {
      apart = apart && slot - last >= kind.bytes;
      aligned = aligned && slot % (kind.kind == SecretSlot::aead_state ? 64 : 32) == 0;
      last = slot;
    }
    CHECK(apart);
    CHECK(aligned);
    for (const std::uintptr_t slot : slots) {
      secret_release(kind.kind, reinterpret_cast<void*>(slot));
    }
    auto again = secret_allocate(kind.kind);
    REQUIRE(again);
    secret_release(kind.kind, *again);
  }
}
