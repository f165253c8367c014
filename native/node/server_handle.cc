#include "node/server_handle.h"

#include <utility>

#include "node/convert.h"
#include "node/job.h"

namespace pqblk::node {
namespace {

constexpr char kOnReports[] = "onReports";

}  // namespace

void DiskServer::stop() {
  std::lock_guard guard(stopping_);
  if (!std::exchange(started_, false)) return;
  const image::Disk::Hurry hurry(*disk_);
  end();
}

void DiskServer::report(const std::string& text) {
  std::lock_guard guard(inner_);
  if (reports_.size() < kReportsMax) {
    reports_.push_back(text);
  } else {
    ++lost_;
  }
  if (hub_ != nullptr && !ending_->load(std::memory_order_acquire)) hub_->post(*this);
}

// ---- the environment's thread ----

void DiskServer::bind(Napi::Env env, const Napi::Object& handle) {
  EnvState& state = EnvState::of(env);
  state.hub.hold();
  napi_create_reference(env, handle, 1, &handle_);
  std::lock_guard guard(inner_);
  hub_ = &state.hub;
  ending_ = state.ending;
}

void DiskServer::unbind(Napi::Env env) {
  if (handle_ == nullptr) return;
  napi_delete_reference(env, std::exchange(handle_, nullptr));
  std::lock_guard guard(inner_);
  std::exchange(hub_, nullptr)->unhold();
}

void DiskServer::notified(Napi::Env env) {
  napi_value handle = nullptr;
  if (handle_ == nullptr || napi_get_reference_value(env, handle_, &handle) != napi_ok) return;
  call_method(env, handle, kOnReports, {});
}

Napi::Value DiskServer::take_reports(Napi::Env env) {
  std::vector<std::string> texts;
  std::uint64_t lost = 0;
  {
    std::lock_guard guard(inner_);
    texts = std::exchange(reports_, {});
    lost = std::exchange(lost_, 0);
  }
  const Napi::Array out = Napi::Array::New(env);
  std::uint32_t count = 0;
  for (const std::string& text : texts) out.Set(count++, text);
  if (lost != 0) out.Set(count, std::to_string(lost) + " more reports were dropped");
  return out;
}

Napi::Value DiskServer::make_handle(Napi::Env env, const std::shared_ptr<OpenDisk>& open) {
  const Napi::Object handle = Napi::Object::New(env);
  describe(env, handle);
  handle.Set("takeReports",
             Napi::Function::New(env, [server = self()](const Napi::CallbackInfo& call) {
               return server->take_reports(call.Env());
             }));
  handle.Set("close",
             Napi::Function::New(env, [open, server = self()](const Napi::CallbackInfo& call) {
               return server->close(call.Env(), open);
             }));
  bind(env, handle);
  return handle;
}

Napi::Value DiskServer::close(Napi::Env env, const std::shared_ptr<OpenDisk>& open) {
  return start_job(
      env, env.Undefined(),
      [server = self()]() -> Error {
        server->stop();
        return {};
      },
      [open, server = self()](Napi::Env e) {
        open->remove(*server);
        server->unbind(e);
        return e.Undefined();
      });
}

Napi::Value start_server(Napi::Env env, const std::shared_ptr<OpenDisk>& open,
                         std::shared_ptr<DiskServer> server) {
  return start_job(
      env, env.Undefined(),
      [open, server]() -> Error {
        const OpenDisk::Use use(*open);  // the disk does not close meanwhile
        if (!use) return Error(Kind::closed, "the disk is closed");
        if (Error e = server->start()) return e;
        server->started_ = true;
        if (open->add(server)) return {};
        server->stop();
        return Error(Kind::closed, "the disk is closed");
      },
      [open, server](Napi::Env e) { return server->make_handle(e, open); });
}

}  // namespace pqblk::node
