#include "node/disk_handle.h"

#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "image/bench.h"
#include "node/channel.h"
#include "node/convert.h"
#include "node/job.h"
#include "node/job_pool.h"
#include "node/serve_nbd.h"
#include "node/serve_vhost_user.h"

namespace pqblk::node {
namespace {

using image::Cache;
using io::EngineType;

constexpr std::array<std::pair<std::string_view, Cache>, 4> kCaches{{
    {"none", Cache::none},
    {"writeback", Cache::writeback},
    {"writethrough", Cache::writethrough},
    {"unsafe", Cache::unsafe},
}};
constexpr std::array<std::pair<std::string_view, EngineType>, 4> kEngines{{
    {"auto", EngineType::automatic},
    {"io_uring", EngineType::uring},
    {"aio", EngineType::aio},
    {"threads", EngineType::threads},
}};
std::string real_path(const std::string& path) {
  char resolved[PATH_MAX];
  return ::realpath(path.c_str(), resolved) != nullptr ? resolved : path;
}

// allowBacking: true, or the list of files that an image may name as its backing. The gate is asked
// on the engine's threads, so it cannot be a JavaScript function.
storage::Gate read_gate(Napi::Env env, const Options& options) {
  const Napi::Value allow = options.value("allowBacking");
  if (allow.IsBoolean() && allow.As<Napi::Boolean>().Value()) {
    return [](const std::string&) { return true; };
  }
  if (!allow.IsArray()) return {};
  std::vector<std::string> paths;
  const auto list = allow.As<Napi::Array>();
  for (std::uint32_t i = 0; i < list.Length(); ++i) {
    const Napi::Value path = list.Get(i);
    if (!path.IsString()) {
      throw_type_error(env, "allowBacking: expected a list of paths");
      return {};
    }
    paths.push_back(real_path(path.As<Napi::String>().Utf8Value()));
  }
  return [paths = std::move(paths)](const std::string& path) {
    const std::string wanted = real_path(path);
    for (const std::string& p : paths) {
      if (p == wanted) return true;
    }
    return false;
  };
}

image::OpenOptions read_open_options(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  image::OpenOptions out;
  options.read("path", out.path);
  options.read_choice<image::Format>("format", format_names(), out.format);
  options.read("readOnly", out.read_only);
  options.read("toResize", out.to_resize);
  options.read_choice<Cache>("cache", kCaches, out.cache);
  options.read("directRequired", out.direct_required);
  options.read("queues", out.queues);
  options.read_choice<EngineType>("engine", kEngines, out.io.engine);
  options.read("ringDepth", out.io.depth);
  options.read("sqpoll", out.io.sqpoll);
  options.read("spinMicroseconds", out.io.spin_us);
  options.read("l2CacheBytes", out.limits.l2_cache);
  options.read("entryCacheBytes", out.limits.entry_cache);
  options.read("pendingDataBytes", out.limits.pending_data);
  options.read("assumeNonVolatile", out.assume_non_volatile);
  options.read("allowUnauthenticatedBacking", out.allow_unauthenticated_backing);
  options.read("uuid", out.expected_uuid);
  if (options.has("backingFormat")) {
    image::Format format{};
    options.read_choice<image::Format>("backingFormat", format_names(), format);
    out.backing_format = format;
  }
  out.gate = read_gate(env, options);
  if (info[1].IsObject()) {
    sealed::VolumeKeys keys;
    read_keys(env, info[1], keys);
    out.keys = std::move(keys);
  }
  if (out.path.empty()) throw_type_error(env, "path: expected the path of the disk");
  return out;
}

constexpr std::size_t kExtentsAtOnce = 1024;

Napi::Value extent_to_js(Napi::Env env, const image::Extent& extent) {
  static constexpr const char* kNames[] = {"data", "zero", "hole"};
  const Napi::Object out = Napi::Object::New(env);
  out.Set("length", number_to_js(env, extent.length));
  out.Set("kind", kNames[static_cast<std::size_t>(extent.kind)]);
  return out;
}

Napi::Value direction_to_js(Napi::Env env, const image::BenchDirection& d) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("ops", number_to_js(env, d.ops));
  out.Set("bytes", number_to_js(env, d.bytes));
  out.Set("iops", d.iops);
  out.Set("bytesPerSecond", d.bytes_per_second);
  const Napi::Object latency = Napi::Object::New(env);
  const auto us = [](std::uint64_t ns) { return static_cast<double>(ns) / 1000.0; };
  latency.Set("min", us(d.latency.min_ns()));
  latency.Set("mean", d.latency.mean_ns() / 1000.0);
  latency.Set("max", us(d.latency.max_ns()));
  for (const auto& [name, percent] : {std::pair{"p50", 50.0},
                                      {"p90", 90.0},
                                      {"p95", 95.0},
                                      {"p99", 99.0},
                                      {"p99_9", 99.9},
                                      {"p99_99", 99.99}}) {
    latency.Set(name, us(d.latency.percentile_ns(percent)));
  }
  out.Set("latencyMicroseconds", latency);
  return out;
}

// Drives the queues for long; leaves when the disk is to be closed.
class BenchJob final : public Job {
 public:
  BenchJob(std::shared_ptr<OpenDisk> open, std::shared_ptr<image::Disk> disk, image::BenchSpec spec)
      : open_(std::move(open)), disk_(std::move(disk)), spec_(std::move(spec)) {}

