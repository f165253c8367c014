#include "crypto/aead.h"

#include <array>
#include <cassert>
#include <cstring>
#include <new>
#include <utility>

#include "crypto/aead_backends.h"
#include "crypto/secret_memory.h"

namespace pqblk::crypto {

// In a forked child the whole of it reads as zeros, so a use there stops at the null back end
// instead of sealing under a key that everybody knows.
struct AeadKey::State {
  const AeadBackend* backend;
  alignas(kAeadStateAlign) std::byte expanded[kAeadStateBytes];
};

namespace {

// NIST SP 800-38D 5.2.1.1: 2^39 - 256 bits under one nonce. ChaCha20-Poly1305 has room for more.
constexpr std::uint64_t kMessageBytesMax = (std::uint64_t{1} << 36) - 32;

constexpr std::array kBackends = {
#if defined(__x86_64__)
    &kGcmAvx512,
#endif
#if defined(PQBLK_HAVE_IPSEC_MB)
    &kGcmIpsecMbAvx512,
#endif
#if defined(__x86_64__)
    &kGcmVaes,
#endif
#if defined(PQBLK_HAVE_IPSEC_MB)
    &kGcmIpsecMb,
#endif
    &kGcmLibcrypto,
#if defined(PQBLK_HAVE_IPSEC_MB)
    &kChachaIpsecMbAvx512,
#endif
    &kChachaLibcrypto,
#if defined(PQBLK_HAVE_IPSEC_MB)
    &kChachaIpsecMb,
#endif
};

const AeadBackend* first_available(Suite suite) {
  for (const AeadBackend* backend : kBackends) {
    if (backend->suite == suite && backend->available()) return backend;
  }
  return nullptr;
}

const AeadBackend* chosen(Suite suite) {
  static const AeadBackend* const gcm = first_available(Suite::aes_256_gcm);
  static const AeadBackend* const chacha = first_available(Suite::chacha20_poly1305);
  switch (suite) {
    case Suite::aes_256_gcm:
      return gcm;
    case Suite::chacha20_poly1305:
      return chacha;
  }
  return nullptr;
}

}  // namespace

std::span<const AeadBackend* const> aead_backends() { return kBackends; }

std::string_view suite_name(Suite suite) {
  switch (suite) {
    case Suite::aes_256_gcm:
      return "AES-256-GCM";
    case Suite::chacha20_poly1305:
      return "ChaCha20-Poly1305";
  }
  return "unknown";
}

std::string_view aead_implementation(Suite suite) {
  const AeadBackend* backend = chosen(suite);
  return backend == nullptr ? "none" : backend->name;
}

Result<AeadKey> AeadKey::create(Suite suite, std::span<const std::uint8_t, kKeyBytes> key) {
  const AeadBackend* backend = chosen(suite);
  if (backend == nullptr) {
    return Error(Kind::unsupported,
                 "this process has no implementation of " + std::string(suite_name(suite)))
        .at("expand key");
  }
  return create_with(*backend, key);
}

Result<AeadKey> AeadKey::create_with(const AeadBackend& backend,
                                     std::span<const std::uint8_t, kKeyBytes> key) {
  static_assert(sizeof(State) <= kAeadStateSlotBytes && alignof(State) == kAeadStateAlign);
  auto slot = secret_allocate(SecretSlot::aead_state);
  if (!slot) return slot.take_error();
  State* state = new (*slot) State;
  state->backend = &backend;
  if (!backend.expand(state->expanded, key.data())) {
    secret_release(SecretSlot::aead_state, state);
    return Error(Kind::no_memory, std::string(backend.name) + " refused the key").at("expand key");
  }
  return AeadKey(state);
}

bool aead_keys_scarce() {
  constexpr std::size_t kSlots =
      kAeadStateRegionsMax * (kAeadStateRegionBytes / kAeadStateSlotBytes);
  static_assert(kAeadStatesReserved < kSlots);
  return secret_slots_used(SecretSlot::aead_state) >= kSlots - kAeadStatesReserved;
}

AeadKey::AeadKey(AeadKey&& other) noexcept : state_(std::exchange(other.state_, nullptr)) {}

AeadKey& AeadKey::operator=(AeadKey&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}

AeadKey::~AeadKey() {
  if (state_ == nullptr) return;
  if (state_->backend != nullptr) state_->backend->release(state_->expanded);
  secret_release(SecretSlot::aead_state, state_);
}

void AeadKey::seal(const Nonce& nonce, std::span<const std::uint8_t> aad, const std::uint8_t* in,
                   std::uint8_t* out, std::size_t size, Tag& tag) const {
  assert(state_ != nullptr && state_->backend != nullptr);
  assert(size <= kMessageBytesMax);
  state_->backend->seal(state_->expanded, {nonce, aad, in, out, size}, tag);
}

bool AeadKey::open(const Nonce& nonce, std::span<const std::uint8_t> aad, const std::uint8_t* in,
                   std::uint8_t* out, std::size_t size, const Tag& tag) const {
  assert(state_ != nullptr && state_->backend != nullptr);
  assert(size <= kMessageBytesMax);
  const bool holds = state_->backend->open(state_->expanded, {nonce, aad, in, out, size}, tag);
  if (!holds && size > 0) std::memset(out, 0, size);
  return holds;
}

}  // namespace pqblk::crypto
