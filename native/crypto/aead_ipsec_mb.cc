// Both suites on intel-ipsec-mb's direct calls: no jobs, no queue, a message is sealed in the call.
//
// Room crypto/, rows of aead_backends.h; compiled to nothing where the library does not exist. Each
// suite has two rows of the same functions, because their places in the order of preference differ:
// with AVX-512 the library takes other kernels, much faster than those it has without.
#if defined(PQBLK_HAVE_IPSEC_MB)

#include <intel-ipsec-mb.h>

#include <cstring>

#include "crypto/aead_backends.h"
#include "crypto/kdf.h"

namespace pqblk::crypto {
namespace {

// Holds only pointers to functions and what the CPU has; the direct calls write nothing into it, so
// one serves all threads. Never freed: keys may outlive main.
IMB_MGR* manager() {
  static IMB_MGR* const instance = [] {
    IMB_MGR* fresh = alloc_mb_mgr(0);
    if (fresh != nullptr) init_mb_mgr_auto(fresh, nullptr);
    return fresh;
  }();
  return instance;
}

bool has(std::uint64_t features) {
  return manager() != nullptr && (manager()->features & features) == features;
}

bool gcm_available() { return has(IMB_FEATURE_AESNI | IMB_FEATURE_PCLMULQDQ | IMB_FEATURE_AVX); }

bool chacha_available() { return has(IMB_FEATURE_AVX); }

// With these the manager takes kernels on 512-bit registers for either suite.
bool avx512_available() {
  return has(IMB_FEATURE_AVX512_SKX | IMB_FEATURE_VAES | IMB_FEATURE_VPCLMULQDQ);
}

void release(void*) {}

// ---- AES-256-GCM -------------------------------------------------------------------------------

static_assert(sizeof(gcm_key_data) <= kAeadStateBytes && alignof(gcm_key_data) <= kAeadStateAlign);

bool gcm_expand(void* state, const std::uint8_t* key) {
  IMB_AES256_GCM_PRE(manager(), key, static_cast<gcm_key_data*>(state));
  return true;
}

void gcm_seal(const void* state, const AeadMessage& m, Tag& tag) {
  gcm_context_data context;
  IMB_AES256_GCM_ENC(manager(), static_cast<const gcm_key_data*>(state), &context, m.out, m.in,
                     m.size, m.nonce.data(), m.aad.data(), m.aad.size(), tag.data(), kTagBytes);
  wipe(&context, sizeof context);
}

bool gcm_open(const void* state, const AeadMessage& m, const Tag& tag) {
  gcm_context_data context;
  Tag computed;
  IMB_AES256_GCM_DEC(manager(), static_cast<const gcm_key_data*>(state), &context, m.out, m.in,
                     m.size, m.nonce.data(), m.aad.data(), m.aad.size(), computed.data(),
                     kTagBytes);
  wipe(&context, sizeof context);
  return equal_ct(computed, tag);
}

// ---- ChaCha20-Poly1305 -------------------------------------------------------------------------

bool chacha_expand(void* state, const std::uint8_t* key) {
  std::memcpy(state, key, kKeyBytes);
  return true;
}

void chacha_seal(const void* state, const AeadMessage& m, Tag& tag) {
  chacha20_poly1305_context_data context;
  IMB_CHACHA20_POLY1305_INIT(manager(), state, &context, m.nonce.data(), m.aad.data(),
                             m.aad.size());
  if (m.size > 0) {
    IMB_CHACHA20_POLY1305_ENC_UPDATE(manager(), state, &context, m.out, m.in, m.size);
  }
  IMB_CHACHA20_POLY1305_ENC_FINALIZE(manager(), &context, tag.data(), kTagBytes);
  wipe(&context, sizeof context);
}

bool chacha_open(const void* state, const AeadMessage& m, const Tag& tag) {
  chacha20_poly1305_context_data context;
  Tag computed;
  IMB_CHACHA20_POLY1305_INIT(manager(), state, &context, m.nonce.data(), m.aad.data(),
                             m.aad.size());
  if (m.size > 0) {
    IMB_CHACHA20_POLY1305_DEC_UPDATE(manager(), state, &context, m.out, m.in, m.size);
  }
  IMB_CHACHA20_POLY1305_DEC_FINALIZE(manager(), &context, computed.data(), kTagBytes);
  wipe(&context, sizeof context);
  return equal_ct(computed, tag);
}

}  // namespace

constinit const AeadBackend kGcmIpsecMbAvx512 = {
    Suite::aes_256_gcm, "ipsec-mb avx512", avx512_available, gcm_expand, release,
    gcm_seal,           gcm_open,
};
constinit const AeadBackend kGcmIpsecMb = {
    Suite::aes_256_gcm, "ipsec-mb", gcm_available, gcm_expand, release, gcm_seal, gcm_open,
};
constinit const AeadBackend kChachaIpsecMbAvx512 = {
    Suite::chacha20_poly1305,
    "ipsec-mb avx512",
    avx512_available,
    chacha_expand,
    release,
    chacha_seal,
    chacha_open,
};
constinit const AeadBackend kChachaIpsecMb = {
    Suite::chacha20_poly1305,
    "ipsec-mb",
    chacha_available,
    chacha_expand,
    release,
    chacha_seal,
    chacha_open,
};

}  // namespace pqblk::crypto

#endif  // PQBLK_HAVE_IPSEC_MB
