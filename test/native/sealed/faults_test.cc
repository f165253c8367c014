// Every rule of the write protocol is left out once, and the simulator must notice. A fault that
// survives proves that the tests see nothing there.
#include <doctest/doctest.h>

#include <algorithm>

#include "sealed/planted_faults.h"
#include "sealed/sealed_subject.h"
#include "sim/planted.h"

using namespace pqblk;        // NOLINT
using namespace pqblk::test;  // NOLINT
using sealed::Fault;

namespace {

constexpr std::uint64_t kSeedsMax = 3000;

// Where a fault shows soonest.
struct Trap {
  Fault fault;
  const char* name;
  SealedShape shape;
  sim::CrashOptions options = {};
  std::vector<sim::OpSpec> program = {};  // instead of random ones: explored exhaustively
  sim::ScopeOptions scope = {.clients = 1};
};

const SealedShape kVolatile{};
const SealedShape kSafe{.non_volatile = true};
const SealedShape kRotating{.sectors = 12, .rotates = true};
// Few sectors, so that a rotation ends soon, and no checkpoint but its own.
const SealedShape kRotatingFast{.sectors = 4, .overlay_sectors_max = 1 << 20, .rotates = true};
// One sector, so that a life often ends cleanly with nothing on the disk, and the next one rotates
// before it writes.
const SealedShape kRotatingEmpty{.sectors = 1, .rotates = true};
// Large writes that stay in the log fill it before it can go home.
const SealedShape kFullLog{
    .sectors = 64, .cluster_bits = 16, .overlay_sectors_max = 1 << 20, .relocate_bytes_min = kGiB};
// The records of one request are so many that they may end up in two log blocks.
const SealedShape kLargeClusters{
    .sectors = 192, .cluster_bits = 18, .overlay_sectors_max = 512, .session_sectors_max = 4096};
using enum sim::OpType;

const Trap kTraps[] = {
    {Fault::data_before_record, "data before its record", kSafe},
    {Fault::checkpoint_before_flush, "checkpoint before flush", kVolatile},
    {Fault::early_cluster_reuse, "early cluster reuse", kVolatile},
    {Fault::rewrite_block_same_sequence,
     "a log block rewritten under its old number",
     kVolatile,
     {.fault_runs_one_in = 1}},
    {Fault::join_issued_flush, "a flush that joins an fdatasync already issued", kVolatile},
    {Fault::no_home_write_cancel, "no wait for a pending write home", kSafe},
    {Fault::equal_session_salts, "equal session salts", kVolatile},
    {Fault::recovery_without_fdatasync, "recovery without its first fdatasync", kVolatile},
    {Fault::redo_without_fold, "redo without folding", kVolatile},
    {Fault::covered_from_log_durable, "covered taken from log_durable", kVolatile},
    {Fault::n_over_unflushed_zero, "class N over a zero that is not durable", kVolatile},
    {Fault::ack_across_hole, "acknowledgement across a hole", kVolatile},
    {Fault::trim_live_record, "trim of a live record", kVolatile},
    {Fault::reuse_before_tail_durable,
     "log space reused before the tail is durable",
     kFullLog,
     {.operations = 120, .clients = 8}},
    {Fault::reuse_when_log_durable, "a cluster reused when its record is log-durable", kVolatile},
    {Fault::second_relocation_uncovered,
     "relocation while the last is uncovered",
     kVolatile,
     {},
     {{write_cluster, 0}, {flush}, {write_cluster, 0}, {write_cluster, 0}}},
    {Fault::skip_remap_check, "no check of a remapped cluster", kLargeClusters},
    {Fault::zero_base_as_damage, "a zero base taken for damage", kVolatile},
    {Fault::refcount_lowered_early, "a refcount lowered early", kVolatile},
    {Fault::forget_session_of_log,
     "the session of the log forgotten",
     kRotatingEmpty,
     {.operations = 20, .clients = 2}},
    {Fault::forget_before_checkpoint,
     "an epoch forgotten before the checkpoint",
     kRotatingFast,
     {},
     // Of two clients one writes under the new epoch, and its record stays on the way; the other
     // finds nothing of the old epoch left, and forgets it.
     {{write, 0},
      {checkpoint_full},
      {checkpoint_full},
      {checkpoint_full},
      {write, 0},
      {checkpoint_full},
      {checkpoint_full}},
     {.clients = 2,
      .images_max = 4,
      .recovery_crashes = 0,
      .kill = false,
      .world = {.ready_first = true, .newest_first = true}}},
    {Fault::reclaim_before_recovery, "clusters taken back that the log names", kVolatile},
};

}  // namespace

TEST_SUITE_BEGIN("hunt");

TEST_CASE("the simulator catches every planted fault") {
  for (std::uint8_t f = 1; f < static_cast<std::uint8_t>(Fault::count_); ++f) {
    const auto fault = static_cast<Fault>(f);
    CHECK_MESSAGE(std::any_of(std::begin(kTraps), std::end(kTraps),
                              [&](const Trap& t) { return t.fault == fault; }),
                  "no trap for fault " << int{f});
  }
  for (const Trap& trap : kTraps) {
    std::vector<std::vector<sim::OpSpec>> programs;
    if (!trap.program.empty()) programs.push_back(trap.program);
    const sim::PlantedFault planted{
        .name = trap.name,
        .set = [&](bool on) { sealed::planted_fault = on ? trap.fault : Fault::none; },
        .subject = sealed_subject(trap.shape),
        .options = trap.options,
        .programs = programs,
        .scope = trap.scope};
    const auto caught = sim::hunt(*planted.subject, {planted}, kSeedsMax, trap.options);
    CHECK_MESSAGE(caught[0].caught, "survived: " << std::string(trap.name));
    MESSAGE(std::string(trap.name)
            << ": after " << caught[0].runs << " runs: " << caught[0].failure.substr(0, 300));
  }
}

TEST_SUITE_END();
