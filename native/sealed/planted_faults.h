// Faults that the simulator must catch (docs/write-protocol.md), each one switched on at run time.
//
// Room sealed/. Only test builds compile the switches (PQBLK_PLANTED_FAULTS); in a product build
// planted() is a constant false and the faulty branches vanish.
#pragma once

#include <cstdint>

namespace pqblk::sealed {

enum class Fault : std::uint8_t {
  none,
  data_before_record,           // O1 data in place before its record is durable
  checkpoint_before_flush,      // home writes of records that are not covered
  early_cluster_reuse,          // a freed cluster handed out before its freeing record is covered
  rewrite_block_same_sequence,  // a log block rewritten with other content under its old number
  join_issued_flush,            // a flush that joins an fdatasync already issued
  no_home_write_cancel,         // O1 in place while the same sector's write home is pending
  equal_session_salts,          // a session's salt is a constant
  recovery_without_fdatasync,   // recovery reads pages that were never made durable
  redo_without_fold,            // inline ciphertext redone in log order, not folded
  covered_from_log_durable,     // `covered` ignores data in flight
  n_over_unflushed_zero,        // class N over a zeroed sector whose Z is not durable
  ack_across_hole,              // acknowledgement waits for its own log block only
  trim_live_record,             // tail advanced before home data and entries are flushed
  reuse_before_tail_durable,    // log space reused before the header that frees it is durable
  reuse_when_log_durable,       // a cluster reused once the freeing record is log-durable only
  second_relocation_uncovered,  // relocation while the last MAP is uncovered
  skip_remap_check,             // recovery does not check a remapped cluster's other sectors
  zero_base_as_damage,          // recovery reports a zero base as damage
  refcount_lowered_early,       // a refcount lowered before the home mapping is flushed
  forget_session_of_log,        // a session forgotten that the log's header names
  forget_before_checkpoint,     // an epoch forgotten while home still names it
  reclaim_before_recovery,      // clusters taken back that only the log names
  count_
};

#ifdef PQBLK_PLANTED_FAULTS
inline Fault planted_fault = Fault::none;  // set by the test harness, single-threaded
inline bool planted(Fault fault) { return planted_fault == fault; }
#else
constexpr bool planted(Fault) { return false; }
#endif

}  // namespace pqblk::sealed
