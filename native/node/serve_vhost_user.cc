#include "node/serve_vhost_user.h"

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "export/vhost_user.h"
#include "node/convert.h"
#include "node/job.h"

namespace pqblk::node {
namespace {

using exports::VhostUserOptions;
using exports::VhostUserServer;

constexpr char kOnReports[] = "onReports";
constexpr std::size_t kReportsMax = 100;  // kept until somebody takes them

class VhostUserService final : public Service, public Notifier {
 public:
  explicit VhostUserService(std::shared_ptr<image::Disk> disk) : disk_(std::move(disk)) {}
  ~VhostUserService() override { VhostUserService::stop(); }

  Error start(VhostUserOptions options) {
    options.log = [this](const std::string& text) { report(text); };  // ends with the server
    auto started = VhostUserServer::start(*disk_, std::move(options));
    if (!started) return started.take_error();
    server_ = std::move(*started);
    return {};
  }
  void stop() override {
    std::lock_guard guard(stopping_);
    if (server_ != nullptr) server_->stop();
  }
  bool serving() const { return server_->serving(); }

  // ---- the environment's thread ----
  void bind(Napi::Env env, const Napi::Object& handle) {
    EnvState& state = EnvState::of(env);
    state.hub.hold();
    napi_create_reference(env, handle, 0, &handle_);
    std::lock_guard guard(inner_);
    hub_ = &state.hub;
    ending_ = state.ending;
  }
  void unbind(Napi::Env env) {
    if (handle_ == nullptr) return;
    napi_delete_reference(env, std::exchange(handle_, nullptr));
    std::lock_guard guard(inner_);
    std::exchange(hub_, nullptr)->unhold();
  }
  Napi::Value take_reports(Napi::Env env) {
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

 protected:
  void notified(Napi::Env env) override {
    napi_value handle = nullptr;
    if (handle_ == nullptr || napi_get_reference_value(env, handle_, &handle) != napi_ok) return;
    if (handle == nullptr) return;
    const Napi::Object object(env, handle);
    const Napi::Value callback = object.Get(kOnReports);
    if (callback.IsFunction()) callback.As<Napi::Function>().Call(object, {});
  }

 private:
  void report(const std::string& text) {  // any thread
    std::lock_guard guard(inner_);
    if (reports_.size() < kReportsMax) {
      reports_.push_back(text);
    } else {
      ++lost_;
    }
    if (hub_ != nullptr && !ending_->load(std::memory_order_acquire)) hub_->post(*this);
  }

  const std::shared_ptr<image::Disk> disk_;
  std::mutex stopping_;
  std::unique_ptr<VhostUserServer> server_;
  std::mutex inner_;  // guards what reports need
  std::vector<std::string> reports_;
  std::uint64_t lost_ = 0;
  Hub* hub_ = nullptr;
  std::shared_ptr<std::atomic<bool>> ending_;
  napi_ref handle_ = nullptr;  // weak
};

Napi::Value close_server(Napi::Env env, const std::shared_ptr<OpenDisk>& open,
                         const std::shared_ptr<VhostUserService>& service) {
  return start_job(
      env, env.Undefined(),
      [service]() -> Error {
        service->stop();
        return {};
      },
      [open, service](Napi::Env e) {
        open->remove(*service);
        service->unbind(e);
        return e.Undefined();
      });
}

Napi::Value make_handle(Napi::Env env, const std::shared_ptr<OpenDisk>& open,
                        const std::shared_ptr<VhostUserService>& service) {
  const Napi::Object handle = Napi::Object::New(env);
  handle.Set("serving", Napi::Function::New(env, [service](const Napi::CallbackInfo& call) {
               return Napi::Boolean::New(call.Env(), service->serving());
             }));
  handle.Set("takeReports", Napi::Function::New(env, [service](const Napi::CallbackInfo& call) {
               return service->take_reports(call.Env());
             }));
  handle.Set("close", Napi::Function::New(env, [open, service](const Napi::CallbackInfo& call) {
               return close_server(call.Env(), open, service);
             }));
  service->bind(env, handle);
  return handle;
}

}  // namespace

Napi::Value serve_vhost_user(const Napi::CallbackInfo& info,
                             const std::shared_ptr<OpenDisk>& open) {
  const Napi::Env env = info.Env();
  const Options given(env, info[0]);
  VhostUserOptions options;
  std::uint32_t fd = 0;
  given.read("path", options.path);
  given.read("queues", options.queues);
  if (given.has("fd")) {
    given.read("fd", fd);
    options.fd = static_cast<int>(fd);
  }
  std::shared_ptr<image::Disk> disk = open->disk();
  if (env.IsExceptionPending()) return env.Undefined();
  const auto service = std::make_shared<VhostUserService>(std::move(disk));
  return start_job(
      env, env.Undefined(),
      [open, service, options = std::move(options)]() -> Error {
        const OpenDisk::Use use(*open);  // the disk does not close meanwhile
        if (!use) return Error(Kind::closed, "the disk is closed");
        if (Error e = service->start(options)) return e;
        if (open->add(service)) return {};
        service->stop();
        return Error(Kind::closed, "the disk is closed");
      },
      [open, service](Napi::Env e) { return make_handle(e, open, service); });
}

}  // namespace pqblk::node
