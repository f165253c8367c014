// A PKCS#11 module for tests: a token over real ML-KEM that speaks like a vendor (numbers of the
// QUAC 100, C_DeriveKey or C_Decrypt) and like the standard (3.2), and that misbehaves on request.
//
// Built for tests alone. What it keeps is in state.h; `mode` there names the misbehaviour, at the
// place in this file that looks for it. One session, no threads.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <random>

#include "ml_kem.h"
#include "pkcs11/cryptoki.h"
#include "state.h"

using namespace pqblk::pkcs11;
using namespace test_token;

namespace {

constexpr Rv kGeneralError = 0x05, kArgumentsBad = 0x07, kDeviceMemory = 0x31,
             kDeviceRemoved = 0x32, kCiphertextLength = 0x41, kKeyHandleInvalid = 0x60,
             kObjectHandleInvalid = 0x82, kPinIncorrect = 0xa0, kPinLocked = 0xa4,
             kSessionHandleInvalid = 0xb3, kSessionReadOnly = 0xb5, kNotLoggedIn = 0x101,
             kPinNotInitialized = 0x102, kBufferTooSmall = 0x150;
constexpr Ulong kClass = 0, kLabel = 3, kValue = 0x11, kKeyType = 0x100, kId = 0x102,
                kSensitive = 0x103, kExtractable = 0x162, kParameterSet = 0x61d,
                kEncapsulate = 0x633, kDecapsulate = 0x634;
constexpr Ulong kPublic = 2, kPrivate = 3, kStandardKeyType = 0x49;
constexpr Handle kSession = 77;
constexpr SlotId kSlot = 5;
constexpr std::size_t kKeysMax = 16;

enum class Login { none, user, security_officer };

struct Session {
  bool open = false;
  bool read_write = false;
  Login login = Login::none;
  std::vector<Handle> found;
  Handle decrypt_key = 0;
  std::map<Handle, Bytes> secrets;
  Handle next_secret = 1000000;
};
Session session;

bool mode_is(const char* word) { return mode() == word; }

Rv require_session(Handle handle) {
  return session.open && handle == kSession ? kOk : kSessionHandleInvalid;
}

const ParameterSet& set_of(unsigned long kem) { return kem == 768 ? kMlKem768 : kMlKem1024; }

Ulong vendor_key_type(unsigned long kem) { return 0x80000000UL + (kem == 768 ? 2 : 3); }

// Private halves have odd handles, public ones the next even one.
const Key* key_of(const State& state, Handle handle) {
  const std::size_t index = (handle - 1) / 2;
  return handle > 0 && index < state.keys.size() ? &state.keys[index] : nullptr;
}

bool is_private(Handle handle) { return handle % 2 == 1; }

Bytes bytes_of(Ulong value) {
  Bytes bytes(sizeof value);
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

Bytes bytes_of(const Attribute& attribute) {
  const auto* at = static_cast<const std::uint8_t*>(attribute.value);
  return {at, at + attribute.bytes};
}

std::optional<Bytes> in(const Attribute* list, Ulong count, Ulong type) {
  for (Ulong i = 0; i < count; ++i) {
    if (list[i].type == type) return bytes_of(list[i]);
  }
  return std::nullopt;
}

std::optional<Bytes> attribute_of(const Key& key, Handle handle, Ulong type) {
  switch (type) {
    case kClass:
      return bytes_of(is_private(handle) ? kPrivate : kPublic);
    case kLabel:
      return key.label;
    case kId:
      return key.id;
    case kKeyType:
      return bytes_of(vendor_key_type(key.kem));
    case kParameterSet:
      return bytes_of(Ulong{key.kem == 768 ? 2U : 3U});
    case kSensitive:
      return is_private(handle) ? std::optional(Bytes{1}) : std::nullopt;
    case kExtractable:
      return is_private(handle) ? std::optional(Bytes{key.extractable}) : std::nullopt;
    case kValue:
      if (is_private(handle)) return std::nullopt;
      break;
    default:
      return std::nullopt;
  }
  Bytes ek = key.ek;
  if (mode_is("other-public-key")) ek = key_gen(set_of(key.kem), {1}, {2}).ek;
  if (mode_is("unreduced-public-key")) std::fill_n(ek.begin(), 3, std::uint8_t{0xff});
  if (mode_is("short-public-key")) ek.pop_back();
  return ek;
}

bool matches(const Key& key, Handle handle, const Attribute& wanted) {
  if (wanted.type == kKeyType && bytes_of(wanted) == bytes_of(kStandardKeyType)) return true;
  return attribute_of(key, handle, wanted.type) == bytes_of(wanted);
}

template <std::size_t N>
void pad(Byte (&field)[N], std::string_view text) {
  std::memset(field, ' ', N);
  std::memcpy(field, text.data(), std::min(N, text.size()));
}

// ---- general -----------------------------------------------------------------------------------

Rv initialize(void*) {
  if (mode_is("crash-at-start")) ::raise(SIGSEGV);
  if (mode_is("hang-at-start")) ::pause();
  if (mode_is("forks-and-crashes")) {
    fork_and_stay();
    ::raise(SIGSEGV);
  }
  if (mode_is("noisy")) {
    // What a debugging build might do to whoever lent it its descriptors.
    for (int fd = 1; fd <= 2; ++fd) (void)!::write(fd, "DEBUG pin=1234\n", 15);
  }
  if (mode_is("tells-its-environment")) tell_environment();
  if (mode_is("writes-to-the-socket")) (void)!::write(3, "\x05\0\0\0\0xxxx", 9);
  return kOk;
}

Rv finalize(void*) {
  if (mode_is("hang-at-end")) ::pause();
  if (mode_is("tells-its-end")) tell_end();
  session = {};
  return kOk;
}

Rv get_info(Info* info) {
  *info = {};
  info->cryptoki = {2, 40};
  pad(info->manufacturer, "pqblk tests");
  pad(info->library, "test token");
  info->library_version = {1, 0};
  return kOk;
}

Rv get_slot_list(Byte, SlotId* slots, Ulong* count) {
  if (mode_is("no-token")) {
    *count = 0;
    return kOk;
  }
  if (slots != nullptr) {
    if (*count < 1) return kBufferTooSmall;
    slots[0] = kSlot;
  }
  *count = mode_is("many-slots") ? 100000 : 1;
  return kOk;
}

Rv get_slot_info(SlotId, SlotInfo* info) {
  *info = {};
  pad(info->description, "test slot");
  info->flags = 1;
  return kOk;
}

Rv get_token_info(SlotId, TokenInfo* info) {
  *info = {};
  pad(info->label, mode_is("rude-label") ? "evil\x1b[2Jtoken" : "Test token");
  pad(info->manufacturer, "pqblk tests");
  pad(info->model, "model");
  pad(info->serial, "0042");
  const State state = State::read();
  info->flags = 0x404 | (state.pin ? 0x8 : 0);
  if (state.tries_left < 3) info->flags |= 0x10000;
  if (state.tries_left == 1) info->flags |= 0x20000;
  if (state.tries_left == 0) info->flags |= 0x40000;
  if (mode_is("so-final-try")) info->flags |= 0x200000;
  if (mode_is("so-locked")) info->flags |= 0x400000;
  if (mode_is("pinpad")) info->flags |= 0x100;
  if (mode_is("no-login")) info->flags &= ~Ulong{4};
  return kOk;
}

std::optional<unsigned long> kem_of_mechanism(Ulong mechanism) {
  switch (mechanism) {
    case 0x80000002UL:
    case 0x80000008UL:
      return 768;
    case 0x80000003UL:
    case 0x80000009UL:
      return 1024;
    default:
      return std::nullopt;
  }
}

Rv get_mechanism_info(SlotId, Ulong mechanism, MechanismInfo* info) {
  const bool standard = mechanism == 0x0f || mechanism == 0x17;
  if (!standard && !kem_of_mechanism(mechanism)) return kMechanismInvalid;
  *info = {};
  return kOk;
}

// ---- session -----------------------------------------------------------------------------------

Rv open_session(SlotId slot, Ulong flags, void*, void*, Handle* handle) {
  if (slot != kSlot) return 0x03;
  session = {};
  session.open = true;
  session.read_write = (flags & kReadWriteSession) != 0;
  *handle = kSession;
  return kOk;
}

Rv close_session(Handle handle) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  session = {};
  return kOk;
}

Rv login(Handle handle, Ulong user, Byte* pin, Ulong bytes) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  if (mode_is("crash-at-login")) ::raise(SIGSEGV);
  if (mode_is("pin-incorrect")) return kPinIncorrect;
  if (mode_is("pin-locked")) return kPinLocked;
  if (mode_is("pin-expired")) return 0xa3;
  const Bytes given = pin == nullptr ? Bytes{} : Bytes(pin, pin + bytes);
  State state = State::read();
  if (user == kSecurityOfficer) {
    if (given != Bytes{'s', 'o'}) return kPinIncorrect;
    session.login = Login::security_officer;
    return kOk;
  }
  if (!state.pin) return kPinNotInitialized;
  if (state.tries_left == 0) return kPinLocked;
  if (mode_is("pinpad") ? pin != nullptr : given != *state.pin) {
    --state.tries_left;
    state.write();
    return kPinIncorrect;
  }
  if (state.tries_left != 3) {
    state.tries_left = 3;
    state.write();
  }
  session.login = Login::user;
  return kOk;
}

