#include "node/env.h"

#include <cstdlib>
#include <utility>

#include "node/job_pool.h"

namespace pqblk::node {
namespace {

// Every disk that any environment of this process has open. process.exit() runs no hook of the
// environment but does run exit handlers, while the queues' threads still work: they must have
// ended before libraries below them take their memory down.
class OpenDisks {
 public:
  static OpenDisks& instance() {
    static OpenDisks& all = *new OpenDisks;  // never destroyed: threads may look at any moment
    return all;
  }
  void add(const std::shared_ptr<OpenDisk>& disk) {
    std::lock_guard guard(inner_);
    if (!registered_) {
      std::atexit([] {
        JobPool::instance().end();
        instance().close_all();
      });
    }
    registered_ = true;
    disks_.insert(disk);
  }
  void remove(const std::shared_ptr<OpenDisk>& disk) {
    std::lock_guard guard(inner_);
    disks_.erase(disk);
  }

 private:
  void close_all() {
    std::unique_lock guard(inner_);
    while (!disks_.empty()) {
      const std::shared_ptr<OpenDisk> disk = *disks_.begin();
      guard.unlock();
      static_cast<void>(disk->close());
      guard.lock();
      disks_.erase(disk);
    }
  }
  std::mutex inner_;
  bool registered_ = false;
  std::set<std::shared_ptr<OpenDisk>> disks_;
};

}  // namespace

// ---- Hub ----

Hub::Hub(Napi::Env env) : env_(env) {
  const napi_value name = Napi::String::New(env, "pqblk");
  napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this,
                                  &Hub::on_wake, &function_);
  napi_unref_threadsafe_function(env, function_);
}

void Hub::close() {
  std::vector<std::shared_ptr<Notifier>> dropped;  // after the lock: their destructors may block
  std::lock_guard guard(inner_);
  if (std::exchange(closed_, true)) return;
  dropped.swap(ready_);
  napi_release_threadsafe_function(function_, napi_tsfn_abort);
}

void Hub::post(Notifier& notifier) {
  if (notifier.queued_.exchange(true, std::memory_order_acq_rel)) return;
  std::lock_guard guard(inner_);
  if (closed_) return;
  ready_.push_back(notifier.shared_from_this());
  if (std::exchange(scheduled_, true)) return;
  napi_call_threadsafe_function(function_, nullptr, napi_tsfn_nonblocking);
}

void Hub::on_wake(napi_env env, napi_value, void* context, void*) {
  if (env != nullptr) static_cast<Hub*>(context)->run(env);  // null: the environment is ending
}

void Hub::run(Napi::Env env) {
  std::vector<std::shared_ptr<Notifier>> batch;
  {
    std::lock_guard guard(inner_);
    scheduled_ = false;
    batch.swap(ready_);
  }
  for (const auto& notifier : batch) {
    const Napi::HandleScope scope(env);
    notifier->queued_.store(false, std::memory_order_release);
    notifier->notified(env);
    bool threw = false;
    napi_value error = nullptr;
    // A callback threw: as uncaught as in any other callback.
    if (napi_is_exception_pending(env, &threw) == napi_ok && threw &&
        napi_get_and_clear_last_exception(env, &error) == napi_ok) {
      napi_fatal_exception(env, error);
    }
  }
}

bool call_method(Napi::Env env, napi_value self, const char* name,
                 std::initializer_list<napi_value> arguments) {
  napi_value callback = nullptr;
  napi_valuetype type = napi_undefined;
  if (self == nullptr || napi_get_named_property(env, self, name, &callback) != napi_ok ||
      napi_typeof(env, callback, &type) != napi_ok) {
    return false;
  }
  return type != napi_function ||
         napi_call_function(env, self, callback, arguments.size(), arguments.begin(), nullptr) !=
             napi_cannot_run_js;
}

void Hub::hold() {
  if (holds_++ == 0) napi_ref_threadsafe_function(env_, function_);
}

void Hub::unhold() {
  if (--holds_ == 0) napi_unref_threadsafe_function(env_, function_);
}

// ---- OpenDisk ----

std::shared_ptr<OpenDisk> OpenDisk::make(std::unique_ptr<image::Disk> disk) {
  std::shared_ptr<OpenDisk> open(new OpenDisk(std::move(disk)));
  OpenDisks::instance().add(open);
  return open;
}

Error OpenDisk::close() {
  refuse_new();
  const std::shared_ptr<image::Disk> disk = disk_;
  std::vector<std::shared_ptr<Service>> services;
  {
    std::lock_guard guard(inner_);
    services = services_;
  }
  for (const auto& service : services) service->stop();
  {
    std::unique_lock guard(inner_);
    left_.wait(guard, [this] { return users_ == 0; });
  }
  Error error = disk->close();
  OpenDisks::instance().remove(shared_from_this());
  return error;
}

bool OpenDisk::add(std::shared_ptr<Service> service) {
  std::lock_guard guard(inner_);
  if (closing()) return false;
  services_.push_back(std::move(service));
  return true;
}

void OpenDisk::remove(const Service& service) {
  std::lock_guard guard(inner_);
  std::erase_if(services_, [&](const auto& one) { return one.get() == &service; });
}

void OpenDisk::announce_growth() {
  std::vector<std::shared_ptr<Service>> services;
  {
    std::lock_guard guard(inner_);
    services = services_;
  }
  for (const auto& service : services) service->disk_grew();
}

void OpenDisk::release(Napi::Env env) {
  for (const auto& service : std::exchange(services_, {})) service->unbind(env);
  disk_.reset();
}

OpenDisk::Use::Use(OpenDisk& disk) : disk_(disk) {
  std::lock_guard guard(disk_.inner_);
  entered_ = !disk_.closing();
  if (entered_) ++disk_.users_;
}

OpenDisk::Use::~Use() {
  if (!entered_) return;
  std::lock_guard guard(disk_.inner_);
  --disk_.users_;
  disk_.left_.notify_all();
}

// ---- EnvState ----

EnvState::EnvState(Napi::Env env) : hub(env) {
  napi_add_env_cleanup_hook(env, &EnvState::on_env_end, this);
}

// The environment ends (a worker was terminated, or the main thread is done) and with it the memory
// that requests in flight point into: they complete first. Nobody sees their completions.
void EnvState::on_env_end(void* self) {
  auto& state = *static_cast<EnvState*>(self);
  state.ending->store(true, std::memory_order_release);
  for (const auto& disk : state.disks_) disk->refuse_new();  // stops their long jobs
  {
    std::unique_lock guard(state.jobs_lock_);
    state.jobs_ended_.wait(guard, [&state] { return state.jobs_ == 0; });
  }
  for (const auto& disk : std::exchange(state.disks_, {})) static_cast<void>(disk->close());
  state.hub.close();
}

void EnvState::job_started() {
  std::lock_guard guard(jobs_lock_);
  ++jobs_;
}

void EnvState::job_ended() {
  std::lock_guard guard(jobs_lock_);
  --jobs_;
  jobs_ended_.notify_all();
}

void EnvState::abandon(std::shared_ptr<OpenDisk> disk) {
  if (disks_.erase(disk) == 0) return;  // it was closed
  disk->refuse_new();
  JobPool::instance().run([disk = std::move(disk)] { static_cast<void>(disk->close()); });
}

}  // namespace pqblk::node
