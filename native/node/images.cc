#include "node/images.h"

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "image/disk_check.h"
#include "image/disk_create.h"
#include "image/disk_info.h"
#include "image/header_backup.h"
#include "node/convert.h"
#include "node/job.h"

namespace pqblk::node {
namespace {

using format::Preallocation;

constexpr std::array<std::pair<std::string_view, Preallocation>, 4> kPreallocations{{
    {"off", Preallocation::off},
    {"metadata", Preallocation::metadata},
    {"falloc", Preallocation::falloc},
    {"full", Preallocation::full},
}};
constexpr std::array<std::pair<std::string_view, sealed::BackingPolicy>, 3> kBackingPolicies{{
    {"none", sealed::BackingPolicy::none},
    {"sealed", sealed::BackingPolicy::sealed},
    {"unauthenticated", sealed::BackingPolicy::unauthenticated},
}};

const std::array<std::pair<std::string_view, crypto::Suite>, 2>& suites() {
  static const std::array<std::pair<std::string_view, crypto::Suite>, 2> table{{
      {crypto::suite_name(crypto::Suite::aes_256_gcm), crypto::Suite::aes_256_gcm},
      {crypto::suite_name(crypto::Suite::chacha20_poly1305), crypto::Suite::chacha20_poly1305},
  }};
  return table;
}

Napi::Buffer<std::uint8_t> bytes_to_js(Napi::Env env, std::span<const std::uint8_t> bytes) {
  return Napi::Buffer<std::uint8_t>::Copy(env, bytes.data(), bytes.size());
}

std::optional<sealed::VolumeKeys> optional_keys(Napi::Env env, const Napi::Value& value) {
  if (!value.IsObject()) return std::nullopt;
  sealed::VolumeKeys keys;
  read_keys(env, value, keys);
  return keys;
}

image::CreateSpec read_create_spec(const Napi::CallbackInfo& info) {
  const Options options(info.Env(), info[0]);
  image::CreateSpec spec;
  options.read("path", spec.path);
  options.read_choice<image::Format>("format", format_names(), spec.format);
  options.read("size", spec.size);
  options.read("overwrite", spec.overwrite);
  options.read("allowSystemDirectory", spec.allow_system_directory);
  options.read_choice<Preallocation>("preallocation", kPreallocations, spec.preallocation);
  options.read("clusterSize", spec.cluster_size);
  options.read("version", spec.version);
  options.read("refcountBits", spec.refcount_bits);
  options.read("extendedL2", spec.extended_l2);
  std::string compression = "zlib";
  options.read("compression", compression);
  spec.compress_zstd = compression == "zstd";
  options.read("backingName", spec.backing_name);
  options.read("backingFormat", spec.backing_format);
  options.read_choice<crypto::Suite>("suite", suites(), spec.suite);
  options.read("uuid", spec.uuid);
  options.read("logBytes", spec.log_bytes);
  options.read_choice<sealed::BackingPolicy>("backingPolicy", kBackingPolicies,
                                             spec.backing_policy);
  options.read("backingUuid", spec.backing_uuid);
  options.read("keyArea", spec.key_area);
  spec.keys = optional_keys(info.Env(), info[1]);
  if (spec.path.empty()) throw_type_error(info.Env(), "path: expected the path of the new disk");
  return spec;
}

Napi::Value qcow2_to_js(Napi::Env env, const image::Qcow2Facts& facts) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("version", facts.version);
  out.Set("refcountBits", facts.refcount_bits);
  out.Set("compression", facts.compression);
  out.Set("extendedL2", facts.extended_l2);
  out.Set("lazyRefcounts", facts.lazy_refcounts);
  out.Set("dirty", facts.dirty);
  out.Set("corrupt", facts.corrupt);
  if (!facts.backing_name.empty()) out.Set("backingName", facts.backing_name);
  if (!facts.backing_format.empty()) out.Set("backingFormat", facts.backing_format);
  out.Set("snapshots", facts.snapshots);
  return out;
}

void set_key_area(Napi::Env env, Napi::Object out, const sealed::KeyArea& key_area) {
  const Napi::Array copies = Napi::Array::New(env);
  std::uint32_t i = 0;
  for (const sealed::KeyAreaCopy& copy : key_area) {
    const Napi::Object one = Napi::Object::New(env);
    one.Set("number", Napi::BigInt::New(env, copy.number));
    one.Set("blob", bytes_to_js(env, copy.blob));
    copies.Set(i++, one);
  }
  out.Set("keyAreaCopies", copies);
  out.Set("keyAreaState", bytes_to_js(env, sealed::state_of(key_area)));
}

Napi::Value sealed_to_js(Napi::Env env, const sealed::PublicInfo& info) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("formatVersion", info.format_version);
  out.Set("suite", std::string(crypto::suite_name(static_cast<crypto::Suite>(info.suite))));
  out.Set("uuid", bytes_to_js(env, info.uuid));
  out.Set("clean", info.clean);
  out.Set("logBytes", number_to_js(env, info.log_bytes));
  out.Set("sessions", info.sessions);
  out.Set("backingPolicy",
          std::string(kBackingPolicies[static_cast<std::size_t>(info.backing_policy)].first));
  if (!info.backing_name.empty()) out.Set("backingName", info.backing_name);
  if (!info.backing_format.empty()) out.Set("backingFormat", info.backing_format);
  set_key_area(env, out, info.key_area);
  return out;
}

