#include "node/job.h"

#include <chrono>
#include <utility>

#include "node/convert.h"
#include "node/job_pool.h"

namespace pqblk::node {
namespace {

constexpr char kCallback[] = "onProgress";
constexpr std::uint64_t kReportEveryNs = 50'000'000;
constexpr napi_type_tag kTokenTag = {0x5071626c6b546f6bU, 0x8d1f4b0ae6c24f11U};

std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch() /
                                    std::chrono::nanoseconds(1));
}

}  // namespace

// ---- tokens ----

bool TokenCore::report(std::uint64_t done, std::uint64_t total) {
  if (cancelled_.load(std::memory_order_relaxed)) return false;
  if (ending_ != nullptr && ending_->load(std::memory_order_relaxed)) return false;
  if (JobPool::instance().ending()) return false;
  done_.store(done, std::memory_order_relaxed);
  total_.store(total, std::memory_order_relaxed);
  const std::uint64_t now = now_ns();
  if (hub_ != nullptr && (now >= next_report_ns_ || done == total)) {
    next_report_ns_ = now + kReportEveryNs;
    hub_->post(*this);
  }
  return true;
}

void TokenCore::notified(Napi::Env env) {
  if (token_ == nullptr) return;
  napi_value token = nullptr;
  if (napi_get_reference_value(env, *token_, &token) != napi_ok) return;
  call_method(env, token, kCallback,
              {number_to_js(env, done_.load(std::memory_order_relaxed)),
               number_to_js(env, total_.load(std::memory_order_relaxed))});
}

Napi::Function JobToken::define(Napi::Env env) {
  return DefineClass(env, "JobToken", {InstanceMethod<&JobToken::cancel>("cancel")});
}

JobToken::JobToken(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  napi_type_tag_object(info.Env(), info.This(), &kTokenTag);
  core_->token_ = this;
  // A property, so that a function that leads back to this object can be collected with it.
  if (info.Length() > 0 && info[0].IsFunction()) Value().Set(kCallback, info[0]);
}

Napi::Value JobToken::cancel(const Napi::CallbackInfo& info) {
  core_->cancel();
  return info.Env().Undefined();
}

std::shared_ptr<TokenCore> JobToken::acquire(Napi::Env env, const Napi::Value& value) {
  std::shared_ptr<TokenCore> core;
  bool is_token = false;
  if (value.IsObject()) napi_check_object_type_tag(env, value, &kTokenTag, &is_token);
  if (is_token) {
    JobToken* token = Unwrap(value.As<Napi::Object>());
    token->Ref();
    core = token->core_;
  } else {
    core = std::make_shared<TokenCore>();
  }
  EnvState& state = EnvState::of(env);
  core->hub_ = &state.hub;
  core->ending_ = state.ending;
  return core;
}

void JobToken::release(const std::shared_ptr<TokenCore>& core) {
  if (core->token_ != nullptr) core->token_->Unref();
}

// ---- jobs ----

Napi::Value Job::start(Napi::Env env, std::shared_ptr<Job> job, const Napi::Value& token) {
  EnvState& state = EnvState::of(env);
  napi_value promise = nullptr;
  napi_create_promise(env, &job->deferred_, &promise);
  job->token_ = JobToken::acquire(env, token);
  state.hub.hold();
  state.job_started();
  const bool taken = JobPool::instance().run([job, &state]() mutable {
    job->error_ = job->run();
    state.hub.post(*job);
    job.reset();
    state.job_ended();  // the last look at the environment's state
  });
  if (!taken) {
    job->error_ = Error(Kind::no_memory, "no thread could be started");
    state.hub.post(*job);
    state.job_ended();
  }
  return Napi::Value(env, promise);
}

void Job::notified(Napi::Env env) {
  EnvState::of(env).hub.unhold();
  JobToken::release(token_);
  Napi::Value value;
  if (!error_) value = result(env);
  if (env.IsExceptionPending()) {
    napi_reject_deferred(env, deferred_, env.GetAndClearPendingException().Value());
  } else if (error_) {
    napi_reject_deferred(env, deferred_, error_to_js(env, error_));
  } else {
    napi_resolve_deferred(env, deferred_, value);
  }
}

}  // namespace pqblk::node
