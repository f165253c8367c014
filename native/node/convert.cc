#include "node/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pqblk::node {
namespace {

constexpr std::uint64_t kMaxSafeInteger = (std::uint64_t{1} << 53) - 1;

// False when the value is no integer in range.
bool to_integer(const Napi::Value& value, std::uint64_t max, std::uint64_t& out) {
  if (value.IsBigInt()) {
    bool lossless = false;
    out = value.As<Napi::BigInt>().Uint64Value(&lossless);
    return lossless && out <= max;
  }
  if (!value.IsNumber()) return false;
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!(number >= 0) || number > static_cast<double>(kMaxSafeInteger) ||
      number != std::floor(number)) {
    return false;
  }
  out = static_cast<std::uint64_t>(number);
  return out <= max;
}

}  // namespace

Napi::Value number_to_js(Napi::Env env, std::uint64_t value) {
  if (value <= kMaxSafeInteger) return Napi::Number::New(env, static_cast<double>(value));
  return Napi::BigInt::New(env, value);
}

Napi::Array numbers_to_js(Napi::Env env, std::span<const std::uint64_t> values) {
  const Napi::Array out = Napi::Array::New(env);
  std::uint32_t i = 0;
  for (const std::uint64_t value : values) out.Set(i++, number_to_js(env, value));
  return out;
}

Napi::Value error_to_js(Napi::Env env, const Error& error) {
  const Napi::Object object = Napi::Error::New(env, error.message()).Value().As<Napi::Object>();
  object.Set("kind", Napi::String::New(env, std::string(kind_name(error.kind()))));
  if (!error.path().empty()) object.Set("path", error.path());
  if (!error.operation().empty()) object.Set("operation", error.operation());
  if (error.offset() != Error::kNoOffset) object.Set("offset", number_to_js(env, error.offset()));
  if (error.os_errno() != 0) object.Set("errno", Napi::Number::New(env, error.os_errno()));
  return object;
}

void throw_type_error(Napi::Env env, const std::string& message) {
  if (!env.IsExceptionPending()) Napi::TypeError::New(env, message).ThrowAsJavaScriptException();
}

Options::Options(Napi::Env env, const Napi::Value& value) : env_(env) {
  if (value.IsObject()) {
    object_ = value.As<Napi::Object>();
  } else {
    object_ = Napi::Object::New(env);
    throw_type_error(env, "expected an object of options");
  }
}

void Options::bad(const char* name, const char* expected) const {
  throw_type_error(env_, std::string(name) + ": expected " + expected);
}

bool Options::has(const char* name) const {
  const Napi::Value v = object_.Get(name);
  return !v.IsEmpty() && !v.IsUndefined() && !v.IsNull();
}

void Options::read(const char* name, bool& out) const {
  if (!has(name)) return;
  const Napi::Value v = object_.Get(name);
  if (!v.IsBoolean()) return bad(name, "a boolean");
  out = v.As<Napi::Boolean>().Value();
}

void Options::read(const char* name, std::uint64_t& out) const {
  if (!has(name)) return;
  if (!to_integer(object_.Get(name), ~std::uint64_t{0}, out)) bad(name, "an integer from 0 on");
}

void Options::read(const char* name, std::uint32_t& out) const {
  std::uint64_t wide = out;
  if (!has(name)) return;
  if (!to_integer(object_.Get(name), 0xFFFFFFFFU, wide)) return bad(name, "a 32-bit integer");
  out = static_cast<std::uint32_t>(wide);
}

void Options::read(const char* name, std::uint8_t& out) const {
  std::uint64_t wide = out;
  if (!has(name)) return;
  if (!to_integer(object_.Get(name), 0xFFU, wide)) return bad(name, "an integer from 0 to 255");
  out = static_cast<std::uint8_t>(wide);
}

void Options::read(const char* name, double& out) const {
  if (!has(name)) return;
  const Napi::Value v = object_.Get(name);
  if (!v.IsNumber() || !std::isfinite(v.As<Napi::Number>().DoubleValue())) {
    return bad(name, "a number");
  }
  out = v.As<Napi::Number>().DoubleValue();
}

void Options::read(const char* name, std::string& out) const {
  if (!has(name)) return;
  const Napi::Value v = object_.Get(name);
  if (!v.IsString()) return bad(name, "a string");
  out = v.As<Napi::String>().Utf8Value();
}

std::span<std::uint8_t> Options::bytes(const char* name) const {
  const Napi::Value v = object_.Get(name);
  if (!v.IsTypedArray() || v.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    bad(name, "a Uint8Array");
    return {};
  }
  auto array = v.As<Napi::Uint8Array>();
  return {array.Data(), array.ByteLength()};
}

void Options::read(const char* name, std::vector<std::uint8_t>& out) const {
  if (!has(name)) return;
  const std::span<std::uint8_t> from = bytes(name);
  out.assign(from.begin(), from.end());
}

void Options::read(const char* name, sealed::Uuid& out) const {
  if (!has(name)) return;
  const std::span<std::uint8_t> from = bytes(name);
  if (from.size() != out.size()) return bad(name, "16 bytes");
  std::copy(from.begin(), from.end(), out.begin());
}

void Options::take_secret(const char* name, crypto::SecretKey& out) const {
  const std::span<const std::uint8_t> from = bytes(name);  // the caller's to wipe
  if (from.size() != 32) return bad(name, "32 bytes");
  auto key = crypto::SecretKey::copy_of(from.first<32>());
  if (!key) return bad(name, "room for a secret key");
  out = std::move(*key);
}

std::span<const std::pair<std::string_view, image::Format>> format_names() {
  static constexpr std::pair<std::string_view, image::Format> kNames[] = {
      {"raw", image::Format::raw},
      {"qcow2", image::Format::qcow2},
      {"sealed", image::Format::sealed},
  };
  return kNames;
}

void read_keys(Napi::Env env, const Napi::Value& value, sealed::VolumeKeys& out) {
  const Options options(env, value);
  options.take_secret("integrity", out.integrity);
  options.read("currentEpoch", out.current_epoch);
  options.read("keyAreaState", out.key_area_state);
  const Napi::Value list = options.value("data");
  if (!list.IsArray()) return throw_type_error(env, "data: expected a list of data keys");
  const auto array = list.As<Napi::Array>();
  for (std::uint32_t i = 0; i < array.Length(); ++i) {
    const Options entry(env, array.Get(i));
    sealed::DataKey key;
    entry.read("epoch", key.epoch);
    entry.take_secret("key", key.key);
    out.data.push_back(std::move(key));
  }
}

void read_key_area_change(Napi::Env env, const Options& options, sealed::KeyAreaChange& out) {
  options.read("keyArea", out.blob);
  options.read("copy", out.copy);
  options.read("number", out.number);
  options.read("expected", out.expected);
  if (!out.blob.empty() && out.blob.size() != sealed::kKeyAreaBytes) {
    throw_type_error(env, "keyArea: expected 65536 bytes");
  }
}

}  // namespace pqblk::node