Napi::Value info_to_js(Napi::Env env, const image::DiskInfo& info) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("path", info.path);
  out.Set("format", std::string(format_names()[static_cast<std::size_t>(info.format)].first));
  out.Set("size", number_to_js(env, info.size));
  out.Set("fileSize", number_to_js(env, info.file_size));
  out.Set("allocatedBytes", number_to_js(env, info.allocated_bytes));
  out.Set("clusterSize", info.cluster_size);
  out.Set("durabilityClass", info.durability_class);
  if (info.holder) {
    const Napi::Object holder = Napi::Object::New(env);
    holder.Set("pid", static_cast<double>(info.holder->pid));
    holder.Set("command", info.holder->command);
    out.Set("lockHolder", holder);
  }
  if (info.qcow2) out.Set("qcow2", qcow2_to_js(env, *info.qcow2));
  if (info.sealed) out.Set("sealed", sealed_to_js(env, *info.sealed));
  return out;
}

Napi::Value check_to_js(Napi::Env env, const image::DiskCheck& check) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("clean", check.clean());
  out.Set("corruptions", number_to_js(env, check.corruptions));
  out.Set("leaks", number_to_js(env, check.leaks));
  out.Set("corruptionsFixed", number_to_js(env, check.corruptions_fixed));
  out.Set("leaksFixed", number_to_js(env, check.leaks_fixed));
  out.Set("totalClusters", number_to_js(env, check.total_clusters));
  out.Set("allocatedClusters", number_to_js(env, check.allocated_clusters));
  out.Set("compressedClusters", number_to_js(env, check.compressed_clusters));
  out.Set("imageEnd", number_to_js(env, check.image_end));
  out.Set("grownTo", number_to_js(env, check.grown_to));
  out.Set("sectorsVerified", number_to_js(env, check.sectors_verified));
  out.Set("sectorsBad", number_to_js(env, check.sectors_bad));
  const Napi::Array messages = Napi::Array::New(env);
  for (std::uint32_t i = 0; i < check.messages.size(); ++i) messages.Set(i, check.messages[i]);
  out.Set("messages", messages);
  out.Set("badSectors", numbers_to_js(env, check.bad_sectors));
  out.Set("sectorsUnreadable", number_to_js(env, check.sectors_unreadable));
  out.Set("unreadableSectors", numbers_to_js(env, check.unreadable_sectors));
  return out;
}

// A job whose run() fills a T that result() turns into a JavaScript value.
template <class T, class Run>
Napi::Value answer_job(Napi::Env env, const Napi::Value& token, Run run,
                       Napi::Value (*to_js)(Napi::Env, const T&)) {
  const auto answer = std::make_shared<std::optional<T>>();
  return start_job(
      env, token,
      [run = std::move(run), answer](TokenCore& core) mutable -> Error {
        Result<T> result = run(core);
        if (!result) return result.take_error();
        *answer = std::move(*result);
        return {};
      },
      [answer, to_js](Napi::Env e) { return to_js(e, **answer); });
}

}  // namespace