Rv logout(Handle handle) {
  session.login = Login::none;
  return require_session(handle);
}

Rv init_pin(Handle handle, Byte* pin, Ulong bytes) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  if (session.login != Login::security_officer) return kNotLoggedIn;
  State state = State::read();
  state.pin = Bytes(pin, pin + bytes);
  state.tries_left = 3;
  state.write();
  return kOk;
}

// ---- objects -----------------------------------------------------------------------------------

Rv find_objects_init(Handle handle, Attribute* list, Ulong count) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  session.found.clear();
  const State state = State::read();
  for (Handle object = 1; object <= 2 * state.keys.size(); ++object) {
    if (is_private(object) && session.login != Login::user && !mode_is("no-login")) continue;
    if (!is_private(object) && mode_is("no-public-half")) continue;
    const Key& key = *key_of(state, object);
    if (std::all_of(list, list + count,
                    [&](const Attribute& wanted) { return matches(key, object, wanted); })) {
      session.found.push_back(object);
    }
  }
  return kOk;
}

Rv find_objects(Handle handle, Handle* objects, Ulong max, Ulong* count) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  if (mode_is("endless-objects")) {
    std::fill_n(objects, max, Handle{1});
    *count = max;
    return kOk;
  }
  *count = std::min<Ulong>(max, session.found.size());
  std::copy_n(session.found.begin(), *count, objects);
  session.found.erase(session.found.begin(), session.found.begin() + static_cast<long>(*count));
  if (mode_is("overrun")) *count = max + 1;
  return kOk;
}

