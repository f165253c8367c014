// The JavaScript class of an open disk.
//
// Room node/: translates; what a disk does is image/disk.h's business.
#pragma once

#include <napi.h>

#include <memory>

#include "node/env.h"

namespace pqblk::node {

// openDisk(options, keys?, token?) -> Promise<Disk>
Napi::Value open_disk(const Napi::CallbackInfo& info);

class DiskHandle : public Napi::ObjectWrap<DiskHandle> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit DiskHandle(const Napi::CallbackInfo& info);
  ~DiskHandle() override = default;
  void Finalize(Napi::Env env) override;
  static Napi::Value make(Napi::Env env, std::shared_ptr<OpenDisk> disk);

 private:
  Napi::Value close(const Napi::CallbackInfo& info);
  Napi::Value resize(const Napi::CallbackInfo& info);
  Napi::Value extents(const Napi::CallbackInfo& info);
  Napi::Value facts(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value set_limits(const Napi::CallbackInfo& info);
  Napi::Value limits(const Napi::CallbackInfo& info);
  Napi::Value channel(const Napi::CallbackInfo& info);
  Napi::Value bench(const Napi::CallbackInfo& info);
  // disk_handle_rekey.cc
  Napi::Value change_key_area(const Napi::CallbackInfo& info);
  Napi::Value begin_epoch(const Napi::CallbackInfo& info);
  Napi::Value rekey(const Napi::CallbackInfo& info);
  Napi::Value require_within_size(const Napi::CallbackInfo& info);
  Napi::Value finish_epoch(const Napi::CallbackInfo& info);
  Napi::Value serve_nbd(const Napi::CallbackInfo& info);
  Napi::Value serve_vhost_user(const Napi::CallbackInfo& info);
  std::shared_ptr<image::Disk> disk_or_throw(Napi::Env env) const;

  std::shared_ptr<OpenDisk> open_;
};

}  // namespace pqblk::node