Napi::Value create_disk(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  auto spec = std::make_shared<image::CreateSpec>(read_create_spec(info));
  if (env.IsExceptionPending()) return env.Undefined();
  return start_job(
      env, info[2],
      [spec](TokenCore& core) {
        spec->progress = [&core](std::uint64_t done, std::uint64_t total) {
          return core.report(done, total);
        };
        return image::create_disk(*spec);
      },
      [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value disk_info(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  std::string path;
  options.read("path", path);
  std::optional<image::Format> format;
  if (options.has("format")) {
    image::Format named{};
    options.read_choice<image::Format>("format", format_names(), named);
    format = named;
  }
  if (env.IsExceptionPending()) return env.Undefined();
  return answer_job<image::DiskInfo>(
      env, env.Undefined(),
      [path, format](TokenCore&) { return image::read_disk_info(path, format); }, &info_to_js);
}

Napi::Value check_disk(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  auto spec = std::make_shared<image::CheckSpec>();
  options.read("path", spec->path);
  options.read_choice<image::Format>("format", format_names(), spec->format);
  options.read("repair", spec->repair);
  options.read("uuid", spec->expected_uuid);
  options.read("backupSessions", spec->backup_sessions);
  spec->keys = optional_keys(env, info[1]);
  if (env.IsExceptionPending()) return env.Undefined();
  return answer_job<image::DiskCheck>(
      env, info[2],
      [spec](TokenCore& core) {
        spec->progress = [&core](std::uint64_t done, std::uint64_t total) {
          return core.report(done, total);
        };
        return image::check_disk(std::move(*spec));
      },
      &check_to_js);
}

Napi::Value replace_key_area(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  std::string path;
  auto change = std::make_shared<sealed::KeyAreaChange>();
  options.read("path", path);
  read_key_area_change(env, options, *change);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_job(
      env, env.Undefined(), [path, change] { return image::replace_key_area(path, *change); },
      [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value back_up_header(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  std::string path;
  options.read("path", path);
  if (env.IsExceptionPending()) return env.Undefined();
  return answer_job<image::HeaderBackup>(
      env, env.Undefined(), [path](TokenCore&) { return image::read_header_backup(path); },
      +[](Napi::Env e, const image::HeaderBackup& backup) -> Napi::Value {
        const Napi::Object out = Napi::Object::New(e);
        out.Set("uuid", bytes_to_js(e, backup.uuid));
        out.Set("header", bytes_to_js(e, backup.header));
        out.Set("sessions", bytes_to_js(e, backup.sessions));
        return out;
      });
}

namespace {

// { path, uuid, header, sessions }, keys
struct BackupAndKeys {
  std::string path;
  image::HeaderBackup backup;
  sealed::VolumeKeys keys;
  bool with_sessions = true;
};

std::shared_ptr<BackupAndKeys> read_backup(const Napi::CallbackInfo& info) {
  const Options options(info.Env(), info[0]);
  auto out = std::make_shared<BackupAndKeys>();
  options.read("path", out->path);
  options.read("uuid", out->backup.uuid);
  options.read("header", out->backup.header);
  options.read("sessions", out->backup.sessions);
  options.read("withSessions", out->with_sessions);
  read_keys(info.Env(), info[1], out->keys);
  return out;
}

}  // namespace

Napi::Value look_at_header(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto given = read_backup(info);
  if (env.IsExceptionPending()) return env.Undefined();
  return answer_job<image::HeaderLook>(
      env, env.Undefined(),
      [given](TokenCore&) {
        return image::look_at_header(given->path, given->backup, std::move(given->keys));
      },
      +[](Napi::Env e, const image::HeaderLook& look) -> Napi::Value {
        const Napi::Object out = Napi::Object::New(e);
        out.Set("readable", look.readable);
        out.Set("lacksNewest", look.lacks_newest);
        set_key_area(e, out, look.key_area);
        return out;
      });
}

Napi::Value restore_header(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto given = read_backup(info);
  if (env.IsExceptionPending()) return env.Undefined();
  return answer_job<image::HeaderRestored>(
      env, env.Undefined(),
      [given](TokenCore&) {
        return image::restore_header(given->path, given->backup, given->with_sessions,
                                     std::move(given->keys));
      },
      +[](Napi::Env e, const image::HeaderRestored& restored) -> Napi::Value {
        const Napi::Object out = Napi::Object::New(e);
        out.Set("header", restored.header);
        out.Set("sessions", restored.sessions);
        out.Set("sessionsLost", restored.sessions_lost);
        out.Set("byLogAlone", restored.by_log_alone);
        return out;
      });
}

Napi::Value clear_corrupt(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  std::string path;
  std::vector<std::uint8_t> checked;
  options.read("path", path);
  options.read("checked", checked);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_job(
      env, env.Undefined(), [path, checked] { return image::clear_corrupt(path, checked); },
      [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value engine_info(const Napi::CallbackInfo& info) {
  struct Probe {
    std::string engine, cause;
  };
  const auto to_js = +[](Napi::Env env, const Probe& probe) -> Napi::Value {
    const Napi::Object out = Napi::Object::New(env);
    out.Set("engine", probe.engine);
    if (!probe.cause.empty()) out.Set("fallbackCause", probe.cause);
    return out;
  };
  return answer_job<Probe>(
      info.Env(), info.Env().Undefined(),
      [](TokenCore&) -> Result<Probe> {
        Probe probe;
        const auto queue = io::make_queue({}, &probe.cause);
        if (!queue) return queue.error();
        probe.engine = (*queue)->engine();
        return probe;
      },
      to_js);
}

Napi::Value free_space(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  std::string path;
  options.read("path", path);
  if (env.IsExceptionPending()) return env.Undefined();
  return answer_job<std::uint64_t>(
      env, env.Undefined(), [path](TokenCore&) { return storage::free_space(path); },
      +[](Napi::Env e, const std::uint64_t& bytes) { return number_to_js(e, bytes); });
}

Napi::Value in_system_directory(const Napi::CallbackInfo& info) {
  const Options options(info.Env(), info[0]);
  std::string path;
  options.read("path", path);
  return Napi::Boolean::New(info.Env(), storage::in_system_directory(path));
}

}  // namespace pqblk::node
