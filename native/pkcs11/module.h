// A vendor's PKCS#11 module in this process: loaded, its functions found, initialised.
//
// Room pkcs11/. Nothing here is defended against the module: it runs in this address space and may
// crash it. The process around it is what protects the rest of pqblk. There is one module in a
// process, for good: modules do not survive being unloaded.
#pragma once

#include "base/error.h"
#include "pkcs11/cryptoki.h"
#include "pkcs11/protocol.h"

namespace pqblk::pkcs11 {

// What an operation failed with: an answer of the module (`rv`, from `function`), or our complaint.
struct Failure {
  Rv rv = kOk;
  std::string function;
  Complaint complaint = Complaint::protocol;
  std::string message;

  static Failure of(Rv rv, std::string_view function) { return {rv, std::string(function)}; }
  static Failure of(Complaint complaint, std::string message) {
    return {kOk, {}, complaint, std::move(message)};
  }
};

// A value or a Failure, used like Result<T>.
template <typename T>
class [[nodiscard]] Outcome {
 public:
  Outcome(T value) : state_(std::in_place_index<0>, std::move(value)) {}            // NOLINT
  Outcome(Failure failure) : state_(std::in_place_index<1>, std::move(failure)) {}  // NOLINT

  explicit operator bool() const { return state_.index() == 0; }
  T& operator*() { return *std::get_if<0>(&state_); }
  T* operator->() { return std::get_if<0>(&state_); }
  Failure take_failure() { return std::move(*std::get_if<1>(&state_)); }

 private:
  std::variant<T, Failure> state_;
};

struct Nothing {};
using Done = Outcome<Nothing>;

class Module {
 public:
  // Loads the preloads, then the module (absolute paths), and calls C_Initialize. A module that was
  // initialised already in this process will do.
  static Outcome<Module> load(const Load& how);

  // For tests and fuzzers that link a module into themselves.
  static Outcome<Module> from(FunctionList* list, Version interface_version, const Load& how);

  const Functions& functions() const { return functions_; }
  Version interface_version() const { return interface_version_; }

 private:
  Functions functions_{};
  Version interface_version_{};
};

}  // namespace pqblk::pkcs11
