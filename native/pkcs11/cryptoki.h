// The part of PKCS#11 that opens a disk: types, numbers and signatures of OASIS PKCS#11 2.40
// to 3.2.
//
// Room pkcs11/. Written from the specification's tables; nothing else of it is used here. On Unix
// every structure has its natural alignment, and CK_ULONG is unsigned long. Mechanisms, key types
// and attributes are not named here: the other end of the wire sends them (src/keys/pkcs11).
#pragma once

#include <cstddef>
#include <cstdint>

namespace pqblk::pkcs11 {

using Ulong = unsigned long;  // CK_ULONG
using Rv = Ulong;             // CK_RV
using Byte = unsigned char;
using SlotId = Ulong;
using Handle = Ulong;  // of a session or an object
static_assert(sizeof(Ulong) == 8, "the wire carries CK_ULONG as 8 bytes");

inline constexpr Rv kOk = 0x00;
inline constexpr Rv kAttributeSensitive = 0x11;
inline constexpr Rv kAttributeTypeInvalid = 0x12;
inline constexpr Rv kAlreadyLoggedIn = 0x100;  // CKR_USER_ALREADY_LOGGED_IN
inline constexpr Rv kMechanismInvalid = 0x70;
inline constexpr Rv kAlreadyInitialized = 0x191;  // CKR_CRYPTOKI_ALREADY_INITIALIZED

inline constexpr Ulong kUnavailable = ~Ulong{0};  // CK_UNAVAILABLE_INFORMATION
inline constexpr Ulong kAttributeValue = 0x11;    // CKA_VALUE
inline constexpr Ulong kSerialSession = 4;        // CKF_SERIAL_SESSION
inline constexpr Ulong kReadWriteSession = 2;     // CKF_RW_SESSION
inline constexpr Ulong kOsLocking = 2;            // CKF_OS_LOCKING_OK
inline constexpr Ulong kSecurityOfficer = 0;      // CKU_SO
inline constexpr Ulong kUser = 1;                 // CKU_USER

struct Version {
  Byte major;
  Byte minor;
};

struct Info {
  Version cryptoki;
  Byte manufacturer[32];
  Ulong flags;
  Byte library[32];
  Version library_version;
};

struct SlotInfo {
  Byte description[64];
  Byte manufacturer[32];
  Ulong flags;
  Version hardware;
  Version firmware;
};

struct TokenInfo {
  Byte label[32];
  Byte manufacturer[32];
  Byte model[16];
  Byte serial[16];
  Ulong flags;
  Ulong counts[10];  // sessions, PIN lengths, memory: not used
  Version hardware;
  Version firmware;
  Byte time[16];
};
static_assert(offsetof(TokenInfo, flags) == 96 && sizeof(TokenInfo) == 208);

struct MechanismInfo {
  Ulong key_bits_min;
  Ulong key_bits_max;
  Ulong flags;
};

struct Mechanism {
  Ulong type;
  void* parameter;
  Ulong parameter_bytes;
};

struct Attribute {
  Ulong type;
  void* value;
  Ulong bytes;
};

struct InitializeArguments {
  void* create_mutex;
  void* destroy_mutex;
  void* lock_mutex;
  void* unlock_mutex;
  Ulong flags;
  void* reserved;
};

struct Interface {
  char* name;
  void* functions;
  Ulong flags;
};

// CK_FUNCTION_LIST (68 functions) and CK_FUNCTION_LIST_3_2 (from 92 on what 3.2 added) begin alike.
struct FunctionList {
  Version version;
  void (*functions[94])();  // 2.40: only the first 68 are there
};
static_assert(offsetof(FunctionList, functions) == 8);

// Places in the list, in the order of the specification.
enum class Place : std::size_t {
  initialize = 0,
  finalize = 1,
  get_info = 2,
  get_slot_list = 4,
  get_slot_info = 5,
  get_token_info = 6,
  get_mechanism_info = 8,
  init_pin = 10,
  open_session = 12,
  close_session = 13,
  login = 18,
  logout = 19,
  create_object = 20,
  destroy_object = 22,
  get_attribute_value = 24,
  find_objects_init = 26,
  find_objects = 27,
  find_objects_final = 28,
  decrypt_init = 33,
  decrypt = 34,
  generate_key_pair = 59,
  derive_key = 62,
  decapsulate_key = 93,
};

using GetFunctionList = Rv (*)(FunctionList**);
using GetInterface = Rv (*)(Byte* name, Version*, Interface**, Ulong flags);

// The functions that are used, with their signatures; null where a module leaves a place empty.
struct Functions {
  Rv (*initialize)(void*);
  Rv (*finalize)(void*);
  Rv (*get_info)(Info*);
  Rv (*get_slot_list)(Byte token_present, SlotId*, Ulong* count);
  Rv (*get_slot_info)(SlotId, SlotInfo*);
  Rv (*get_token_info)(SlotId, TokenInfo*);
  Rv (*get_mechanism_info)(SlotId, Ulong mechanism, MechanismInfo*);
  Rv (*init_pin)(Handle session, Byte* pin, Ulong bytes);
  Rv (*open_session)(SlotId, Ulong flags, void* application, void* notify, Handle*);
  Rv (*close_session)(Handle);
  Rv (*login)(Handle session, Ulong user, Byte* pin, Ulong bytes);
  Rv (*logout)(Handle);
  Rv (*create_object)(Handle session, Attribute*, Ulong count, Handle*);
  Rv (*destroy_object)(Handle session, Handle);
  Rv (*get_attribute_value)(Handle session, Handle, Attribute*, Ulong count);
  Rv (*find_objects_init)(Handle session, Attribute*, Ulong count);
  Rv (*find_objects)(Handle session, Handle*, Ulong max, Ulong* count);
  Rv (*find_objects_final)(Handle session);
  Rv (*decrypt_init)(Handle session, Mechanism*, Handle key);
  Rv (*decrypt)(Handle session, Byte* in, Ulong in_bytes, Byte* out, Ulong* out_bytes);
  Rv (*generate_key_pair)(Handle session, Mechanism*, Attribute* pub, Ulong pub_count,
                          Attribute* priv, Ulong priv_count, Handle* pub_key, Handle* priv_key);
  Rv (*derive_key)(Handle session, Mechanism*, Handle key, Attribute*, Ulong count, Handle*);
  Rv (*decapsulate_key)(Handle session, Mechanism*, Handle key, Attribute*, Ulong count,
                        Byte* ciphertext, Ulong bytes, Handle*);
};

}  // namespace pqblk::pkcs11
