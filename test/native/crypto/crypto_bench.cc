// bench_crypto: GB/s of one core for each AEAD implementation that this CPU can run.
//
// The shapes are the product's: sealed sectors (4 KiB under 36 bytes of associated data), log
// blocks (4 KiB of associated data and no message), and large messages for the limit of each
// kernel.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "crypto/aead.h"
#include "crypto/aead_backends.h"
#include "crypto/kdf.h"

using namespace pqblk::crypto;

namespace {

constexpr std::size_t kSector = 4096;
constexpr std::size_t kAad = 36;
constexpr std::size_t kRing = 16;         // sectors in turn: 64 KiB in, 64 KiB out
constexpr double kSecondsPerRun = 0.003;  // shorter than a time slice, to fall between other work
constexpr int kRuns = 150;

// The best of several runs, in bytes per nanosecond: what the machine can do when left alone.
template <typename Operation>
double gigabytes_per_second(std::size_t bytes, Operation operation) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
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

Nonce nonce_for(std::uint64_t n) {
  Nonce nonce{};
  for (std::size_t i = 0; i < 8; ++i) nonce[i] = static_cast<std::uint8_t>(n >> 8 * i);
  return nonce;
}

void bench(const AeadBackend& backend) {
  std::array<std::uint8_t, kKeyBytes> raw{};
  std::vector<std::uint8_t> in(kRing * kSector), out(in.size()), back(in.size()), aad(kSector);
  if (random_bytes(raw) || random_bytes(in) || random_bytes(aad)) std::abort();
  auto key = AeadKey::create_with(backend, raw);
  if (!key) std::abort();
  const std::span<const std::uint8_t> sector_aad(aad.data(), kAad);

  std::vector<Tag> tags(kRing);
  const double seal = gigabytes_per_second(kSector, [&](std::size_t n) {
    const std::size_t at = n % kRing;
    key->seal(nonce_for(at), sector_aad, &in[at * kSector], &out[at * kSector], kSector, tags[at]);
  });
  bool opened = true;
  const double open = gigabytes_per_second(kSector, [&](std::size_t n) {
    const std::size_t at = n % kRing;
    opened = key->open(nonce_for(at), sector_aad, &out[at * kSector], &back[at * kSector], kSector,
                       tags[at]) &&
             opened;
  });
  Tag tag;
  const double gmac = gigabytes_per_second(
      kSector, [&](std::size_t n) { key->seal(nonce_for(n), aad, nullptr, nullptr, 0, tag); });
  const double large = gigabytes_per_second(in.size(), [&](std::size_t n) {
    key->seal(nonce_for(n), sector_aad, in.data(), out.data(), in.size(), tag);
  });
  std::printf("%-18s %-16s %9.2f %9.2f %9.2f %9.2f%s\n", suite_name(backend.suite).data(),
              backend.name.data(), seal, open, gmac, large, opened ? "" : "  OPEN FAILED");
}

}  // namespace

int main() {
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
