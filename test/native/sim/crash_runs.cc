#include "sim/crash_runs.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

namespace pqblk::sim {
namespace {

constexpr std::uint64_t kSoakBatch = 20;  // seeds between two looks at the clock
constexpr std::uint32_t kCheckOneIn = 3;  // of the clean closes

struct Image {
  Device device;
  Model model;
};

// The chain of lives of one seed.
class Run {
 public:
  Run(const Subject& subject, std::uint64_t seed, const CrashOptions& options, RunCounts& counts)
      : subject_(subject), options_(options), counts_(counts), choices_(seed) {}

  std::string go(const Device& fresh) {
    Image image{fresh, Model(model_options(subject_))};
    for (std::uint32_t g = 0; g < options_.generations && failure_.empty(); ++g) {
      image = live(std::move(image), std::to_string(g + 1), options_.branches);
    }
    if (failure_.empty()) inspect(std::move(image), "last");
    return failure_.empty() ? "" : failure_ + "\n" + story_;
  }

 private:
  LifeOptions life_options() {
    LifeOptions o{.queues = 1 + choices_.choose(options_.queues, Why::workload),
                  .world = options_.world};
    if (choices_.one_in(options_.fault_runs_one_in, Why::fault)) {
      FaultRates& f = o.world.faults;
      switch (choices_.choose(4, Why::fault)) {
        case 0:
          f.write_eio = 30;
          break;
        case 1:
          f.sync_eio = 5;
          break;
        case 2:
          f.read_eio = 60;
          break;
        default:
          f.fail_operation = choices_.choose(100, Why::fault);
      }
    }
    o.world.faults.short_transfer = choices_.one_in(3, Why::fault) ? 10 : 0;
    o.world.faults.interrupted = o.world.faults.short_transfer;
    o.check_closed = choices_.one_in(kCheckOneIn, Why::workload);
    // Some lives on a device where everything is slow and late, some where nothing is.
    static constexpr std::uint32_t kSlow[] = {0, 4, 8, 20};
    o.world.slow_one_in = kSlow[choices_.choose(4, Why::schedule)];
    return o;
  }

  void tell(const std::string& line) { story_ += "  " + line + "\n"; }

  Crash pick_crash(Life& life) {
    if (!options_.kill || life.world().failed_syncs() > 0) return Crash::power_loss;
    if (!options_.power_loss) return Crash::kill;
    return choices_.choose(3, Why::crash) == 0 ? Crash::kill : Crash::power_loss;
  }

  Image crash(Life& life, const std::string& name, const char* phase) {
    const Crash kind = pick_crash(life);
    ++counts_.crashes;
    tell("life " + name + ": " + (kind == Crash::kill ? "kill -9" : "power loss") + " in " + phase +
         ", step " + std::to_string(life.world().steps()));
    if (World::tracing()) life.world().trace("CRASH " + story_.substr(story_.rfind("  life")));
    Image image{
        kind == Crash::kill ? life.device().killed(choices_) : life.device().power_loss(choices_),
        life.model()};
    image.model.crash(kind);
    return image;
  }

  // Steps until the activity is over, or for `steps` (then true: time to crash).
  bool run_for(Life& life, std::uint64_t steps) {
    while (life.busy()) {
      if (steps-- == 0) return true;
      life.step();
    }
    return false;
  }

  void end(Life& life, const std::string& name) {
    life.finish();
    ++counts_.lives;
    counts_.steps += life.world().steps();
    if (failure_.empty() && !life.failure().empty()) {
      failure_ = "life " + name + ": " + life.failure();
    }
  }

  void inspect(Image image, const std::string& name) {
    if (!failure_.empty()) return;
    Life life(subject_, std::move(image.device), std::move(image.model), choices_,
              {.queues = 1, .world = options_.world});
    if (World::tracing()) life.world().trace("==== life " + name);
    life.open();
    life.run();
    life.verify();
    life.run();
    end(life, name);
  }

  // Returns the image that the life leaves behind.
  Image live(Image start, const std::string& name, std::uint32_t branches) {
    Life life(subject_, std::move(start.device), std::move(start.model), choices_, life_options());
    if (World::tracing()) life.world().trace("==== life " + name);
    life.open();
    if (choices_.one_in(4, Why::crash) && run_for(life, choices_.choose(40, Why::crash))) {
      return leave(life, crash(life, name, "open"), name);
    }
    life.run();
    if (!life.is_open()) return leave(life, crash(life, name, "failed open"), name);
    // Mostly everything is read at once; at times the workload meets what recovery left.
    if (!choices_.one_in(4, Why::workload)) {
      life.verify();
      if (choices_.one_in(12, Why::crash) && run_for(life, choices_.choose(20, Why::crash))) {
        return leave(life, crash(life, name, "verify"), name);
      }
      life.run();
    }
    return work(life, name, branches);
  }