 protected:
  Error run() override {
    const OpenDisk::Use use(*open_);
    if (!use) return Error(Kind::closed, "the disk is closed");
    spec_.progress = [this](std::uint64_t done, std::uint64_t total) {
      stopped_ = !token().report(done, total);
      return !stopped_ && !open_->closing();
    };
    auto result = image::run_bench(*disk_, spec_);
    if (!result) return result.take_error();
    if (stopped_) return Error(Kind::canceled, "the benchmark was stopped");
    if (open_->closing()) return Error(Kind::closed, "the disk is closed");
    result_ = std::move(*result);
    return {};
  }
  Napi::Value result(Napi::Env env) override {
    const Napi::Object out = Napi::Object::New(env);
    out.Set("read", direction_to_js(env, result_.read));
    out.Set("write", direction_to_js(env, result_.write));
    out.Set("flush", direction_to_js(env, result_.flush));
    out.Set("seconds", static_cast<double>(result_.elapsed_ns) / 1e9);
    out.Set("queues", result_.queues);
    return out;
  }

 private:
  const std::shared_ptr<OpenDisk> open_;
  const std::shared_ptr<image::Disk> disk_;
  image::BenchSpec spec_;
  bool stopped_ = false;
  image::BenchResult result_;
};

// { buckets, sumNs }
Napi::Object latency_to_js(Napi::Env env, const image::LatencyStats& stats) {
  const Napi::Array buckets = Napi::Array::New(env, stats.buckets.size());
  for (std::uint32_t i = 0; i < stats.buckets.size(); ++i) {
    buckets.Set(i, number_to_js(env, stats.buckets[i]));
  }
  const Napi::Object out = Napi::Object::New(env);
  out.Set("buckets", buckets);
  out.Set("sumNs", number_to_js(env, stats.sum_ns));
  return out;
}

Napi::Object queue_stats_to_js(Napi::Env env, const image::QueueStats& stats) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("reads", number_to_js(env, stats.reads));
  out.Set("writes", number_to_js(env, stats.writes));
  out.Set("flushes", number_to_js(env, stats.flushes));
  out.Set("discards", number_to_js(env, stats.discards));
  out.Set("zeroes", number_to_js(env, stats.zeroes));
  out.Set("errors", number_to_js(env, stats.errors));
  out.Set("readBytes", number_to_js(env, stats.read_bytes));
  out.Set("writtenBytes", number_to_js(env, stats.written_bytes));
  out.Set("inFlight", number_to_js(env, stats.in_flight));
  out.Set("throttled", number_to_js(env, stats.throttled));
  const Napi::Object latency = Napi::Object::New(env);
  latency.Set("reads", latency_to_js(env, stats.read_latency));
  latency.Set("writes", latency_to_js(env, stats.write_latency));
  latency.Set("flushes", latency_to_js(env, stats.flush_latency));
  latency.Set("discards", latency_to_js(env, stats.discard_latency));
  latency.Set("zeroes", latency_to_js(env, stats.zero_latency));
  out.Set("latency", latency);
  return out;
}

