// Between JavaScript values and the engine's types.
//
// Room node/. Readers of options: a missing property leaves the default, a wrong type throws a
// TypeError that names the property (check env.IsExceptionPending() after a group of reads).
#pragma once

#include <napi.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "crypto/kdf.h"
#include "image/disk.h"
#include "sealed/backend_api.h"
#include "sealed/keys.h"

namespace pqblk::node {

// A JavaScript Error with kind, message and, where known, path, operation, offset and errno.
Napi::Value error_to_js(Napi::Env env, const Error& error);
// Integers of up to 2^53; larger ones become BigInt.
Napi::Value number_to_js(Napi::Env env, std::uint64_t value);
Napi::Array numbers_to_js(Napi::Env env, std::span<const std::uint64_t> values);

// Throws a TypeError (nothing is thrown twice).
void throw_type_error(Napi::Env env, const std::string& message);

class Options {
 public:
  Options(Napi::Env env, const Napi::Value& value);

  bool has(const char* name) const;
  void read(const char* name, bool& out) const;
  void read(const char* name, std::uint64_t& out) const;
  void read(const char* name, std::uint32_t& out) const;
  void read(const char* name, std::uint8_t& out) const;
  void read(const char* name, double& out) const;  // finite
  void read(const char* name, std::string& out) const;
  void read(const char* name, std::vector<std::uint8_t>& out) const;
  void read(const char* name, sealed::Uuid& out) const;
  // Copied into locked memory; the JavaScript bytes are the caller's to wipe.
  void take_secret(const char* name, crypto::SecretKey& out) const;
  template <class T>
  void read(const char* name, std::optional<T>& out) const {
    if (!has(name)) return;
    T value{};
    read(name, value);
    out = std::move(value);
  }
  // One of a list of names.
  template <class T>
  void read_choice(const char* name, std::span<const std::pair<std::string_view, T>> choices,
                   T& out) const {
    std::string text;
    if (!has(name)) return;
    read(name, text);
    for (const auto& [word, value] : choices) {
      if (word == text) {
        out = value;
        return;
      }
    }
    bad(name, "one of the names this property takes");
  }
  Napi::Value value(const char* name) const { return object_.Get(name); }

 private:
  void bad(const char* name, const char* expected) const;
  std::span<std::uint8_t> bytes(const char* name) const;  // empty and thrown when not a Uint8Array

  Napi::Env env_;
  Napi::Object object_;
};

// "raw", "qcow2", "sealed", in the order of the enumeration.
std::span<const std::pair<std::string_view, image::Format>> format_names();
// integrity, data: [{ epoch, key }], currentEpoch
void read_keys(Napi::Env env, const Napi::Value& value, sealed::VolumeKeys& out);
// keyArea, expectedGeneration, level.
void read_key_area_change(Napi::Env env, const Options& options, sealed::KeyAreaChange& out);

}  // namespace pqblk::node
