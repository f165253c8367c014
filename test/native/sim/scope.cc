#include "sim/scope.h"

#include <algorithm>
#include <optional>
#include <unordered_set>
#include <utility>

namespace pqblk::sim {
namespace {

// Which image of which point of a path: for replays.
struct Place {
  std::uint64_t point = 0;
  Crash kind = Crash::power_loss;
  std::uint64_t image = 0;
  bool operator==(const Place&) const = default;
  std::string text() const {
    return "crash point " + std::to_string(point) +
           (kind == Crash::kill ? ", kill -9" : ", power loss") + ", image " +
           std::to_string(image);
  }
};

class Explorer {
 public:
  Explorer(const Subject& subject, const ScopeOptions& options)
      : subject_(subject), options_(options) {}

  ScopeReport run(const std::vector<std::vector<OpSpec>>& programs) {
    const bool wants_trace = World::tracing();
    World::set_tracing(false);
    keep_memory();
    if (subject_.begin_run) subject_.begin_run(0);
    fresh_ = fresh_image(subject_, report_.failure);
    for (const auto& program : programs) {
      if (!report_.ok() || spent()) break;
      ++report_.programs;
      explore_program(program);
      if (!report_.ok() && wants_trace) replay(program);
    }
    if (report_.ok() && report_.programs < programs.size()) report_.complete = false;
    World::set_tracing(wants_trace);
    return std::move(report_);
  }

 private:
  bool spent() const { return report_.recoveries >= options_.recoveries_max; }

  void explore_program(const std::vector<OpSpec>& program) {
    schedule_ = ExhaustiveChoices();
    schedule_.limit(Why::schedule, options_.schedule_deviations)
        .limit(Why::mix, options_.mix_deviations)
        .limit(Why::fault, 0);
    std::uint64_t schedules = 0;
    do {
      ++report_.schedules;
      explore_schedule(program);
      if (!report_.ok()) {
        report_.failure = subject_.name + ", program " + program_text(program) + ", schedule [" +
                          schedule_.script() + "]: " + report_.failure;
        return;
      }
      if (schedule_.diverged()) {
        report_.failure = "the code under test is not deterministic: " + program_text(program);
        return;
      }
      if (++schedules == options_.schedules_max || spent()) {
        report_.complete = false;
        return;
      }
    } while (schedule_.next());
  }

  LifeOptions life_options() const { return {.queues = options_.queues, .world = options_.world}; }

  void explore_schedule(const std::vector<OpSpec>& program) {
    Life life(subject_, fresh_, Model(model_options(subject_)), schedule_, life_options());
    points_ = 0;
    // The first open is the same in all programs: crash it in the first only.
    const bool first = report_.programs == 1;
    life.open();
    walk(life, first);
    life.run_program(program, options_.clients);
    walk(life, true);
    life.finish();
    if (report_.ok()) report_.failure = life.failure();
  }

  // Runs to the end of the activity, crashing at every change that no earlier path has shown.
  void walk(Life& life, bool crash) {
    std::uint64_t seen = life.changes() - 1;
    while (life.busy()) {
      if (crash && life.changes() != seen) {
        seen = life.changes();
        ++points_;
        if (schedule_.fresh() || only_) crash_here(life);
        if (!report_.ok()) crash = false;  // let it end in peace
      }
      life.step();
    }
    if (crash && life.failure().empty()) {
      ++points_;
      if (schedule_.fresh() || only_) crash_here(life);
    }
  }

  void crash_here(Life& life) {
    if (only_ && only_->point != points_) return;
    ++report_.points;
    if (options_.power_loss) crash_as(life, Crash::power_loss);
    if (options_.kill && report_.ok()) crash_as(life, Crash::kill);
  }

  void crash_as(Life& life, Crash kind) {
    Model model = life.model();
    model.crash(kind);
    for_each_image(life.device(), kind, options_.images_max,
                   [&](Device image, std::uint64_t number) {
                     const Place place{points_, kind, number};
                     if (only_ && !(*only_ == place)) return true;
                     if (only_) World::set_tracing(true);
                     recover(std::move(image), model, options_.recovery_crashes);
                     if (report_.ok()) return true;
                     failed_at_ = place;
                     report_.failure = place.text() + ": " + report_.failure;
                     return false;
                   });
  }

  // visit(image, number) returns false to stop.
  void for_each_image(const Device& device, Crash kind, std::uint64_t most,
                      const std::function<bool(Device, std::uint64_t)>& visit) {
    const auto make = [&](Choices& choices) {
      return kind == Crash::kill ? device.killed(choices) : device.power_loss(choices);
    };
    ExhaustiveChoices all;
    std::uint64_t number = 0;
    do {
      ++report_.images;
      if (!visit(make(all), number++)) return;
      if (spent()) return;
      if (number < most) continue;
      report_.complete = false;
      RandomChoices sample(points_);
      for (std::uint64_t i = 0; i < most; ++i) {
        ++report_.images;
        if (!visit(make(sample), number++)) return;
      }
      return;
    } while (all.next());
  }

