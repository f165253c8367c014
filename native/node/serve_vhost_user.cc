#include "node/serve_vhost_user.h"

#include <utility>

#include "export/vhost_user.h"
#include "node/convert.h"
#include "node/server_handle.h"

namespace pqblk::node {
namespace {

using exports::VhostUserOptions;

VhostUserOptions read_options(const Napi::CallbackInfo& info) {
  const Options options(info.Env(), info[0]);
  VhostUserOptions out;
  options.read("path", out.path);
  options.read("queues", out.queues);
  if (options.has("fd")) {
    std::uint32_t fd = 0;
    options.read("fd", fd);
    out.fd = static_cast<int>(fd);
  }
  return out;
}

Napi::Value stats_to_js(Napi::Env env, const exports::VhostUserStats& stats) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("connected", Napi::Boolean::New(env, stats.connected));
  for (const auto& [name, value] : {std::pair<const char*, std::uint64_t>{"rings", stats.rings},
                                    {"runningRings", stats.running},
                                    {"accepted", stats.accepted},
                                    {"refusedFrontEnds", stats.refused},
                                    {"requests", stats.requests},
                                    {"errors", stats.errors}}) {
    out.Set(name, number_to_js(env, value));
  }
  return out;
}

class VhostUserServer final : public DiskServer {
 public:
  VhostUserServer(std::shared_ptr<image::Disk> disk, VhostUserOptions options)
      : DiskServer(std::move(disk)), options_(std::move(options)) {
    options_.log = log();
  }

 private:
  Error start() override {
    auto started = exports::VhostUserServer::start(disk(), std::move(options_));
    if (!started) return started.take_error();
    server_ = std::move(*started);
    return {};
  }
  void end() override { server_->stop(); }
  void disk_grew() override { server_->config_changed(); }
  void describe(Napi::Env env, const Napi::Object& handle) override {
    handle.Set(
        "serving",
        Napi::Function::New(env, [this, keep = shared_from_this()](const Napi::CallbackInfo& call) {
          return Napi::Boolean::New(call.Env(), server_->serving());
        }));
    handle.Set("stats", Napi::Function::New(
                            env, [this, keep = shared_from_this()](const Napi::CallbackInfo& call) {
                              return stats_to_js(call.Env(), server_->stats());
                            }));
  }

  VhostUserOptions options_;
  std::unique_ptr<exports::VhostUserServer> server_;
};

}  // namespace

Napi::Value serve_vhost_user(const Napi::CallbackInfo& info,
                             const std::shared_ptr<OpenDisk>& open) {
  const Napi::Env env = info.Env();
  VhostUserOptions options = read_options(info);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_server(env, open,
                      std::make_shared<VhostUserServer>(open->disk(), std::move(options)));
}

}  // namespace pqblk::node