Napi::Object backend_stats_to_js(Napi::Env env, const image::BackendStats& stats) {
  const Napi::Object out = Napi::Object::New(env);
  out.Set("metadataReads", number_to_js(env, stats.metadata_reads));
  out.Set("metadataWrites", number_to_js(env, stats.metadata_writes));
  out.Set("l2Hits", number_to_js(env, stats.l2_hits));
  out.Set("l2Misses", number_to_js(env, stats.l2_misses));
  out.Set("entryHits", number_to_js(env, stats.entry_hits));
  out.Set("entryMisses", number_to_js(env, stats.entry_misses));
  out.Set("logBytes", number_to_js(env, stats.log_bytes));
  out.Set("logCapacity", number_to_js(env, stats.log_capacity));
  out.Set("logUsed", number_to_js(env, stats.log_used));
  out.Set("checkpoints", number_to_js(env, stats.checkpoints));
  out.Set("integrityFailures", number_to_js(env, stats.integrity_failures));
  out.Set("sectorsSealed", number_to_js(env, stats.sectors_sealed));
  out.Set("sectorsOpened", number_to_js(env, stats.sectors_opened));
  return out;
}

// A disk that nobody is left to take is closed again.
class OpenJob final : public Job {
 public:
  explicit OpenJob(image::OpenOptions options) : options_(std::move(options)) {}
  ~OpenJob() override {
    if (open_ != nullptr) static_cast<void>(open_->close());
  }

 protected:
  Error run() override {
    auto disk = image::Disk::open(std::move(options_));
    if (!disk) return disk.take_error();
    open_ = OpenDisk::make(std::move(*disk));
    return {};
  }
  Napi::Value result(Napi::Env env) override { return DiskHandle::make(env, std::move(open_)); }

 private:
  image::OpenOptions options_;
  std::shared_ptr<OpenDisk> open_;
};

}  // namespace

Napi::Value open_disk(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  image::OpenOptions options = read_open_options(info);
  if (env.IsExceptionPending()) return env.Undefined();
  return Job::start(env, std::make_shared<OpenJob>(std::move(options)), env.Undefined());
}

// ---- DiskHandle ----

namespace {
thread_local std::shared_ptr<OpenDisk>* making = nullptr;
}  // namespace

Napi::Function DiskHandle::define(Napi::Env env) {
  return DefineClass(
      env, "Disk",
      {InstanceMethod<&DiskHandle::close>("close"), InstanceMethod<&DiskHandle::resize>("resize"),
       InstanceMethod<&DiskHandle::extents>("extents"), InstanceMethod<&DiskHandle::facts>("facts"),
       InstanceMethod<&DiskHandle::stats>("stats"),
       InstanceMethod<&DiskHandle::set_limits>("setLimits"),
       InstanceMethod<&DiskHandle::limits>("limits"),
       InstanceMethod<&DiskHandle::channel>("channel"), InstanceMethod<&DiskHandle::bench>("bench"),
       InstanceMethod<&DiskHandle::change_key_area>("changeKeyArea"),
       InstanceMethod<&DiskHandle::begin_epoch>("beginEpoch"),
       InstanceMethod<&DiskHandle::rekey>("rekey"),
       InstanceMethod<&DiskHandle::require_within_size>("requireWithinSize"),
       InstanceMethod<&DiskHandle::finish_epoch>("finishEpoch"),
       InstanceMethod<&DiskHandle::serve_nbd>("serveNbd"),
       InstanceMethod<&DiskHandle::serve_vhost_user>("serveVhostUser")});
}

