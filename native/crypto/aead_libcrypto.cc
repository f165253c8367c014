// Both suites on OpenSSL's libcrypto: everywhere, and what the other implementations are held to.
//
// Room crypto/, rows of aead_backends.h. An EVP context with its expanded key is not for two
// threads at once, so each key keeps as many as were ever in use together, and a thread finds the
// one that it used last. After warm-up a message allocates nothing. The contexts die with their
// key, which libcrypto then cleanses; they are in libcrypto's own heap, so that under this
// implementation only the raw key has the protection of secret memory.
#include <openssl/evp.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "crypto/aead_backends.h"

namespace pqblk::crypto {
namespace {

constexpr std::size_t kIdleMax = 128;        // more threads than this make contexts as they go
constexpr std::size_t kPieceMax = 1u << 30;  // EVP lengths are int

// A context that fails after its key was accepted has no error to give: the caller has no message
// to write. Never carry on with a wrong one.
void must(bool done, const char* what) {
  if (done) return;
  std::fprintf(stderr, "pqblk: libcrypto failed: %s\n", what);
  std::abort();
}

const EVP_CIPHER* cipher_of(Suite suite) {
  static EVP_CIPHER* const gcm = EVP_CIPHER_fetch(nullptr, "AES-256-GCM", nullptr);
  static EVP_CIPHER* const chacha = EVP_CIPHER_fetch(nullptr, "ChaCha20-Poly1305", nullptr);
  return suite == Suite::aes_256_gcm ? gcm : chacha;
}

struct LibcryptoState {
  std::uint8_t key[kKeyBytes];
  std::atomic<EVP_CIPHER_CTX*> idle[kIdleMax];
};
static_assert(sizeof(LibcryptoState) <= kAeadStateBytes);
static_assert(std::atomic<EVP_CIPHER_CTX*>::is_always_lock_free);

EVP_CIPHER_CTX* new_context(Suite suite, const std::uint8_t* key) {
  EVP_CIPHER_CTX* context = EVP_CIPHER_CTX_new();
  if (context != nullptr &&
      EVP_EncryptInit_ex2(context, cipher_of(suite), key, nullptr, nullptr) == 1) {
    return context;
  }
  EVP_CIPHER_CTX_free(context);
  return nullptr;
}

// Where this thread begins to look; neighbours differ.
std::size_t home_of_thread() {
  static std::atomic<std::size_t> threads{0};
  static thread_local const std::size_t home = threads.fetch_add(1, std::memory_order_relaxed);
  return home;
}

// One context, borrowed for one message.
class Borrowed {
 public:
  Borrowed(Suite suite, LibcryptoState& state) : state_(state) {
    for (std::size_t i = 0; i < kIdleMax && context_ == nullptr; ++i) {
      std::atomic<EVP_CIPHER_CTX*>& place = place_at(i);
      if (place.load(std::memory_order_relaxed) == nullptr) continue;
      context_ = place.exchange(nullptr, std::memory_order_acquire);
    }
    if (context_ == nullptr) context_ = new_context(suite, state.key);
    must(context_ != nullptr, "no memory for a cipher context");
  }
  ~Borrowed() {
    for (std::size_t i = 0; i < kIdleMax; ++i) {
      EVP_CIPHER_CTX* empty = nullptr;
      if (place_at(i).compare_exchange_strong(empty, context_, std::memory_order_release,
                                              std::memory_order_relaxed)) {
        return;
      }
    }
    EVP_CIPHER_CTX_free(context_);
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

  EVP_CIPHER_CTX* get() { return context_; }

 private:
  std::atomic<EVP_CIPHER_CTX*>& place_at(std::size_t i) {
    return state_.idle[(home_of_thread() + i) % kIdleMax];
  }

  LibcryptoState& state_;
  EVP_CIPHER_CTX* context_ = nullptr;
};

// `out` is null for associated data.
void update(EVP_CIPHER_CTX* context, const std::uint8_t* in, std::uint8_t* out, std::size_t size) {
  while (size > 0) {
    const std::size_t piece = std::min(size, kPieceMax);
    int written = 0;
    must(EVP_CipherUpdate(context, out, &written, in, static_cast<int>(piece)) == 1 &&
             static_cast<std::size_t>(written) == piece,
         "cipher update");
    in += piece;
    if (out != nullptr) out += piece;
    size -= piece;
  }
}

template <Suite kSuite>
bool available() {
  return cipher_of(kSuite) != nullptr;
}

template <Suite kSuite>
bool expand(void* memory, const std::uint8_t* key) {
  auto* state = new (memory) LibcryptoState{};
  std::memcpy(state->key, key, kKeyBytes);
  EVP_CIPHER_CTX* first = new_context(kSuite, key);
  if (first == nullptr) return false;
  state->idle[home_of_thread() % kIdleMax].store(first, std::memory_order_release);
  return true;
}

void release(void* memory) {
  auto* state = static_cast<LibcryptoState*>(memory);
  for (auto& place : state->idle) {
    EVP_CIPHER_CTX_free(place.exchange(nullptr, std::memory_order_acquire));
  }
}

// The pool of contexts is the one part of an expanded key that changes, and it is atomic.
LibcryptoState& pool_in(const void* state) {
  return *static_cast<LibcryptoState*>(const_cast<void*>(state));
}

template <Suite kSuite>
void seal(const void* state, const AeadMessage& m, Tag& tag) {
  Borrowed context(kSuite, pool_in(state));
  must(EVP_CipherInit_ex2(context.get(), nullptr, nullptr, m.nonce.data(), 1, nullptr) == 1,
       "nonce");
  update(context.get(), m.aad.data(), nullptr, m.aad.size());
  update(context.get(), m.in, m.out, m.size);
  int written = 0;
  std::uint8_t nothing[kTagBytes];
  must(EVP_CipherFinal_ex(context.get(), nothing, &written) == 1 && written == 0, "cipher final");
  must(EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_AEAD_GET_TAG, kTagBytes, tag.data()) == 1,
       "tag");
}

template <Suite kSuite>
bool open(const void* state, const AeadMessage& m, const Tag& tag) {
  Borrowed context(kSuite, pool_in(state));
  must(EVP_CipherInit_ex2(context.get(), nullptr, nullptr, m.nonce.data(), 0, nullptr) == 1,
       "nonce");
  Tag expected = tag;  // the control call wants memory that it could write to
  must(EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_AEAD_SET_TAG, kTagBytes, expected.data()) == 1,
       "tag");
  update(context.get(), m.aad.data(), nullptr, m.aad.size());
  update(context.get(), m.in, m.out, m.size);
  int written = 0;
  std::uint8_t nothing[kTagBytes];
  return EVP_CipherFinal_ex(context.get(), nothing, &written) == 1;
}

template <Suite kSuite>
constexpr AeadBackend row() {
  return {kSuite,  "libcrypto",  available<kSuite>, expand<kSuite>,
          release, seal<kSuite>, open<kSuite>};
}

}  // namespace

constinit const AeadBackend kGcmLibcrypto = row<Suite::aes_256_gcm>();
constinit const AeadBackend kChachaLibcrypto = row<Suite::chacha20_poly1305>();

}  // namespace pqblk::crypto