Rv find_objects_final(Handle handle) { return require_session(handle); }

Rv give(Attribute& attribute, const Bytes& value) {
  if (attribute.value != nullptr) {
    if (attribute.bytes < value.size()) {
      attribute.bytes = kUnavailable;
      return kBufferTooSmall;
    }
    std::copy(value.begin(), value.end(), static_cast<std::uint8_t*>(attribute.value));
  }
  attribute.bytes = value.size();
  if (mode_is("growing-attributes") && attribute.value != nullptr) ++attribute.bytes;
  return kOk;
}

Rv get_attribute_value(Handle handle, Handle object, Attribute* list, Ulong count) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  const State state = State::read();
  const auto secret = session.secrets.find(object);
  const Key* key = key_of(state, object);
  Rv result = kOk;
  for (Ulong i = 0; i < count; ++i) {
    std::optional<Bytes> value;
    if (secret != session.secrets.end()) {
      if (list[i].type == kValue) value = secret->second;
    } else if (key != nullptr) {
      value = attribute_of(*key, object, list[i].type);
    } else {
      return kObjectHandleInvalid;
    }
    if (!value) {
      list[i].bytes = kUnavailable;
      result = kAttributeTypeInvalid;
    } else if (const Rv rv = give(list[i], *value); rv != kOk) {
      result = rv;
    }
  }
  return result;
}

// The halves of a pair have one life.
Rv destroy_object(Handle handle, Handle object) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  if (session.secrets.erase(object) > 0) return kOk;
  State state = State::read();
  if (key_of(state, object) == nullptr) return kObjectHandleInvalid;
  state.keys.erase(state.keys.begin() + static_cast<long>((object - 1) / 2));
  state.write();
  return kOk;
}

