// What one JavaScript environment (the main thread or a worker) has of the addon: its way to be
// woken, its classes, and the disks it has open.
//
// Room node/: a thin shell. Everything here belongs to the environment's own thread except where
// "any thread" is said.
#pragma once

#include <napi.h>

#include <atomic>
#include <condition_variable>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "image/disk.h"

namespace pqblk::node {

// Something to run on the environment's thread. However often it is posted before it runs, it runs
// once; all that wait share one wake-up of the event loop.
class Notifier : public std::enable_shared_from_this<Notifier> {
 public:
  virtual ~Notifier() = default;  // on any thread: touches nothing of JavaScript

 protected:
  virtual void notified(Napi::Env env) = 0;

 private:
  friend class Hub;
  std::atomic<bool> queued_{false};
};

// The one wake-up path of an environment.
class Hub {
 public:
  explicit Hub(Napi::Env env);
  // Any thread. After close() nothing happens.
  void post(Notifier& notifier);
  // While held, the event loop does not end: something is in flight.
  void hold();
  void unhold();
  void close();

 private:
  static void on_wake(napi_env env, napi_value, void* context, void*);
  void run(Napi::Env env);

  napi_env env_;
  napi_threadsafe_function function_ = nullptr;
  std::uint32_t holds_ = 0;
  std::mutex inner_;  // guards the rest; taken once for a batch, not for each completion
  bool scheduled_ = false;
  bool closed_ = false;
  std::vector<std::shared_ptr<Notifier>> ready_;
};

// What serves a disk to others; stopped before its disk is closed.
class Service {
 public:
  virtual ~Service() = default;  // on any thread: touches nothing of JavaScript
  virtual void stop() = 0;       // any thread but the queues'; blocking; may be called again
  virtual void disk_grew() {}    // any thread
  // After stop(), on the environment's thread: lets go of JavaScript. May be called again.
  virtual void unbind(Napi::Env env) = 0;
};

// A disk that JavaScript opened. Shared by its handle, its channels, its jobs and the list of what
// must be closed at the end.
class OpenDisk : public std::enable_shared_from_this<OpenDisk> {
 public:
  // Any thread. From here on the disk is closed when the process exits, whoever holds it.
  static std::shared_ptr<OpenDisk> make(std::unique_ptr<image::Disk> disk);

  // Null once closed. The environment's thread; jobs take a copy there.
  std::shared_ptr<image::Disk> disk() const { return closing() ? nullptr : disk_; }
  bool closing() const { return closing_.load(std::memory_order_acquire); }
  void refuse_new() { closing_.store(true, std::memory_order_release); }
  // Any thread but the queues'. Blocking: stops services, waits for long jobs to stop, then for I/O
  // in flight.
  Error close();
  // Any thread. False: the disk is closing, nothing is kept.
  bool add(std::shared_ptr<Service> service);
  void remove(const Service& service);
  void announce_growth();       // to its services; any thread
  void release(Napi::Env env);  // environment's thread, after close(): gives the memory back

  // A job that drives the queues for long; it must stop soon once closing() says so.
  class Use {
   public:
    explicit Use(OpenDisk& disk);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    explicit operator bool() const { return entered_; }

   private:
    OpenDisk& disk_;
    bool entered_;
  };

 private:
  explicit OpenDisk(std::unique_ptr<image::Disk> disk) : disk_(std::move(disk)) {}

  std::shared_ptr<image::Disk> disk_;
  std::atomic<bool> closing_{false};
  std::mutex inner_;
  std::condition_variable left_;
  std::uint32_t users_ = 0;
  std::vector<std::shared_ptr<Service>> services_;
};

// Calls self[name](...arguments) where that is a function. In plain Node-API: in a worker that was
// told to end each step may fail, which a wrapper takes for a reason to end the process. False:
// JavaScript cannot run any more. An exception stays pending.
bool call_method(Napi::Env env, napi_value self, const char* name,
                 std::initializer_list<napi_value> arguments);

class EnvState {
 public:
  explicit EnvState(Napi::Env env);
  static EnvState& of(Napi::Env env) { return *env.GetInstanceData<EnvState>(); }

  Hub hub;
  Napi::FunctionReference disk_class, channel_class, token_class;

  void add(const std::shared_ptr<OpenDisk>& disk) { disks_.insert(disk); }
  void remove(const std::shared_ptr<OpenDisk>& disk) { disks_.erase(disk); }
  // A handle was collected without close(): a thread of its own closes the disk.
  void abandon(std::shared_ptr<OpenDisk> disk);
  // Jobs of this environment that run; its end waits for them. job_ended: any thread.
  void job_started();
  void job_ended();
  // Long jobs look here (any thread): the environment is ending, stop.
  std::shared_ptr<std::atomic<bool>> ending = std::make_shared<std::atomic<bool>>(false);

 private:
  static void on_env_end(void* self);
  std::set<std::shared_ptr<OpenDisk>> disks_;
  std::mutex jobs_lock_;
  std::condition_variable jobs_ended_;
  std::uint32_t jobs_ = 0;
};

}  // namespace pqblk::node