Napi::Value DiskHandle::make(Napi::Env env, std::shared_ptr<OpenDisk> disk) {
  making = &disk;
  const Napi::Value handle = EnvState::of(env).disk_class.New({});
  making = nullptr;
  if (disk != nullptr) {  // no handle could be made: the environment is being terminated
    JobPool::instance().run([disk] { static_cast<void>(disk->close()); });
  }
  return handle;
}

DiskHandle::DiskHandle(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  if (making == nullptr) {
    throw_type_error(info.Env(), "a Disk is made by openDisk()");
    return;
  }
  open_ = std::move(*making);
  EnvState::of(info.Env()).add(open_);
}

void DiskHandle::Finalize(Napi::Env env) {
  if (open_ == nullptr) return;
  if (EnvState* state = env.GetInstanceData<EnvState>()) state->abandon(std::move(open_));
}

std::shared_ptr<image::Disk> DiskHandle::disk_or_throw(Napi::Env env) const {
  std::shared_ptr<image::Disk> disk = open_->disk();
  if (disk == nullptr) {
    const Error error(Kind::closed, "the disk is closed");
    Napi::Error(env, error_to_js(env, error)).ThrowAsJavaScriptException();
  }
  return disk;
}

Napi::Value DiskHandle::close(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (disk_or_throw(env) == nullptr) return env.Undefined();
  open_->refuse_new();
  const auto error = std::make_shared<Error>();
  return start_job(
      env, env.Undefined(),
      [open = open_, error]() -> Error {
        *error = open->close();
        return {};
      },
      [open = open_, error](Napi::Env e) -> Napi::Value {
        EnvState::of(e).remove(open);  // whether it closed well or not
        open->release(e);
        if (*error) Napi::Error(e, error_to_js(e, *error)).ThrowAsJavaScriptException();
        return e.Undefined();
      });
}

