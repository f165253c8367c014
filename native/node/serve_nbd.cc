#include "node/serve_nbd.h"

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "export/nbd_server.h"
#include "node/convert.h"
#include "node/job.h"

namespace pqblk::node {
namespace {

namespace nbd = exports::nbd;

constexpr char kOnReports[] = "onReports";

class NbdService final : public Service, public Notifier {
 public:
  explicit NbdService(std::shared_ptr<image::Disk> disk) : disk_(std::move(disk)) {}
  ~NbdService() override { NbdService::stop(); }

  Error start(nbd::ServerOptions options) {
    auto started = nbd::Server::start(*disk_, std::move(options));
    if (!started) return started.take_error();
    server_ = std::move(*started);
    return {};
  }
  void stop() override {
    if (server_ != nullptr) server_->close();
  }
  nbd::Server& server() { return *server_; }

  // ---- the environment's thread ----
  void bind(Napi::Env env, const Napi::Object& handle) {
    hub_ = &EnvState::of(env).hub;
    hub_->hold();
    napi_create_reference(env, handle, 0, &handle_);
    // Weak: the server does not keep the service, which owns it.
    server_->on_report([self = std::weak_ptr<Notifier>(shared_from_this()), hub = hub_,
                        ending = EnvState::of(env).ending] {
      const auto notifier = self.lock();
      if (notifier != nullptr && !ending->load(std::memory_order_acquire)) hub->post(*notifier);
    });
  }
  void unbind(Napi::Env env) {
    if (hub_ == nullptr) return;
    std::exchange(hub_, nullptr)->unhold();
    napi_delete_reference(env, std::exchange(handle_, nullptr));
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
  const std::shared_ptr<image::Disk> disk_;
  std::unique_ptr<nbd::Server> server_;
  Hub* hub_ = nullptr;
  napi_ref handle_ = nullptr;  // weak
};

nbd::ServerOptions read_options(const Napi::CallbackInfo& info) {
  const Options options(info.Env(), info[0]);
  nbd::ServerOptions out;
  std::uint32_t port = 0;
  options.read("path", out.unix_path);
  options.read("host", out.tcp_host);
  options.read("port", port);
  options.read("pskFile", out.tls.psk_file);
  options.read("certificates", out.tls.certificates);
  options.read("insecure", out.insecure);
  options.read("exportName", out.export_name);
  options.read("description", out.description);
  options.read("clientsMax", out.clients_max);
  options.read("handshakeMs", out.handshake_ms);
  options.read("stallMs", out.stall_ms);
  options.read("idleMs", out.idle_ms);
  if (port > 0xffff) throw_type_error(info.Env(), "port: expected 0 to 65535");
  out.tcp_port = static_cast<std::uint16_t>(port);
  return out;
}

Napi::Value stats_to_js(Napi::Env env, const nbd::ServerStats& stats) {
  static constexpr std::array<const char*, nbd::kCommands> kNames{
      "reads", "writes", nullptr, "flushes", "trims", "caches", "writeZeroes", "blockStatus"};
  const Napi::Object out = Napi::Object::New(env);
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    if (kNames[i] != nullptr) out.Set(kNames[i], number_to_js(env, stats.commands[i]));
  }
  for (const auto& [name, value] : {std::pair<const char*, std::uint64_t>{"clients", stats.clients},
                                    {"negotiating", stats.negotiating},
                                    {"accepted", stats.accepted},
                                    {"refusedClients", stats.refused_clients},
                                    {"failedHandshakes", stats.failed_handshakes},
                                    {"timeouts", stats.timeouts},
                                    {"errors", stats.errors},
                                    {"refusedRequests", stats.refused},
                                    {"receivedBytes", stats.received_bytes},
                                    {"sentBytes", stats.sent_bytes}}) {
    out.Set(name, number_to_js(env, value));
  }
  return out;
}

Napi::Value reports_to_js(Napi::Env env, nbd::Server& server) {
  std::uint64_t lost = 0;
  const std::vector<std::string> texts = server.take_reports(lost);
  const Napi::Array out = Napi::Array::New(env);
  std::uint32_t count = 0;
  for (const std::string& text : texts) out.Set(count++, text);
  if (lost != 0) out.Set(count, std::to_string(lost) + " more reports were dropped");
  return out;
}

Napi::Value close_server(Napi::Env env, const std::shared_ptr<OpenDisk>& open,
                         const std::shared_ptr<NbdService>& service) {
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
                        const std::shared_ptr<NbdService>& service) {
  const Napi::Object handle = Napi::Object::New(env);
  handle.Set("port", service->server().tcp_port());
  handle.Set("stats", Napi::Function::New(env, [service](const Napi::CallbackInfo& call) {
               return stats_to_js(call.Env(), service->server().stats());
             }));
  handle.Set("takeReports", Napi::Function::New(env, [service](const Napi::CallbackInfo& call) {
               return reports_to_js(call.Env(), service->server());
             }));
  handle.Set("close", Napi::Function::New(env, [open, service](const Napi::CallbackInfo& call) {
               return close_server(call.Env(), open, service);
             }));
  service->bind(env, handle);
  return handle;
}

}  // namespace

Napi::Value serve_nbd(const Napi::CallbackInfo& info, const std::shared_ptr<OpenDisk>& open) {
  const Napi::Env env = info.Env();
  nbd::ServerOptions options = read_options(info);
  std::shared_ptr<image::Disk> disk = open->disk();
  if (env.IsExceptionPending()) return env.Undefined();
  const auto service = std::make_shared<NbdService>(std::move(disk));
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
