// Every AEAD implementation that this machine can run, held to libcrypto over all shapes of
// message.
#include "crypto/aead.h"

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "crypto/aead_backends.h"
#include "crypto/aead_oracle.h"

using namespace pqblk::crypto;
using pqblk::Kind;
using pqblk::Result;
using pqblk::test::Bytes;
using pqblk::test::first_difference;
using pqblk::test::oracle_seal;
using pqblk::test::random_content;
using pqblk::test::random_nonce;
using pqblk::test::Sealed;
using pqblk::test::Shape;

namespace {

constexpr std::uint64_t kSeed = 0x70716c6b;  // the shapes are exhaustive; only contents are random

AeadKey key_for(const AeadBackend& backend, const Bytes& raw) {
  auto key = AeadKey::create_with(backend, std::span<const std::uint8_t, kKeyBytes>(raw));
  REQUIRE(key);
  return std::move(*key);
}

template <typename Check>
void for_each_backend(Check check) {
  for (const AeadBackend* backend : aead_backends()) {
    if (!backend->available()) continue;
    const std::string which =
        std::string(suite_name(backend->suite)) + " " + std::string(backend->name);
    CAPTURE(which);
    check(*backend);
  }
}

// Two pages between two that nobody may touch.
class Fenced {
 public:
  static constexpr std::size_t kPage = 4096;
  static constexpr std::size_t kSize = 2 * kPage;