// An ML-KEM private key by its expanded form, for vectors.
Rv create_object(Handle handle, Attribute* list, Ulong count, Handle* object) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  const std::optional<Bytes> value = in(list, count, kValue);
  const std::optional<Bytes> type = in(list, count, kKeyType);
  if (!value || !type) return kArgumentsBad;
  for (const unsigned long kem : {768UL, 1024UL}) {
    if (*type != bytes_of(vendor_key_type(kem))) continue;
    const ParameterSet& set = set_of(kem);
    if (value->size() != set.dk_bytes()) return kArgumentsBad;
    const auto ek = value->begin() + static_cast<long>(384 * set.k);
    State state = State::read();
    state.keys.push_back(
        {kem, {}, {}, *value, Bytes(ek, ek + static_cast<long>(set.ek_bytes())), false});
    state.write();
    *object = 2 * state.keys.size() - 1;
    return kOk;
  }
  return kArgumentsBad;
}

Bytes32 random_32() {
  std::random_device device;
  Bytes32 out;
  for (std::uint8_t& byte : out) byte = static_cast<std::uint8_t>(device());
  return out;
}

Rv generate_key_pair(Handle handle, Mechanism* mechanism, Attribute* pub, Ulong pub_count,
                     Attribute* priv, Ulong priv_count, Handle* pub_key, Handle* priv_key) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  if (session.login != Login::user) return kNotLoggedIn;
  if (!session.read_write) return kSessionReadOnly;
  std::optional<unsigned long> kem = kem_of_mechanism(mechanism->type);
  if (mechanism->type == 0x0f) {
    kem = in(pub, pub_count, kParameterSet) == bytes_of(Ulong{3}) ? 1024 : 768;
  } else if (in(pub, pub_count, kParameterSet) || in(pub, pub_count, kEncapsulate) ||
             in(priv, priv_count, kDecapsulate)) {
    return kAttributeTypeInvalid;  // a module of 2.40 never heard of them
  }
  if (!kem) return kMechanismInvalid;
  if (mode_is("other-parameter-set")) kem = 1024;
  const KeyPair pair = key_gen(set_of(*kem), random_32(), random_32());
  const bool extractable =
      mode_is("extractable") || in(priv, priv_count, kExtractable).value_or(Bytes{1}) != Bytes{0};
  State state = State::read();
  if (state.keys.size() >= kKeysMax) return kDeviceMemory;
  state.keys.push_back({*kem, in(priv, priv_count, kLabel).value_or(Bytes{}),
                        in(priv, priv_count, kId).value_or(Bytes{}), pair.dk, pair.ek,
                        extractable});
  state.write();
  *priv_key = 2 * state.keys.size() - 1;
  *pub_key = *priv_key + 1;
  return kOk;
}

// ---- decapsulation, in three dialects ----------------------------------------------------------

Rv decapsulated(Handle object, const Bytes& ciphertext, Bytes& secret) {
  if (mode_is("crash")) ::raise(SIGSEGV);
  if (mode_is("abort")) std::abort();
  if (mode_is("exit")) ::_exit(0);
  if (mode_is("hang")) ::pause();
  if (mode_is("slow")) ::usleep(300'000);
  if (mode_is("removed")) return kDeviceRemoved;
  if (mode_is("session-lost")) return kSessionHandleInvalid;
  if (mode_is("failed")) return kGeneralError;
  if (mode_is("vendor-error")) return 0x80000123UL;
  const State state = State::read();
  const Key* key = key_of(state, object);
  if (key == nullptr || !is_private(object)) return kKeyHandleInvalid;
  if (session.login != Login::user) return kNotLoggedIn;
  const ParameterSet& set = set_of(key->kem);
  if (ciphertext.size() != set.ciphertext_bytes()) return kCiphertextLength;
  const Bytes32 shared = decapsulate(set, key->dk, ciphertext);
  secret.assign(shared.begin(), shared.end());
  if (mode_is("wrong-secret")) secret[31] ^= 1;
  if (mode_is("constant-secret")) std::fill(secret.begin(), secret.end(), std::uint8_t{7});
  if (mode_is("short-secret")) secret.resize(16);
  if (mode_is("no-secret")) secret.clear();
  if (mode_is("long-secret")) secret.resize(64);
  // A token that does not reject: it remembers the last true secret, like a simulator that hashes
  // only a part of the ciphertext.
  static Bytes last;
  if (mode_is("sticky-secret")) {
    if (last.empty()) last = secret;
    secret = last;
  }
  return kOk;
}

Rv derive_key(Handle handle, Mechanism* mechanism, Handle object, Attribute*, Ulong, Handle* made) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  const bool known = mechanism->type == 0x80000008UL || mechanism->type == 0x80000009UL;
  if (!known || mode_is("derive-missing")) return 0x54;
  const auto* at = static_cast<const std::uint8_t*>(mechanism->parameter);
  Bytes secret;
  const Rv rv = decapsulated(object, Bytes(at, at + mechanism->parameter_bytes), secret);
  if (rv != kOk) return rv;
  *made = session.next_secret++;
  session.secrets[*made] = secret;
  return kOk;
}

