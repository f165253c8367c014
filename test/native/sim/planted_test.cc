// Every fault planted in the sealed engine is caught by a bounded hunt.
#include "sim/planted.h"

#include <doctest/doctest.h>

#include <cstdlib>

#include "sealed/planted_faults.h"
#include "sim/images.h"

using namespace pqblk::sim;
using pqblk::sealed::Fault;

namespace {

struct Planted {
  Fault fault;
  const char* name;
};

#define PQBLK_PLANTED(name) \
  Planted { Fault::name, #name }
constexpr Planted kPlanted[] = {
    PQBLK_PLANTED(data_before_record),     PQBLK_PLANTED(checkpoint_before_flush),
    PQBLK_PLANTED(early_cluster_reuse),    PQBLK_PLANTED(rewrite_block_same_sequence),
    PQBLK_PLANTED(join_issued_flush),      PQBLK_PLANTED(no_home_write_cancel),
    PQBLK_PLANTED(equal_session_salts),    PQBLK_PLANTED(recovery_without_fdatasync),
    PQBLK_PLANTED(redo_without_fold),      PQBLK_PLANTED(covered_from_log_durable),
    PQBLK_PLANTED(n_over_unflushed_zero),  PQBLK_PLANTED(ack_across_hole),
    PQBLK_PLANTED(trim_live_record),       PQBLK_PLANTED(reuse_before_tail_durable),
    PQBLK_PLANTED(reuse_when_log_durable), PQBLK_PLANTED(second_relocation_uncovered),
    PQBLK_PLANTED(skip_remap_check),       PQBLK_PLANTED(zero_base_as_damage),
    PQBLK_PLANTED(refcount_lowered_early),
};
#undef PQBLK_PLANTED
static_assert(std::size(kPlanted) == static_cast<std::size_t>(Fault::count_) - 1);

}  // namespace

TEST_CASE("every planted fault is caught") {
  const Subject overwrite = sealed_subject({.file = kVolatileDevice});
  const Subject in_place = sealed_subject({.file = kSafeDevice});
  for (const auto& [fault, name] : kPlanted) {
    PlantedFault planted{.name = name, .set = [fault = fault](bool on) {
                           pqblk::sealed::planted_fault = on ? fault : Fault::none;
                         }};
    const auto catches = hunt(overwrite, {planted}, 300, {});
    const auto more = catches[0].caught ? catches : hunt(in_place, {planted}, 300, {});
    CHECK_MESSAGE(more[0].caught, "survived: " << planted.name);
    MESSAGE(planted.name << " after " << more[0].runs << ": " << more[0].failure.substr(0, 300));
  }
}
