// bench_crypto: GB/s of one core for each AEAD implementation that this CPU can run.
//
//   bench_crypto                                  a table of all
//   bench_crypto list                             JSON: the implementations, and which are in use
//   bench_crypto SUITE NAME seal|open [ms=450]    JSON: GB/s of one of them, of 4 KiB sectors
//
// The shapes are the product's: sealed sectors (4 KiB under 36 bytes of associated data), log
// blocks (4 KiB of associated data and no message), and large messages for the limit of each
// kernel. `bare` is the same library without this project around it: the limit for a wrapper.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "crypto/aead.h"
#include "crypto/aead_backends.h"
#include "crypto/kdf.h"
#if defined(PQBLK_HAVE_IPSEC_MB)
#include <intel-ipsec-mb.h>
#endif

using namespace pqblk::crypto;

namespace {

constexpr std::size_t kSector = 4096;
constexpr std::size_t kAad = 36;
constexpr std::size_t kRing = 16;         // sectors in turn: 64 KiB in, 64 KiB out
constexpr double kSecondsPerRun = 0.003;  // shorter than a time slice, to fall between other work
constexpr int kRuns = 150;
constexpr const char* kBare = "bare";

// The best of several runs, in bytes per nanosecond: what the machine can do when left alone.
template <typename Operation>
double gigabytes_per_second(std::size_t bytes, int runs, Operation operation) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int run = 0; run < runs; ++run) {
    const auto begin = Clock::now();
    std::size_t done = 0;
    double seconds = 0;
    while (seconds < kSecondsPerRun) {
      for (int i = 0; i < 64; ++i) operation(done++);
      seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    }
    const double rate = static_cast<double>(done * bytes) / seconds / 1e9;
    if (rate > best) best = rate;
  }
  return best;
}

// Written in one piece: a load of what lies in several stores waits for these and all before them,
// which are the last message's, and the wait would be counted as the cipher's.
Nonce nonce_for(std::uint64_t n) {
  Nonce nonce{};
  std::memcpy(nonce.data(), &n, sizeof n);
  return nonce;
}

// Sectors of noise, and room for what becomes of them.
struct Sectors {
  std::array<std::uint8_t, kKeyBytes> key{};
  std::vector<std::uint8_t> in, out, back, aad;
  std::vector<Tag> tags;

  Sectors() : in(kRing * kSector), out(in.size()), back(in.size()), aad(kSector), tags(kRing) {
    if (random_bytes(key) || random_bytes(in) || random_bytes(aad)) std::abort();
  }
  std::span<const std::uint8_t> sector_aad() const { return {aad.data(), kAad}; }
};

AeadKey key_of(const AeadBackend& backend, const Sectors& s) {
  auto key = AeadKey::create_with(backend, s.key);
  if (!key) std::abort();
  return std::move(*key);
}

double seal_rate(const AeadKey& key, Sectors& s, int runs) {
  return gigabytes_per_second(kSector, runs, [&](std::size_t n) {
    const std::size_t at = n % kRing;
    key.seal(nonce_for(at), s.sector_aad(), &s.in[at * kSector], &s.out[at * kSector], kSector,
             s.tags[at]);
  });
}

// After seal_rate; 0 when a tag did not hold.
double open_rate(const AeadKey& key, Sectors& s, int runs) {
  bool opened = true;
  const double rate = gigabytes_per_second(kSector, runs, [&](std::size_t n) {
    const std::size_t at = n % kRing;
    opened = key.open(nonce_for(at), s.sector_aad(), &s.out[at * kSector], &s.back[at * kSector],
                      kSector, s.tags[at]) &&
             opened;
  });
  return opened && s.back == s.in ? rate : 0;
}

void bench(const AeadBackend& backend) {
  Sectors s;
  const AeadKey key = key_of(backend, s);
  const double seal = seal_rate(key, s, kRuns);
  const double open = open_rate(key, s, kRuns);
  Tag tag;
  const double gmac = gigabytes_per_second(kSector, kRuns, [&](std::size_t n) {
    key.seal(nonce_for(n), s.aad, nullptr, nullptr, 0, tag);
  });
  const double large = gigabytes_per_second(s.in.size(), kRuns, [&](std::size_t n) {
    key.seal(nonce_for(n), s.sector_aad(), s.in.data(), s.out.data(), s.in.size(), tag);
  });
  std::printf("%-18s %-16s %9.2f %9.2f %9.2f %9.2f%s\n", suite_name(backend.suite).data(),
              backend.name.data(), seal, open, gmac, large, open > 0 ? "" : "  OPEN FAILED");
}

// ---- ipsec-mb in a bare loop: what its manual shows, one manager, one expanded key --------------

#if defined(PQBLK_HAVE_IPSEC_MB)

constexpr bool kHaveBare = true;

template <typename Message>
double bare_rate(Sectors& s, int runs, Message message) {
  return gigabytes_per_second(kSector, runs, [&](std::size_t n) {
    const std::size_t at = (n % kRing) * kSector;
    message(nonce_for(n % kRing), at, s.tags[n % kRing]);
  });
}