  // Opens, verifies and, `depth` deep, crashes the recovery itself.
  void recover(Device image, const Model& model, std::uint32_t depth) {
    const std::uint64_t key = mix64(mix64(image.hash() + depth) + model.hash());
    if (!only_ && !seen_.insert(key).second) {
      ++report_.repeated;
      return;
    }
    ++report_.recoveries;
    QuietChoices quiet;
    Life life(subject_, std::move(image), model, quiet, life_options());
    life.open();
    run_recovery(life, depth);
    life.verify();
    run_recovery(life, depth);
    if (depth == options_.recovery_crashes && !options_.epilogue.empty() && report_.ok()) {
      life.run_program(options_.epilogue, 1);
      life.run();
      if (life.failure().empty()) recover(lose_everything(life), crashed_model(life), 0);
    }
    life.finish();
    if (report_.ok()) report_.failure = life.failure();
  }

  void run_recovery(Life& life, std::uint32_t depth) {
    std::uint64_t seen = life.changes();
    while (life.busy()) {
      life.step();
      if (depth == 0 || life.changes() == seen || !report_.ok() || spent()) continue;
      seen = life.changes();
      for_each_image(life.device(), Crash::power_loss, options_.recovery_images_max,
                     [&](Device image, std::uint64_t) {
                       recover(std::move(image), crashed_model(life), depth - 1);
                       if (report_.ok()) return true;
                       report_.failure = "power loss inside recovery, step " +
                                         std::to_string(life.world().steps()) + ": " +
                                         report_.failure;
                       return false;
                     });
    }
  }

  static Model crashed_model(Life& life) {
    Model model = life.model();
    model.crash(Crash::power_loss);
    return model;
  }

  static Device lose_everything(Life& life) {
    return Device(life.device().facts(), life.device().durable());
  }

  void replay(const std::vector<OpSpec>& program) {
    if (!failed_at_) {
      World::set_tracing(true);
    } else {
      only_ = failed_at_;
    }
    ScopeReport kept = report_;
    report_.failure.clear();
    schedule_.again();
    explore_schedule(program);
    report_ = std::move(kept);
    only_.reset();
  }

  const Subject& subject_;
  const ScopeOptions& options_;
  ScopeReport report_;
  Device fresh_;
  ExhaustiveChoices schedule_;
  std::uint64_t points_ = 0;  // of this path
  std::unordered_set<std::uint64_t> seen_;
  std::optional<Place> failed_at_;
  std::optional<Place> only_;
};

}  // namespace

std::string ScopeReport::text() const {
  return std::to_string(programs) + " programs, " + std::to_string(schedules) + " schedules, " +
         std::to_string(points) + " crash points, " + std::to_string(images) + " images (" +
         std::to_string(repeated) + " met before), " + std::to_string(recoveries) + " recoveries" +
         (complete ? "" : ", bounded");
}

ScopeReport explore(const Subject& subject, const std::vector<std::vector<OpSpec>>& programs,
                    const ScopeOptions& options) {
  return Explorer(subject, options).run(programs);
}

std::uint64_t ProgramSpace::size() const {
  std::uint64_t n = 1;
  for (std::uint32_t i = 0; i < length; ++i) n *= alphabet.size();
  return n;
}

std::vector<OpSpec> ProgramSpace::program(std::uint64_t index) const {
  std::vector<OpSpec> ops;
  for (std::uint32_t i = 0; i < length; ++i) {
    ops.push_back(alphabet[index % alphabet.size()]);
    index /= alphabet.size();
  }
  return ops;
}

std::vector<std::vector<OpSpec>> ProgramSpace::some(std::uint64_t most, std::uint64_t seed) const {
  std::vector<std::vector<OpSpec>> programs;
  const std::uint64_t all = size();
  if (all <= most) {
    for (std::uint64_t i = 0; i < all; ++i) programs.push_back(program(i));
    return programs;
  }
  RandomChoices random(seed);
  for (std::uint64_t i = 0; i < most; ++i) {
    const std::uint64_t stride = all / most;
    programs.push_back(program(i * stride + random.bits(Why::workload) % stride));
  }
  return programs;
}

std::string program_text(const std::vector<OpSpec>& program) {
  std::string text;
  for (const OpSpec& op : program) text += (text.empty() ? "" : " ") + op.text();
  return text;
}

}  // namespace pqblk::sim
