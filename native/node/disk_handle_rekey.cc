// The part of DiskHandle that changes keys: the key area and the epochs of the data key.

#include <memory>
#include <utility>
#include <vector>

#include "image/disk.h"
#include "node/convert.h"
#include "node/disk_handle.h"
#include "node/job.h"

namespace pqblk::node {

// changeKeyArea({ keyArea?, copy?, number?, expected? })
Napi::Value DiskHandle::change_key_area(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  auto change = std::make_shared<sealed::KeyAreaChange>();
  read_key_area_change(env, Options(env, info[0]), *change);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_job(
      env, env.Undefined(), [disk, change] { return disk->change_key_area(*change); },
      [](Napi::Env e) { return e.Undefined(); });
}

// beginEpoch({ epoch, key, keyAreaState }): they are copied before this returns
Napi::Value DiskHandle::begin_epoch(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  const Options options(env, info[0]);
  auto key = std::make_shared<sealed::DataKey>();
  options.read("epoch", key->epoch);
  options.take_secret("key", key->key);
  std::vector<std::uint8_t> state;
  options.read("keyAreaState", state);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_job(
      env, env.Undefined(),
      [disk, key, state] { return disk->begin_epoch(std::move(*key), state); },
      [](Napi::Env e) { return e.Undefined(); });
}

// rekey({ verify, from, bytesPerSecond, share }, token?)
Napi::Value DiskHandle::rekey(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  const Options options(env, info[0]);
  auto spec = std::make_shared<image::RekeySpec>();
  options.read("verify", spec->verify);
  options.read("from", spec->from);
  options.read("bytesPerSecond", spec->bytes_per_second);
  options.read("share", spec->share);
  if (env.IsExceptionPending()) return env.Undefined();
  const auto report = std::make_shared<image::RekeyReport>();
  return start_job(
      env, info[1],
      [disk, spec, report](TokenCore& core) -> Error {
        spec->progress = [&core](std::uint64_t done, std::uint64_t total) {
          return core.report(done, total);
        };
        auto result = disk->rekey(*spec);
        if (!result) return result.take_error();
        *report = std::move(*result);
        return {};
      },
      [report](Napi::Env e) -> Napi::Value {
        const Napi::Object out = Napi::Object::New(e);
        out.Set("complete", report->complete);
        out.Set("reached", number_to_js(e, report->reached));
        out.Set("sectors", number_to_js(e, report->sectors));
        out.Set("damaged", number_to_js(e, report->damaged));
        out.Set("damagedSectors", numbers_to_js(e, report->damaged_sectors));
        out.Set("unreadable", number_to_js(e, report->unreadable));
        out.Set("unreadableSectors", numbers_to_js(e, report->unreadable_sectors));
        return out;
      });
}

Napi::Value DiskHandle::require_within_size(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  if (disk == nullptr) return env.Undefined();
  return start_job(
      env, env.Undefined(), [disk] { return disk->require_within_size(); },
      [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value DiskHandle::finish_epoch(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  if (disk == nullptr) return env.Undefined();
  return start_job(
      env, env.Undefined(), [disk] { return disk->finish_epoch(); },
      [](Napi::Env e) { return e.Undefined(); });
}

}  // namespace pqblk::node
