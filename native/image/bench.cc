#include "image/bench.h"

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace pqblk::image {
namespace {

constexpr std::array<std::pair<std::string_view, Pattern>, 5> kPatterns{{
    {"read", Pattern::read},
    {"write", Pattern::write},
    {"randread", Pattern::randread},
    {"randwrite", Pattern::randwrite},
    {"randrw", Pattern::randrw},
}};

constexpr std::uint64_t kNsPerMs = 1'000'000;
constexpr auto kProgressEvery = std::chrono::milliseconds(100);

class Random {  // splitmix64
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }

 private:
  std::uint64_t state_;
};

struct FreeMemory {
  void operator()(std::uint8_t* p) const { std::free(p); }
};

std::uint64_t stride_of(const BenchSpec& spec) {
  return spec.stride != 0 ? spec.stride : spec.block_size;
}

// What the queues' jobs share: the end of the run.
struct Run {
  std::atomic<bool> stop{false};
  std::mutex inner;
  std::condition_variable changed;
  std::uint32_t active = 0;
  Error error;

  void finished(Error e) {
    std::lock_guard guard(inner);
    if (e) stop.store(true, std::memory_order_relaxed);
    if (e && !error) error = std::move(e);
    --active;
    changed.notify_all();
  }
};

// One queue's share. Everything below start() runs on the queue's thread.
class Job {
 public:
  Job(Disk& disk, std::uint32_t queue, const BenchSpec& spec, std::uint64_t begin,
      std::uint64_t length, Run& run)
      : disk_(disk),
        queue_(queue),
        spec_(spec),
        run_(run),
        random_(spec.seed * 0x100000001B3U + queue),
        begin_(begin),
        stride_(stride_of(spec)),
        blocks_(length / stride_) {}

  void start() {
    disk_.on_queue(queue_, [this] { begin(); });
  }

  std::uint64_t measured_ns() const { return last_ns_ > measure_ns_ ? last_ns_ - measure_ns_ : 0; }
  std::uint64_t bytes_done() const { return progress_.load(std::memory_order_relaxed); }
  BenchDirection read, write, flush;

 private:
  struct Slot {
    Request request;
    iovec buffer{};
    Job* job = nullptr;
    std::uint64_t started_ns = 0;
  };

  void begin();
  bool wants_more(std::uint64_t now) const;
  void launch(Slot& slot, std::uint64_t now);
  void launch_flush(Slot& slot, std::uint64_t now);
  void completed(Slot& slot);
  void account(const Slot& slot, std::uint64_t now);

  Disk& disk_;
  const std::uint32_t queue_;
  const BenchSpec& spec_;
  Run& run_;
  Random random_;
  const std::uint64_t begin_, stride_, blocks_;
  std::uint64_t next_block_ = 0;
  std::uint64_t launched_ = 0;
  std::uint32_t unflushed_ = 0;  // completed writes since the last flush began
  std::uint64_t measure_ns_ = 0, end_ns_ = 0, last_ns_ = 0;
  std::uint32_t in_flight_ = 0;
  bool failed_ = false;
  Error error_;
  std::unique_ptr<std::uint8_t[], FreeMemory> memory_;
  std::vector<Slot> slots_;
  std::atomic<std::uint64_t> progress_{0};
};

void Job::begin() {
  const std::uint64_t bytes = align_up(spec_.block_size, std::uint64_t{4096});
  memory_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(4096, bytes * spec_.iodepth)));
  if (memory_ == nullptr) return run_.finished(Error(Kind::no_memory, "no memory for the buffers"));
  for (std::uint64_t i = 0; i + 8 <= bytes * spec_.iodepth; i += 8) {
    const std::uint64_t word = random_.next();
    __builtin_memcpy(memory_.get() + i, &word, 8);
  }
  slots_ = std::vector<Slot>(spec_.iodepth);
  const std::uint64_t now = disk_.ring(queue_).now_ns();
  measure_ns_ = now + spec_.ramp_ms * kNsPerMs;
  end_ns_ = measure_ns_ + spec_.runtime_ms * kNsPerMs;
  in_flight_ = 1;  // this call
  for (std::uint32_t i = 0; i < spec_.iodepth && wants_more(now); ++i) {
    slots_[i].job = this;
    slots_[i].buffer = {memory_.get() + i * bytes, spec_.block_size};
    ++in_flight_;
    launch(slots_[i], now);
  }
  if (--in_flight_ == 0) run_.finished(std::move(error_));
}

bool Job::wants_more(std::uint64_t now) const {
  if (failed_ || run_.stop.load(std::memory_order_relaxed)) return false;
  return spec_.runtime_ms != 0 ? now < end_ns_ : launched_ < blocks_;
}

void Job::launch_flush(Slot& slot, std::uint64_t now) {
  unflushed_ = 0;
  slot.request.type = RequestType::flush;
  slot.request.offset = 0;
  slot.request.length = 0;
  slot.request.iov_count = 0;
  slot.started_ns = now;
  disk_.start(queue_, slot.request);
}

void Job::launch(Slot& slot, std::uint64_t now) {
  if (spec_.flush_every != 0 && unflushed_ >= spec_.flush_every) return launch_flush(slot, now);
  const Pattern p = spec_.pattern;
  const bool sequential = p == Pattern::read || p == Pattern::write;
  const std::uint64_t block = sequential ? next_block_ : random_.below(blocks_);
  if (++next_block_ == blocks_) next_block_ = 0;
  ++launched_;
  const bool reads = p == Pattern::read || p == Pattern::randread ||
                     (p == Pattern::randrw && random_.below(100) < spec_.read_percent);
  Request& r = slot.request;
  r.type = reads ? RequestType::in : RequestType::out;
  r.offset = begin_ + block * stride_;
  r.length = spec_.block_size;
  r.iov = &slot.buffer;
  r.iov_count = 1;
  r.context = &slot;
  r.complete = [](Request& done) {
    auto& s = *static_cast<Slot*>(done.context);
    s.job->completed(s);
  };
  slot.started_ns = now;
  disk_.start(queue_, r);
}

