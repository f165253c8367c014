// The passes of check; private to check*.cc.
//
// Room format/qcow2.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "format/qcow2/check.h"
#include "format/qcow2/reference_counts.h"

namespace pqblk::format::qcow2 {

class Checker {
 public:
  Checker(io::Queue& q, Metadata& metadata, const CheckOptions& options);
  Task<Result<CheckReport>> run();

 private:
  enum class Use : std::uint8_t { active, snapshot };

  // check_references.cc: what refers to which cluster
  Task<Error> count_references();
  Task<Error> count_l1(HostOffset at, std::uint64_t entries, Use use);
  Task<Error> count_l2(HostOffset at, std::uint64_t l1_index, Use use);
  void count_entry(Slot slot, std::uint64_t raw, std::uint64_t bitmap, Use use);
  void count_override_slots();
  Task<Error> count_bitmaps();
  Task<Error> count_bitmap_table(HostOffset at, std::uint64_t entries);
  void count_refcount_structure();
  bool refer(HostOffset at, std::uint64_t length, const std::string& what);

  // check.cc: compare, repair
  Task<Error> compare();
  void compare_run(std::uint64_t cluster, std::uint64_t clusters, std::uint64_t stored,
                   bool block_usable);
  Task<Error> repair_counts();
  Task<void> punch_leaks();
  Task<Error> check_copied();
  Task<Error> check_copied_l2(std::uint64_t l1_index);
  Task<Error> finish_repair();

  void corruption(std::string message);
  void note(std::string message);
  Error progress();
  bool copied_wrong(std::uint64_t raw, std::uint64_t host) const;

  io::Queue& q_;
  Metadata& metadata_;
  MetaIo& meta_;
  const CheckOptions& options_;
  const Layout& layout_;
  const std::uint32_t version_;
  CheckReport report_;
  ReferenceCounts counts_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> structure_;  // clusters: first, count
  bool structure_damaged_ = false;
  std::uint64_t structure_corruptions_ = 0;  // findings in the refcount structure itself
  std::uint64_t mapping_corruptions_ = 0;    // findings that no refcount repair mends
  std::uint64_t steps_done_ = 0;
  std::uint64_t steps_ = 0;
  struct Wrong {
    std::uint64_t cluster;
    std::uint64_t clusters;
    std::uint64_t stored;
  };
  std::vector<Wrong> wrong_;  // counts that differ; at most kWrongMax, then a rebuild is cheaper
  bool too_many_wrong_ = false;
};

}  // namespace pqblk::format::qcow2