double bare_gcm(IMB_MGR* m, Sectors& s, bool opens, int runs) {
  alignas(64) static gcm_key_data key;
  gcm_context_data context;
  IMB_AES256_GCM_PRE(m, s.key.data(), &key);
  const auto seal = [&](const Nonce& nonce, std::size_t at, Tag& tag) {
    IMB_AES256_GCM_ENC(m, &key, &context, &s.out[at], &s.in[at], kSector, nonce.data(),
                       s.aad.data(), kAad, tag.data(), kTagBytes);
  };
  const auto open = [&](const Nonce& nonce, std::size_t at, Tag& tag) {
    IMB_AES256_GCM_DEC(m, &key, &context, &s.back[at], &s.out[at], kSector, nonce.data(),
                       s.aad.data(), kAad, tag.data(), kTagBytes);
  };
  const double sealed = bare_rate(s, opens ? 1 : runs, seal);
  return opens ? bare_rate(s, runs, open) : sealed;
}

double bare_chacha(IMB_MGR* m, Sectors& s, bool opens, int runs) {
  chacha20_poly1305_context_data context;
  const auto seal = [&](const Nonce& nonce, std::size_t at, Tag& tag) {
    IMB_CHACHA20_POLY1305_INIT(m, s.key.data(), &context, nonce.data(), s.aad.data(), kAad);
    IMB_CHACHA20_POLY1305_ENC_UPDATE(m, s.key.data(), &context, &s.out[at], &s.in[at], kSector);
    IMB_CHACHA20_POLY1305_ENC_FINALIZE(m, &context, tag.data(), kTagBytes);
  };
  const auto open = [&](const Nonce& nonce, std::size_t at, Tag& tag) {
    IMB_CHACHA20_POLY1305_INIT(m, s.key.data(), &context, nonce.data(), s.aad.data(), kAad);
    IMB_CHACHA20_POLY1305_DEC_UPDATE(m, s.key.data(), &context, &s.back[at], &s.out[at], kSector);
    IMB_CHACHA20_POLY1305_DEC_FINALIZE(m, &context, tag.data(), kTagBytes);
  };
  const double sealed = bare_rate(s, opens ? 1 : runs, seal);
  return opens ? bare_rate(s, runs, open) : sealed;
}

double bare(Suite suite, Sectors& s, bool opens, int runs) {
  IMB_MGR* const manager = alloc_mb_mgr(0);
  if (manager == nullptr) return 0;
  init_mb_mgr_auto(manager, nullptr);
  const double rate = suite == Suite::aes_256_gcm ? bare_gcm(manager, s, opens, runs)
                                                  : bare_chacha(manager, s, opens, runs);
  free_mb_mgr(manager);
  return !opens || s.back == s.in ? rate : 0;
}

#else

constexpr bool kHaveBare = false;
double bare(Suite, Sectors&, bool, int) { return 0; }

#endif

// ---- for a program that compares ---------------------------------------------------------------

void list() {
  const char* separator = "";
  std::printf("[");
  const auto row = [&](std::string_view suite, std::string_view name, bool available, bool used) {
    std::printf("%s{\"suite\": \"%s\", \"name\": \"%s\", \"available\": %s, \"inUse\": %s}",
                separator, suite.data(), name.data(), available ? "true" : "false",
                used ? "true" : "false");
    separator = ",\n ";
  };
  for (const Suite suite : {Suite::aes_256_gcm, Suite::chacha20_poly1305}) {
    row(suite_name(suite), kBare, kHaveBare, false);
  }
  for (const AeadBackend* backend : aead_backends()) {
    row(suite_name(backend->suite), backend->name, backend->available(),
        aead_implementation(backend->suite) == backend->name);
  }
  std::printf("]\n");
}

int measure_one(const std::string& suite, const std::string& name, bool opens, int runs) {
  Sectors s;
  double rate = 0;
  for (const Suite each : {Suite::aes_256_gcm, Suite::chacha20_poly1305}) {
    if (name == kBare && suite_name(each) == suite) rate = bare(each, s, opens, runs);
  }
  for (const AeadBackend* backend : aead_backends()) {
    if (suite_name(backend->suite) != suite || backend->name != name) continue;
    if (!backend->available()) break;
    const AeadKey key = key_of(*backend, s);
    const double sealed = seal_rate(key, s, opens ? 1 : runs);
    rate = opens ? open_rate(key, s, runs) : sealed;
  }
  if (rate <= 0) {
    std::fprintf(stderr, "bench: %s by %s is not there, or failed\n", suite.c_str(), name.c_str());
    return 1;
  }
  std::printf("{\"gbps\": %.4f}\n", rate);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "list") == 0) {
    list();
    return 0;
  }
  if (argc >= 4) {
    const double ms = argc > 4 && std::strncmp(argv[4], "ms=", 3) == 0 ? std::atof(argv[4] + 3) : 0;
    const int runs = ms > 0 ? std::max(1, static_cast<int>(ms / 1000 / kSecondsPerRun)) : kRuns;
    return measure_one(argv[1], argv[2], std::strcmp(argv[3], "open") == 0, runs);
  }
  std::printf("GB/s, one core        %13s %9s %9s %9s %9s\n", "", "seal 4K", "open 4K", "MAC 4K",
              "seal 64K");
  for (const AeadBackend* backend : aead_backends()) {
    if (backend->available()) bench(*backend);
  }
  std::printf("in use: %s by %s, %s by %s\n", suite_name(Suite::aes_256_gcm).data(),
              aead_implementation(Suite::aes_256_gcm).data(),
              suite_name(Suite::chacha20_poly1305).data(),
              aead_implementation(Suite::chacha20_poly1305).data());
  return 0;
}
