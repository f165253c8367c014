// Blocking work on a thread of the pool that settles a promise, with progress and a way to stop it.
//
// Room node/.
#pragma once

#include <napi.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/error.h"
#include "node/env.h"

namespace pqblk::node {

// What a running job and its JobToken share. report() runs on the job's thread.
class TokenCore final : public Notifier {
 public:
  // Progress in whatever unit the job counts. False: stop.
  bool report(std::uint64_t done, std::uint64_t total);
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

 private:
  friend class JobToken;
  void notified(Napi::Env env) override;

  std::atomic<bool> cancelled_{false};
  std::atomic<std::uint64_t> done_{0}, total_{0};
  std::uint64_t next_report_ns_ = 0;  // the job's thread only
  Hub* hub_ = nullptr;                // set for the run of the job
  std::shared_ptr<std::atomic<bool>> ending_;
  class JobToken* token_ = nullptr;  // the environment's thread only
};

// JavaScript: new JobToken(onProgress?: (done, total) => void), with cancel(). For one job.
class JobToken : public Napi::ObjectWrap<JobToken> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit JobToken(const Napi::CallbackInfo& info);
  ~JobToken() override { core_->token_ = nullptr; }

  // The token in `value`; a fresh core that nobody cancels when it is undefined. Keeps the
  // JavaScript object alive until release().
  static std::shared_ptr<TokenCore> acquire(Napi::Env env, const Napi::Value& value);
  static void release(const std::shared_ptr<TokenCore>& core);

 private:
  friend class TokenCore;
  Napi::Value cancel(const Napi::CallbackInfo& info);
  std::shared_ptr<TokenCore> core_ = std::make_shared<TokenCore>();
};

// Derive, keep what the work needs as members (no JavaScript values), and start().
class Job : public Notifier {
 public:
  // Takes the job over; the promise rejects with error_to_js() of what run() returned. `token` is
  // undefined or a JobToken. When the environment ends first, the job is destroyed after run().
  static Napi::Value start(Napi::Env env, std::shared_ptr<Job> job, const Napi::Value& token);

 protected:
  virtual Error run() = 0;                        // on a pool thread, may block
  virtual Napi::Value result(Napi::Env env) = 0;  // after run() was ok
  TokenCore& token() { return *token_; }

 private:
  void notified(Napi::Env env) override;

  Error error_;
  std::shared_ptr<TokenCore> token_;
  napi_deferred deferred_ = nullptr;
};

// A job from lambdas: run() -> Error; result(env) -> Napi::Value.
template <class Run, class Result>
class LambdaJob final : public Job {
 public:
  LambdaJob(Run run, Result result) : run_(std::move(run)), result_(std::move(result)) {}

 protected:
  Error run() override {
    if constexpr (std::is_invocable_v<Run, TokenCore&>)
      return run_(token());
    else
      return run_();
  }
  Napi::Value result(Napi::Env env) override { return result_(env); }

 private:
  Run run_;
  Result result_;
};

template <class Run, class Result>
Napi::Value start_job(Napi::Env env, const Napi::Value& token, Run run, Result result) {
  return Job::start(
      env, std::make_unique<LambdaJob<Run, Result>>(std::move(run), std::move(result)), token);
}

}  // namespace pqblk::node