  Fenced() {
    void* all = ::mmap(nullptr, kSize + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(all != MAP_FAILED);
    begin_ = static_cast<std::uint8_t*>(all) + kPage;
    REQUIRE(::mprotect(begin_, kSize, PROT_READ | PROT_WRITE) == 0);
  }
  ~Fenced() { ::munmap(begin_ - kPage, kSize + 2 * kPage); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  std::uint8_t* first() { return begin_; }
  std::uint8_t* last(std::size_t size) { return begin_ + kSize - size; }

 private:
  std::uint8_t* begin_;
};

// An implementation that is right but for one bit of one byte of one size.
constexpr std::size_t kFaultySize = 4097;
extern const AeadBackend kFaulty;
void faulty_seal(const void* state, const AeadMessage& message, Tag& tag) {
  kGcmLibcrypto.seal(state, message, tag);
  if (message.size == kFaultySize) message.out[kFaultySize - 1] ^= 0x10;
}
const AeadBackend kFaulty = [] {
  AeadBackend faulty = kGcmLibcrypto;
  faulty.seal = faulty_seal;
  return faulty;
}();

}  // namespace

TEST_CASE("each suite has an implementation, and the first available one is used") {
  for (const Suite suite : {Suite::aes_256_gcm, Suite::chacha20_poly1305}) {
    const auto rows = aead_backends();
    const auto first = std::find_if(rows.begin(), rows.end(), [&](const AeadBackend* row) {
      return row->suite == suite && row->available();
    });
    REQUIRE(first != rows.end());
    CHECK(aead_implementation(suite) == (*first)->name);
  }
  CHECK(suite_name(Suite::aes_256_gcm) == "AES-256-GCM");
  CHECK(suite_name(Suite::chacha20_poly1305) == "ChaCha20-Poly1305");
  for (const AeadBackend* row : aead_backends()) {
    if (row->available()) continue;
    std::printf("NOTE: this CPU cannot run %s for %s, so it was not tested\n",
                std::string(row->name).c_str(), std::string(suite_name(row->suite)).c_str());
  }
}

TEST_CASE("all sizes from 0 to 5000 at odd alignments") {
  for_each_backend([](const AeadBackend& backend) {
    std::mt19937_64 random(kSeed);
    for (std::size_t size = 0; size <= 5000; ++size) {
      const Shape shape{size, random() % 48, random() % 64, random() % 64};
      CAPTURE(shape.size);
      CAPTURE(shape.aad_size);
      REQUIRE(first_difference(backend, shape, random) == "");
    }
  });
}

TEST_CASE("all sizes of associated data from 0 to 200, and whole log blocks") {
  std::vector<std::size_t> aad_sizes{240, 255, 256,  257,  272,  511,
                                     512, 513, 4080, 4095, 4096, 4097};
  for (std::size_t size = 0; size <= 200; ++size) aad_sizes.push_back(size);
  for_each_backend([&](const AeadBackend& backend) {
    std::mt19937_64 random(kSeed + 1);
    for (const std::size_t aad_size : aad_sizes) {
      for (const std::size_t size : {0u, 1u, 15u, 16u, 36u, 255u, 256u, 4096u}) {
        const Shape shape{size, aad_size, random() % 32, random() % 32};
        CAPTURE(shape.size);
        CAPTURE(shape.aad_size);
        REQUIRE(first_difference(backend, shape, random) == "");
      }
    }
  });
}

// The sanitizer does not see what a masked load or store touches, nor what libraries do.
TEST_CASE("nothing before or behind a message is touched") {
  Fenced in, out, data;
  for_each_backend([&](const AeadBackend& backend) {
    std::mt19937_64 random(kSeed + 7);
    const Bytes raw = random_content(random, kKeyBytes);
    const AeadKey key = key_for(backend, raw);
    for (std::size_t size = 0; size <= 1100; ++size) {
      const std::size_t aad_size = size * 7 % 601;
      const Bytes message = random_content(random, size);
      const Bytes aad = random_content(random, aad_size);
      const Nonce nonce = random_nonce(random);
      const Sealed expected = oracle_seal(backend.suite, raw, nonce, aad, message);
      for (const bool at_end : {false, true}) {
        const auto place = [&](Fenced& f, std::size_t n) { return at_end ? f.last(n) : f.first(); };
        std::uint8_t *const from = place(in, size), *const to = place(out, size);
        std::uint8_t* const extra = place(data, aad_size);
        std::copy(message.begin(), message.end(), from);
        std::copy(aad.begin(), aad.end(), extra);
        Tag tag;
        key.seal(nonce, {extra, aad_size}, from, to, size, tag);
        REQUIRE(tag == expected.tag);
        REQUIRE(std::equal(expected.ciphertext.begin(), expected.ciphertext.end(), to));
        REQUIRE(key.open(nonce, {extra, aad_size}, to, from, size, tag));
        REQUIRE(std::equal(message.begin(), message.end(), from));
      }
    }
  });
}

TEST_CASE("long messages carry the counter past its low bytes") {
  for_each_backend([](const AeadBackend& backend) {
    std::mt19937_64 random(kSeed + 2);
    for (const std::size_t size : {std::size_t{1} << 20, (std::size_t{3} << 20) + 17}) {
      REQUIRE(first_difference(backend, {size, 36, 3, 5}, random) == "");
    }
  });
}

TEST_CASE("a planted error is found") {
  std::mt19937_64 random(kSeed);
  CHECK(first_difference(kFaulty, {kFaultySize - 1, 36, 0, 0}, random) == "");
  CHECK(first_difference(kFaulty, {kFaultySize, 36, 0, 0}, random) == "seal: ciphertext");
}

TEST_CASE("a changed bit anywhere is refused and leaves zeros") {
  for_each_backend([](const AeadBackend& backend) {
    std::mt19937_64 random(kSeed + 3);
    const Bytes raw = random_content(random, kKeyBytes);
    const AeadKey key = key_for(backend, raw);
    const Nonce nonce = random_nonce(random);
    const Bytes aad = random_content(random, 36);
    const Bytes message = random_content(random, 517);
    const Sealed sealed = oracle_seal(backend.suite, raw, nonce, aad, message);
    const auto flipped = [](auto bytes, std::size_t bit) {
      bytes[bit / 8] = static_cast<std::uint8_t>(bytes[bit / 8] ^ (1u << bit % 8));
      return bytes;
    };
    const auto refused = [&](const Nonce& n, const Bytes& a, Bytes c, const Tag& t) {
      Bytes out(c.size(), 0xAA);
      const bool disjoint =
          !key.open(n, a, c.data(), out.data(), c.size(), t) && out == Bytes(c.size(), 0);
      const bool in_place = !key.open(n, a, c.data(), c.data(), c.size(), t) && c == out;
      return disjoint && in_place;
    };
    REQUIRE_FALSE(refused(nonce, aad, sealed.ciphertext, sealed.tag));
    for (std::size_t bit = 0; bit < 8 * kTagBytes; ++bit) {
      REQUIRE(refused(nonce, aad, sealed.ciphertext, flipped(sealed.tag, bit)));
    }
    for (std::size_t bit = 0; bit < 8 * kNonceBytes; ++bit) {
      REQUIRE(refused(flipped(nonce, bit), aad, sealed.ciphertext, sealed.tag));
    }
    for (std::size_t bit = 0; bit < 8 * aad.size(); ++bit) {
      REQUIRE(refused(nonce, flipped(aad, bit), sealed.ciphertext, sealed.tag));
    }
    for (std::size_t bit = 0; bit < 8 * message.size(); ++bit) {
      REQUIRE(refused(nonce, aad, flipped(sealed.ciphertext, bit), sealed.tag));
    }
    const Bytes shorter(sealed.ciphertext.begin(), sealed.ciphertext.begin() + 516);
    CHECK(refused(nonce, aad, shorter, sealed.tag));
    CHECK(refused(nonce, {}, sealed.ciphertext, sealed.tag));
  });
}

#if defined(__x86_64__)
// The sixteen registers that no code without AVX-512 overwrites.
Bytes upper_registers() {
  Bytes bytes(16 * 64);
#define PQBLK_STORE(n, at) "vmovdqu64 %%zmm" #n ", " #at "(%0)\n\t"
  asm volatile(PQBLK_STORE(16, 0) PQBLK_STORE(17, 64) PQBLK_STORE(18, 128) PQBLK_STORE(19, 192)
                   PQBLK_STORE(20, 256) PQBLK_STORE(21, 320) PQBLK_STORE(22, 384)
                       PQBLK_STORE(23, 448) PQBLK_STORE(24, 512) PQBLK_STORE(25, 576)
                           PQBLK_STORE(26, 640) PQBLK_STORE(27, 704) PQBLK_STORE(28, 768)
                               PQBLK_STORE(29, 832) PQBLK_STORE(30, 896) PQBLK_STORE(31, 960)
               :
               : "r"(bytes.data())
               : "memory");
#undef PQBLK_STORE
  return bytes;
}

TEST_CASE("the AVX-512 kernel leaves no key material in registers") {
  bool looked = false;
  for_each_backend([&looked](const AeadBackend& backend) {
    if (backend.name != "vaes-avx512") return;
    looked = true;
    const Bytes none(16 * 64, 0);
    std::mt19937_64 random(kSeed + 6);
    const AeadKey key = key_for(backend, random_content(random, kKeyBytes));
    CHECK(upper_registers() == none);
    for (const std::size_t size : {0u, 36u, 512u, 4096u, 4097u}) {
      Bytes buffer = random_content(random, size);
      const Bytes aad = random_content(random, 36);
      Tag tag;
      key.seal(Nonce{}, aad, buffer.data(), buffer.data(), size, tag);
      CHECK(upper_registers() == none);
      CHECK(key.open(Nonce{}, aad, buffer.data(), buffer.data(), size, tag));
      CHECK(upper_registers() == none);
    }
  });
  if (!looked) std::printf("SKIP: this CPU cannot run vaes-avx512: no test looks at it\n");
}
#endif

TEST_CASE("one key serves many threads, and many keys one thread") {
  constexpr std::size_t kThreads = 4;
  constexpr std::size_t kMessages = 64;
  constexpr std::size_t kRounds = 40;
  for_each_backend([](const AeadBackend& backend) {
    std::mt19937_64 random(kSeed + 4);
    struct Case {
      Nonce nonce;
      Bytes aad, message;
      Sealed sealed[2];  // under either key
    };
    const Bytes raw[2] = {random_content(random, kKeyBytes), random_content(random, kKeyBytes)};
    const AeadKey keys[2] = {key_for(backend, raw[0]), key_for(backend, raw[1])};
    std::vector<Case> cases;
    for (std::size_t i = 0; i < kMessages; ++i) {
      Case c{random_nonce(random),
             random_content(random, 36),
             random_content(random, random() % 4500),
             {}};
      for (int k : {0, 1}) {
        c.sealed[k] = oracle_seal(backend.suite, raw[k], c.nonce, c.aad, c.message);
      }
      cases.push_back(std::move(c));
    }
    std::vector<std::size_t> wrong(kThreads, 0);
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        Bytes buffer(4500);
        for (std::size_t i = 0; i < kRounds * kMessages; ++i) {
          const Case& c = cases[(i + 7 * t) % kMessages];
          const std::size_t k = (i / 3 + t) % 2;
          const std::size_t size = c.message.size();
          Tag tag;
          keys[k].seal(c.nonce, c.aad, c.message.data(), buffer.data(), size, tag);
          const bool same =
              tag == c.sealed[k].tag && std::equal(c.sealed[k].ciphertext.begin(),
                                                   c.sealed[k].ciphertext.end(), buffer.begin());
          const bool opened =
              keys[k].open(c.nonce, c.aad, buffer.data(), buffer.data(), size, tag) &&
              std::equal(c.message.begin(), c.message.end(), buffer.begin());
          if (!same || !opened) ++wrong[t];
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == std::vector<std::size_t>(kThreads, 0));
  });
}

TEST_CASE("a key moves, and its old name is empty") {
  std::mt19937_64 random(kSeed + 5);
  const Bytes raw = random_content(random, kKeyBytes);
  auto made = AeadKey::create(Suite::aes_256_gcm, std::span<const std::uint8_t, kKeyBytes>(raw));
  REQUIRE(made);
  AeadKey first = std::move(*made);
  AeadKey second = std::move(first);
  auto other =
      AeadKey::create(Suite::chacha20_poly1305, std::span<const std::uint8_t, kKeyBytes>(raw));
  REQUIRE(other);
  second = std::move(*other);
  const Nonce nonce = random_nonce(random);
  const Bytes message = random_content(random, 100);
  Bytes out(100);
  Tag tag;
  second.seal(nonce, {}, message.data(), out.data(), out.size(), tag);
  const Sealed expected = oracle_seal(Suite::chacha20_poly1305, raw, nonce, {}, message);
  CHECK(out == expected.ciphertext);
  CHECK(tag == expected.tag);
}

TEST_CASE("a forked child cannot seal under a key of zeros") {
  std::mt19937_64 random(kSeed + 6);
  for_each_backend([&](const AeadBackend& backend) {
    const AeadKey key = key_for(backend, random_content(random, kKeyBytes));
    std::cout.flush();  // or the child that dies of a signal may say it again
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(STDERR_FILENO);
      std::signal(SIGABRT, SIG_DFL);
      Bytes buffer(64);
      Tag tag;
      key.seal(Nonce{}, {}, buffer.data(), buffer.data(), buffer.size(), tag);
      ::_exit(0);
    }
    REQUIRE(child > 0);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK_FALSE((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  });
}