void Job::account(const Slot& slot, std::uint64_t now) {
  last_ns_ = now;
  const RequestType type = slot.request.type;
  const std::uint64_t bytes = slot.request.length;
  if (type == RequestType::out) ++unflushed_;
  const std::uint64_t passed = bytes != 0 ? stride_ : 0;
  progress_.store(progress_.load(std::memory_order_relaxed) + passed, std::memory_order_relaxed);
  if (now < measure_ns_) return;
  BenchDirection& direction = type == RequestType::flush ? flush
                              : type == RequestType::in  ? read
                                                         : write;
  ++direction.ops;
  direction.bytes += bytes;
  direction.latency.record(now - slot.started_ns);
}

void Job::completed(Slot& slot) {
  const std::uint64_t now = disk_.ring(queue_).now_ns();
  if (slot.request.status == Status::ok) {
    account(slot, now);
  } else if (!failed_) {
    failed_ = true;
    error_ = slot.request.error;
  }
  if (wants_more(now)) return launch(slot, now);
  if (--in_flight_ == 0) run_.finished(std::move(error_));
}

Error check(const Disk& disk, const BenchSpec& spec, std::uint64_t range) {
  if (spec.block_size == 0 || spec.block_size > kBenchBlockMax) {
    return Error(Kind::invalid_argument, "the block size is 1 byte to 64 MiB");
  }
  if (spec.iodepth == 0 || spec.iodepth > kBenchDepthMax) {
    return Error(Kind::invalid_argument, "the depth is 1 to " + std::to_string(kBenchDepthMax));
  }
  if (align_up(spec.block_size, std::uint64_t{4096}) * spec.iodepth > kBenchMemoryMax) {
    return Error(Kind::invalid_argument, "depth times block size is at most 1 GiB");
  }
  if (stride_of(spec) < spec.block_size) {
    return Error(Kind::invalid_argument, "the stride is at least the block size");
  }
  const DiskFacts facts = disk.facts();
  if (range > facts.size || range / facts.queues < stride_of(spec)) {
    return Error(Kind::invalid_argument, "the range to use is " + std::to_string(range) +
                                             " bytes; the disk has " + std::to_string(facts.size) +
                                             ", and each queue needs a block of its own");
  }
  const bool writes = spec.pattern != Pattern::read && spec.pattern != Pattern::randread;
  if (writes && facts.read_only) {
    return Error(Kind::read_only, "the disk was opened read-only").in(facts.path);
  }
  return {};
}

void finish(BenchDirection& direction, std::uint64_t elapsed_ns) {
  const double seconds = static_cast<double>(elapsed_ns) / 1e9;
  if (seconds <= 0) return;
  direction.iops = static_cast<double>(direction.ops) / seconds;
  direction.bytes_per_second = static_cast<double>(direction.bytes) / seconds;
}

}  // namespace

Result<Pattern> parse_pattern(std::string_view name) {
  for (const auto& [text, pattern] : kPatterns) {
    if (text == name) return pattern;
  }
  return Error(
      Kind::invalid_argument,
      std::string("expected read, write, randread, randwrite or randrw, found ").append(name));
}

Result<BenchResult> run_bench(Disk& disk, const BenchSpec& spec) {
  const std::uint64_t range = spec.size != 0 ? spec.size : disk.size();
  if (Error e = check(disk, spec, range)) return e;
  const std::uint32_t queues = disk.facts().queues;
  const std::uint64_t part = align_down(range / queues, stride_of(spec));
  const bool by_part =
      spec.runtime_ms == 0 || spec.pattern == Pattern::read || spec.pattern == Pattern::write;
  Run run;
  run.active = queues;
  std::vector<std::unique_ptr<Job>> jobs;
  for (std::uint32_t i = 0; i < queues; ++i) {
    const bool own = by_part && queues > 1;
    jobs.push_back(
        std::make_unique<Job>(disk, i, spec, own ? i * part : 0, own ? part : range, run));
  }
  for (auto& job : jobs) job->start();

  const auto began = std::chrono::steady_clock::now();
  std::unique_lock guard(run.inner);
  while (!run.changed.wait_for(guard, kProgressEvery, [&] { return run.active == 0; })) {
    if (!spec.progress) continue;
    std::uint64_t done = 0;
    for (auto& job : jobs) done += job->bytes_done();
    const auto ms =
        static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::milliseconds>(
                                       std::chrono::steady_clock::now() - began)
                                       .count());
    guard.unlock();
    const bool go_on = spec.runtime_ms != 0 ? spec.progress(ms, spec.ramp_ms + spec.runtime_ms)
                                            : spec.progress(done, range);
    if (!go_on) run.stop.store(true, std::memory_order_relaxed);
    guard.lock();
  }
  if (run.error) return std::move(run.error);

  BenchResult result;
  result.queues = queues;
  for (auto& job : jobs) {
    result.elapsed_ns = std::max(result.elapsed_ns, job->measured_ns());
    for (auto [sum, own] : {std::pair{&result.read, &job->read},
                            {&result.write, &job->write},
                            {&result.flush, &job->flush}}) {
      sum->ops += own->ops;
      sum->bytes += own->bytes;
      sum->latency.merge(own->latency);
    }
  }
  finish(result.read, result.elapsed_ns);
  finish(result.write, result.elapsed_ns);
  finish(result.flush, result.elapsed_ns);
  return result;
}

}  // namespace pqblk::image
