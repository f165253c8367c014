#include "pkcs11/module.h"

#include <dlfcn.h>

#include <cstring>

namespace pqblk::pkcs11 {
namespace {

constexpr Version kVersion32{3, 2};

template <typename F>
F symbol(void* library, const char* name) {
  return reinterpret_cast<F>(::dlsym(library, name));
}

Failure load_failure(const std::string& path) {
  const char* why = ::dlerror();
  return Failure::of(Complaint::module,
                     "cannot load " + path + ": " + (why == nullptr ? "no reason given" : why));
}

struct Table {
  FunctionList* list;
  Version version;
};

// PKCS#11 3.2 section 5.4.5: the interface of an exact version.
Outcome<Table> table_of_3_2(void* library) {
  const auto get = symbol<GetInterface>(library, "C_GetInterface");
  if (get == nullptr) {
    return Failure::of(Complaint::unsupported,
                       "the module has no C_GetInterface; ML-KEM came with PKCS#11 3.2");
  }
  char name[] = "PKCS 11";
  Version wanted = kVersion32;
  Interface* found = nullptr;
  const Rv rv = get(reinterpret_cast<Byte*>(name), &wanted, &found, 0);
  if (rv != kOk || found == nullptr || found->functions == nullptr) {
    return Failure::of(Complaint::unsupported, "the module does not offer interface PKCS 11 3.2");
  }
  auto* list = static_cast<FunctionList*>(found->functions);
  if (list->version.major != kVersion32.major || list->version.minor < kVersion32.minor) {
    return Failure::of(Complaint::answer, "the module calls another version PKCS 11 3.2");
  }
  return Table{list, list->version};
}

Outcome<Table> table_of_2_40(void* library) {
  const auto get = symbol<GetFunctionList>(library, "C_GetFunctionList");
  if (get == nullptr) {
    return Failure::of(Complaint::module, "no PKCS#11 module: it has no C_GetFunctionList");
  }
  FunctionList* list = nullptr;
  if (const Rv rv = get(&list); rv != kOk) return Failure::of(rv, "C_GetFunctionList");
  if (list == nullptr) return Failure::of(Complaint::answer, "C_GetFunctionList gave no list");
  return Table{list, list->version};
}

template <typename F>
void take(F& function, const FunctionList& list, Place place) {
  function = reinterpret_cast<F>(list.functions[static_cast<std::size_t>(place)]);
}

Functions functions_of(const FunctionList& list, bool has_3_2) {
  Functions f{};
  take(f.initialize, list, Place::initialize);
  take(f.finalize, list, Place::finalize);
  take(f.get_info, list, Place::get_info);
  take(f.get_slot_list, list, Place::get_slot_list);
  take(f.get_slot_info, list, Place::get_slot_info);
  take(f.get_token_info, list, Place::get_token_info);
  take(f.get_mechanism_info, list, Place::get_mechanism_info);
  take(f.init_pin, list, Place::init_pin);
  take(f.open_session, list, Place::open_session);
  take(f.close_session, list, Place::close_session);
  take(f.login, list, Place::login);
  take(f.logout, list, Place::logout);
  take(f.create_object, list, Place::create_object);
  take(f.destroy_object, list, Place::destroy_object);
  take(f.get_attribute_value, list, Place::get_attribute_value);
  take(f.find_objects_init, list, Place::find_objects_init);
  take(f.find_objects, list, Place::find_objects);
  take(f.find_objects_final, list, Place::find_objects_final);
  take(f.decrypt_init, list, Place::decrypt_init);
  take(f.decrypt, list, Place::decrypt);
  take(f.generate_key_pair, list, Place::generate_key_pair);
  take(f.derive_key, list, Place::derive_key);
  if (has_3_2) take(f.decapsulate_key, list, Place::decapsulate_key);
  return f;
}

}  // namespace

Outcome<Module> Module::load(const Load& how) {
  for (const std::string& path : how.preloads) {
    if (::dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) return load_failure(path);
  }
  void* library = ::dlopen(how.path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return load_failure(how.path);
  Outcome<Table> table =
      how.style == Style::encapsulate ? table_of_3_2(library) : table_of_2_40(library);
  if (!table) return table.take_failure();
  return from(table->list, table->version, how);
}

Outcome<Module> Module::from(FunctionList* list, Version interface_version, const Load& how) {
  Module module;
  module.interface_version_ = interface_version;
  module.functions_ = functions_of(*list, how.style == Style::encapsulate);
  if (module.functions_.initialize == nullptr) {
    return Failure::of(Complaint::answer, "the module's function list is empty");
  }
  InitializeArguments arguments{};
  arguments.flags = how.os_locking ? kOsLocking : 0;
  std::string configuration = how.configuration;
  if (how.has_configuration) arguments.reserved = configuration.data();
  const bool plain = !how.os_locking && !how.has_configuration;
  const Rv rv = module.functions_.initialize(plain ? nullptr : &arguments);
  if (rv != kOk && rv != kAlreadyInitialized) return Failure::of(rv, "C_Initialize");
  return module;
}

}  // namespace pqblk::pkcs11
