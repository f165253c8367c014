// Plain QCOW2 in the simulator, looked at after every crash: the structure never contradicts itself
// (leaked clusters are all a crash may leave), and what was flushed is there. test/sim has more
// shapes, looked at after clean closes.

#include <doctest/doctest.h>

#include "effort.h"
#include "format/qcow2/check.h"
#include "format/qcow2/create.h"
#include "image/qcow2_backend.h"
#include "sim/crash_runs.h"

namespace pqblk::image::test {
namespace {

namespace qcow2 = format::qcow2;

using Opened = Result<std::unique_ptr<Backend>>;

// Leaks are fine, contradictions are not.
Task<Error> check_structure(io::Queue& q, const io::File& file, bool leaks_too) {
  qcow2::OpenOptions options;
  options.read_only = true;
  options.for_check = true;
  auto metadata = co_await qcow2::Metadata::open(q, file, options);
  if (!metadata) co_return metadata.take_error();
  const qcow2::CheckOptions how;
  Result<qcow2::CheckReport> report = co_await qcow2::check(q, **metadata, how);
  if (!report) co_return report.take_error();
  if (report->corruptions == 0 && (!leaks_too || report->leaks == 0)) co_return Error();
  std::string text;
  for (const std::string& message : report->messages) {
    if (!message.ends_with("references 0")) text += message + "; ";  // not the leaks
  }
  co_return Error(Kind::corrupt, text);
}

sim::Subject subject_of(const char* name, qcow2::CreateOptions options) {
  sim::Subject subject;
  subject.name = name;
  subject.sectors = options.size / kSectorSize;
  subject.sectors_per_cluster =
      std::max<std::uint64_t>((std::uint64_t{1} << options.cluster_bits) / kSectorSize, 1);
  subject.unit = sim::kPatternBlock;
  subject.open_is_durable = false;
  subject.kill_keeps = false;  // mappings stay in memory until a flush, as QEMU keeps them
  subject.discard_zeroes = false;
  subject.create = [options](io::Queue& q, const io::File& file) -> Task<Error> {
    Error error = co_await qcow2::create(q, file, options);
    co_return error;
  };
  subject.open = [](QueueContext& service, const io::File& file) -> Task<Opened> {
    Error error = co_await check_structure(service.io, file, false);
    if (error) co_return error;
    Qcow2Options how;
    Opened opened = co_await open_qcow2(service, file, std::move(how));
    co_return opened;
  };
  return subject;
}

void run(const char* name, const qcow2::CreateOptions& options, std::uint64_t runs) {
  sim::CrashOptions how;
  how.fault_runs_one_in = 4;
  how.clients = 8;
  how.operations = 60;
  const sim::CrashReport report =
      sim::crash_runs(subject_of(name, options), 1, pqblk::test::effort(runs), how);
  CHECK_MESSAGE(report.ok(), report.failure);
  sim::note_seeds(name, report);
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("qcow2 crash: 64 KiB clusters, writes of parts") {
  qcow2::CreateOptions options;
  options.size = 64 * kSectorSize;
  run("qcow2, 64K", options, 100);
}

TEST_CASE("qcow2 crash: 512-byte clusters, tables and refcounts grow all the time") {
  qcow2::CreateOptions options;
  options.size = 160 * kSectorSize;  // a block covers 64 clusters: many are made in one life
  options.cluster_bits = 9;
  options.refcount_bits = 64;
  run("qcow2, 512", options, 150);
}

TEST_CASE("qcow2 crash: subclusters") {
  qcow2::CreateOptions options;
  options.size = 64 * kSectorSize;
  options.cluster_bits = 17;
  options.extended_l2 = true;
  run("qcow2, extended", options, 100);
}

TEST_SUITE_END();

}  // namespace pqblk::image::test
