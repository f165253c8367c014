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
  void describe(Napi::Env env, const Napi::Object& handle) override {
    const auto tell = [&](const char* name, bool (exports::VhostUserServer::*what)() const) {
      handle.Set(name, Napi::Function::New(env, [this, what, keep = shared_from_this()](
                                                    const Napi::CallbackInfo& call) {
                   return Napi::Boolean::New(call.Env(), (*server_.*what)());
                 }));
    };
    tell("serving", &exports::VhostUserServer::serving);
    tell("connected", &exports::VhostUserServer::connected);
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
