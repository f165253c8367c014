// What every server of a disk owes to JavaScript: a handle with takeReports() and close(), reports
// that reach the environment's thread, and an end that comes before the disk's.
//
// Room node/. A protocol derives from DiskServer, says how it starts and ends, and hands its handle
// to start_server(); it knows no threads of JavaScript's.
#pragma once

#include <napi.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "node/env.h"

namespace pqblk::node {

inline constexpr std::size_t kReportsMax = 256;  // of a server, kept until somebody takes them

class DiskServer : public Service, public Notifier {
 public:
  // Any thread but the queues'; blocking; may be called again.
  void stop() final;
  void unbind(Napi::Env env) final;

 protected:
  explicit DiskServer(std::shared_ptr<image::Disk> disk) : disk_(std::move(disk)) {}

  image::Disk& disk() { return *disk_; }
  // A line for people, from any thread; dropped and counted when nobody takes them.
  std::function<void(const std::string&)> log() {
    return [this](const std::string& text) { report(text); };
  }
  // On a thread that may block; log() may be called from here on until end() returns.
  virtual Error start() = 0;
  virtual void end() = 0;  // never again after it; not called when start() failed
  // Adds what the protocol has to offer; functions keep shared_from_this(). The environment's
  // thread, after start().
  virtual void describe(Napi::Env env, const Napi::Object& handle) = 0;

 private:
  friend Napi::Value start_server(Napi::Env env, const std::shared_ptr<OpenDisk>& open,
                                  std::shared_ptr<DiskServer> server);
  void report(const std::string& text);
  void bind(Napi::Env env, const Napi::Object& handle);
  Napi::Value take_reports(Napi::Env env);
  Napi::Value make_handle(Napi::Env env, const std::shared_ptr<OpenDisk>& open);
  Napi::Value close(Napi::Env env, const std::shared_ptr<OpenDisk>& open);
  void notified(Napi::Env env) override;
  std::shared_ptr<DiskServer> self() {
    return std::static_pointer_cast<DiskServer>(shared_from_this());
  }

  const std::shared_ptr<image::Disk> disk_;  // outlives what end() ends
  std::mutex stopping_;
  bool started_ = false;

  std::mutex inner_;  // guards what reports need
  std::vector<std::string> reports_;
  std::uint64_t lost_ = 0;
  Hub* hub_ = nullptr;
  std::shared_ptr<std::atomic<bool>> ending_;

  // The environment's thread. Strong while the server is open: whoever only wants to serve need not
  // keep the handle.
  napi_ref handle_ = nullptr;
};

// A promise of the server's handle: what describe() added, takeReports() and close(). When there is
// something to take, the handle's onReports() is called.
Napi::Value start_server(Napi::Env env, const std::shared_ptr<OpenDisk>& open,
                         std::shared_ptr<DiskServer> server);

}  // namespace pqblk::node