Napi::Value DiskHandle::resize(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  if (disk == nullptr) return env.Undefined();
  std::uint64_t size = 0;
  const Options options(env, info[0]);
  options.read("size", size);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_job(
      env, env.Undefined(),
      [open = open_, disk, size] {
        Error error = disk->resize(size);
        if (!error) open->announce_growth();
        return error;
      },
      [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value DiskHandle::extents(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  std::uint64_t offset = 0, length = 0;
  const Options options(env, info[0]);
  options.read("offset", offset);
  options.read("length", length);
  if (env.IsExceptionPending()) return env.Undefined();
  const auto found = std::make_shared<std::vector<image::Extent>>();
  return start_job(
      env, env.Undefined(),
      [disk, offset, length, found]() -> Error {
        auto extents = disk->extents(offset, length, kExtentsAtOnce);
        if (!extents) return extents.take_error();
        *found = std::move(*extents);
        return {};
      },
      [found](Napi::Env e) -> Napi::Value {
        const Napi::Array out = Napi::Array::New(e, found->size());
        std::uint32_t i = 0;
        for (const image::Extent& extent : *found) out.Set(i++, extent_to_js(e, extent));
        return out;
      });
}

Napi::Value DiskHandle::facts(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  if (disk == nullptr) return env.Undefined();
  const image::DiskFacts facts = disk->facts();
  const Napi::Object out = Napi::Object::New(env);
  out.Set("path", facts.path);
  out.Set("format", facts.format);
  out.Set("engine", facts.engine);
  if (!facts.fallback_cause.empty()) out.Set("engineFallbackCause", facts.fallback_cause);
  out.Set("durabilityClass", facts.durability_class);
  out.Set("id", facts.id);
  out.Set("size", number_to_js(env, facts.size));
  out.Set("clusterSize", facts.cluster_size);
  out.Set("queues", facts.queues);
  out.Set("readOnly", facts.read_only);
  out.Set("direct", facts.direct);
  if (!facts.suite.empty()) out.Set("suite", facts.suite);
  if (!facts.aead.empty()) out.Set("aead", facts.aead);
  if (facts.session_id != 0) out.Set("sessionId", facts.session_id);
  return out;
}

Napi::Value DiskHandle::stats(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  if (disk == nullptr) return env.Undefined();
  const Napi::Array queues = Napi::Array::New(env);
  const std::uint32_t count = disk->facts().queues;
  for (std::uint32_t i = 0; i < count; ++i) {
    queues.Set(i, queue_stats_to_js(env, disk->queue_stats(i)));
  }
  const Napi::Object out = Napi::Object::New(env);
  out.Set("queues", queues);
  out.Set("backend", backend_stats_to_js(env, disk->backend_stats()));
  return out;
}

// setLimits({ iopsMax, iopsBurst, bpsMax, bpsBurst }); what is missing has no limit.
Napi::Value DiskHandle::set_limits(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  image::RateLimits limits;
  const Options options(env, info[0]);
  options.read("iopsMax", limits.iops_max);
  options.read("iopsBurst", limits.iops_burst);
  options.read("bpsMax", limits.bps_max);
  options.read("bpsBurst", limits.bps_burst);
  if (env.IsExceptionPending()) return env.Undefined();
  if (const Error error = disk->set_rate_limits(limits)) {
    Napi::Error(env, error_to_js(env, error)).ThrowAsJavaScriptException();
  }
  return env.Undefined();
}

Napi::Value DiskHandle::limits(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  if (disk == nullptr) return env.Undefined();
  const image::RateLimits limits = disk->rate_limits();
  const Napi::Object out = Napi::Object::New(env);
  out.Set("iopsMax", number_to_js(env, limits.iops_max));
  out.Set("iopsBurst", number_to_js(env, limits.iops_burst));
  out.Set("bpsMax", number_to_js(env, limits.bps_max));
  out.Set("bpsBurst", number_to_js(env, limits.bps_burst));
  return out;
}

// channel({ queue, slots, arenaBytes }, onCompletions)
Napi::Value DiskHandle::channel(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  std::uint32_t queue = 0, slots = 256;
  std::uint64_t arena = 0;
  const Options options(env, info[0]);
  options.read("queue", queue);
  options.read("slots", slots);
  options.read("arenaBytes", arena);
  if (!info[1].IsFunction()) throw_type_error(env, "expected a function for completions");
  if (env.IsExceptionPending()) return env.Undefined();
  if (queue >= disk->facts().queues || slots == 0 || slots > kChannelSlotsMax ||
      arena > kChannelArenaMax) {
    throw_type_error(env, "no such queue, or slots or arenaBytes out of bounds");
    return env.Undefined();
  }
  return Channel::make(env, open_, queue, slots, arena, info[1].As<Napi::Function>());
}

Napi::Value DiskHandle::bench(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  std::shared_ptr<image::Disk> disk = disk_or_throw(env);
  image::BenchSpec spec;
  std::string pattern = "randread";
  const Options options(env, info[0]);
  options.read("rw", pattern);
  options.read("blockSize", spec.block_size);
  options.read("iodepth", spec.iodepth);
  options.read("size", spec.size);
  options.read("runtimeMs", spec.runtime_ms);
  options.read("rampMs", spec.ramp_ms);
  options.read("seed", spec.seed);
  options.read("readPercent", spec.read_percent);
  options.read("flushEvery", spec.flush_every);
  options.read("stride", spec.stride);
  auto parsed = image::parse_pattern(pattern);
  if (parsed) {
    spec.pattern = *parsed;
  } else {
    throw_type_error(env, parsed.error().message());
  }
  if (env.IsExceptionPending()) return env.Undefined();
  return Job::start(env, std::make_shared<BenchJob>(open_, std::move(disk), std::move(spec)),
                    info[1]);
}

Napi::Value DiskHandle::serve_nbd(const Napi::CallbackInfo& info) {
  if (disk_or_throw(info.Env()) == nullptr) return info.Env().Undefined();
  return node::serve_nbd(info, open_);
}

Napi::Value DiskHandle::serve_vhost_user(const Napi::CallbackInfo& info) {
  if (disk_or_throw(info.Env()) == nullptr) return info.Env().Undefined();
  return node::serve_vhost_user(info, open_);
}

}  // namespace pqblk::node
