#include "node/serve_nbd.h"

#include <array>
#include <utility>

#include "export/nbd_server.h"
#include "node/convert.h"
#include "node/server_handle.h"

namespace pqblk::node {
namespace {

namespace nbd = exports::nbd;

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

class NbdServer final : public DiskServer {
 public:
  NbdServer(std::shared_ptr<image::Disk> disk, nbd::ServerOptions options)
      : DiskServer(std::move(disk)), options_(std::move(options)) {
    options_.log = log();
  }

 private:
  Error start() override {
    auto started = nbd::Server::start(disk(), std::move(options_));
    if (!started) return started.take_error();
    server_ = std::move(*started);
    return {};
  }
  void end() override { server_->close(); }
  void describe(Napi::Env env, const Napi::Object& handle) override {
    handle.Set("port", server_->tcp_port());
    handle.Set("stats", Napi::Function::New(
                            env, [this, keep = shared_from_this()](const Napi::CallbackInfo& call) {
                              return stats_to_js(call.Env(), server_->stats());
                            }));
  }

  nbd::ServerOptions options_;
  std::unique_ptr<nbd::Server> server_;
};

}  // namespace

Napi::Value serve_nbd(const Napi::CallbackInfo& info, const std::shared_ptr<OpenDisk>& open) {
  const Napi::Env env = info.Env();
  nbd::ServerOptions options = read_options(info);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_server(env, open, std::make_shared<NbdServer>(open->disk(), std::move(options)));
}

}  // namespace pqblk::node