Rv decapsulate_key(Handle handle, Mechanism* mechanism, Handle object, Attribute*, Ulong,
                   Byte* ciphertext, Ulong bytes, Handle* made) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  if (mechanism->type != 0x17) return kMechanismInvalid;
  Bytes secret;
  const Rv rv = decapsulated(object, Bytes(ciphertext, ciphertext + bytes), secret);
  if (rv != kOk) return rv;
  *made = session.next_secret++;
  session.secrets[*made] = secret;
  return kOk;
}

Rv decrypt_init(Handle handle, Mechanism* mechanism, Handle object) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  if (!kem_of_mechanism(mechanism->type)) return kMechanismInvalid;
  session.decrypt_key = object;
  return kOk;
}

Rv decrypt(Handle handle, Byte* in_bytes, Ulong in_length, Byte* out, Ulong* out_length) {
  if (const Rv rv = require_session(handle); rv != kOk) return rv;
  Bytes secret;
  const Rv rv = decapsulated(session.decrypt_key, Bytes(in_bytes, in_bytes + in_length), secret);
  if (rv != kOk) return rv;
  if (mode_is("overrun")) {
    *out_length = 1000;
    return kOk;
  }
  if (out == nullptr || *out_length < secret.size()) return kBufferTooSmall;
  std::copy(secret.begin(), secret.end(), out);
  *out_length = secret.size();
  return kOk;
}

// ---- lists -------------------------------------------------------------------------------------

Rv missing() { return 0x54; }  // CKR_FUNCTION_NOT_SUPPORTED, whatever the arguments

template <typename F>
void put(FunctionList& list, Place place, F* function) {
  list.functions[static_cast<std::size_t>(place)] = reinterpret_cast<void (*)()>(function);
}

FunctionList make_list(Version version) {
  FunctionList list{};
  list.version = version;
  if (mode_is("empty-list")) return list;
  for (auto& function : list.functions) function = reinterpret_cast<void (*)()>(&missing);
  put(list, Place::initialize, initialize);
  put(list, Place::finalize, finalize);
  put(list, Place::get_info, get_info);
  put(list, Place::get_slot_list, get_slot_list);
  put(list, Place::get_slot_info, get_slot_info);
  put(list, Place::get_token_info, get_token_info);
  put(list, Place::get_mechanism_info, get_mechanism_info);
  put(list, Place::init_pin, init_pin);
  put(list, Place::open_session, open_session);
  put(list, Place::close_session, close_session);
  put(list, Place::login, login);
  put(list, Place::logout, logout);
  put(list, Place::create_object, create_object);
  put(list, Place::destroy_object, destroy_object);
  put(list, Place::get_attribute_value, get_attribute_value);
  put(list, Place::find_objects_init, find_objects_init);
  put(list, Place::find_objects, find_objects);
  put(list, Place::find_objects_final, find_objects_final);
  put(list, Place::decrypt_init, decrypt_init);
  put(list, Place::decrypt, decrypt);
  put(list, Place::generate_key_pair, generate_key_pair);
  put(list, Place::derive_key, derive_key);
  put(list, Place::decapsulate_key, decapsulate_key);
  return list;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) Rv C_GetFunctionList(FunctionList** list) {
  if (mode_is("no-list")) {
    *list = nullptr;
    return kOk;
  }
  static FunctionList functions = make_list({2, 40});
  *list = &functions;
  return kOk;
}

__attribute__((visibility("default"))) Rv C_GetInterface(Byte*, Version* version, Interface** found,
                                                         Ulong) {
  if (mode_is("only-2.40")) return kArgumentsBad;
  static FunctionList functions = make_list({3, Byte(mode_is("calls-3.0-3.2") ? 0 : 2)});
  static char name[] = "PKCS 11";
  static Interface interface { name, &functions, 0 };
  if (version == nullptr || version->major != 3) return kArgumentsBad;
  *found = &interface;
  return kOk;
}

}  // extern "C"