  Image work(Life& life, const std::string& name, std::uint32_t branches) {
    const std::uint32_t operations = 1 + choices_.choose(options_.operations, Why::workload);
    const std::uint32_t clients = 1 + choices_.choose(options_.clients, Why::workload);
    life.run_random(operations, clients);
    const std::uint64_t expected = 12 * std::uint64_t{operations};  // steps, about
    for (std::uint32_t b = 0; b < branches && failure_.empty(); ++b) {
      if (!run_for(life, choices_.choose(static_cast<std::uint32_t>(expected), Why::crash))) break;
      const std::string branch = name + "." + std::to_string(b + 1);
      const std::size_t told = story_.size();
      inspect(live(crash(life, branch, "work"), branch, 0), branch + " after");
      if (failure_.empty()) story_.resize(told);
    }
    if (!failure_.empty()) return leave(life, {life.device(), life.model()}, name);
    if (!choices_.one_in(6, Why::crash)) {
      run_for(life, choices_.choose(static_cast<std::uint32_t>(expected), Why::crash));
      return leave(life, crash(life, name, "work"), name);
    }
    life.run();
    life.close();
    if (choices_.one_in(2, Why::crash) && run_for(life, choices_.choose(30, Why::crash))) {
      return leave(life, crash(life, name, "close"), name);
    }
    life.run();
    if (!life.closed_well() || life.world().failed_syncs() > 0) {
      return leave(life, crash(life, name, "failed close"), name);
    }
    tell("life " + name + ": clean close");
    end(life, name);
    return {life.device(), life.model()};
  }

  Image leave(Life& life, Image image, const std::string& name) {
    end(life, name);
    return image;
  }

  const Subject& subject_;
  const CrashOptions& options_;
  RunCounts& counts_;
  RandomChoices choices_;
  std::string failure_;
  std::string story_;
};

}  // namespace

std::string crash_run(const Subject& subject, const Device& fresh, std::uint64_t seed,
                      const CrashOptions& options, RunCounts& counts) {
  if (subject.begin_run) subject.begin_run(seed);
  ++counts.runs;
  return Run(subject, seed, options, counts).go(fresh);
}

CrashReport crash_runs(const Subject& subject, std::uint64_t first, std::uint64_t count,
                       const CrashOptions& options) {
  const SeedPlan plan = seed_plan(first, count);
  keep_memory();
  CrashReport report;
  report.first = plan.first;
  const Device fresh = fresh_image(subject, report.failure);
  if (!report.ok()) return report;
  for (std::uint64_t seed = plan.first; seed < plan.first + plan.count; ++seed) {
    std::string failure = crash_run(subject, fresh, seed, options, report.counts);
    if (failure.empty()) continue;
    report.seed = seed;
    report.failure = subject.name + ", seed " + std::to_string(seed) +
                     " (run again with PQBLK_SIM_SEED=" + std::to_string(seed) +
                     " PQBLK_SIM_TRACE=1): " + failure;
    break;
  }
  return report;
}

CrashReport crash_soak(const Subject& subject, std::uint32_t seconds, const CrashOptions& options) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::seconds(seconds);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  auto seed = static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(now).count());
  CrashReport sum;
  sum.first = seed;
  while (Clock::now() < deadline && sum.ok()) {
    CrashReport one = crash_runs(subject, seed, kSoakBatch, options);
    seed += kSoakBatch;
    sum.failure = std::move(one.failure);
    sum.seed = one.seed;
    sum.counts.runs += one.counts.runs;
    sum.counts.lives += one.counts.lives;
    sum.counts.crashes += one.counts.crashes;
    sum.counts.steps += one.counts.steps;
  }
  return sum;
}

void note_seeds(const std::string& name, const CrashReport& report) {
  const RunCounts& counts = report.counts;
  const auto number = [](std::uint64_t n) { return static_cast<unsigned long long>(n); };
  std::printf("NOTE: %s: seeds %llu to %llu, %llu lives, %llu crashes\n", name.c_str(),
              number(report.first), number(report.first + counts.runs - 1), number(counts.lives),
              number(counts.crashes));
}

}  // namespace pqblk::sim
