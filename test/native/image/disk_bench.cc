// Measures a disk through the engine alone: no Node, no keys on disk. Not run by the tests.
//
//   bench_disk PATH raw|qcow2|sealed PATTERN [bs=4096] [depth=32] [queues=1] [size=1073741824]
//              [ms=3000] [direct=0|1] [create=1] [fill=1] [engine=uring|aio|threads] [log=0]
//              [nonvolatile=1] [entries=BYTES of entry cache]
//
// `create` makes the image first (sealed: with keys of zeros), `fill` writes all of it once.
#include <cstdio>
#include <string>

#include "bench_disk.h"

using namespace pqblk;  // NOLINT

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const std::string path = argv[1], format = argv[2];
  test::BenchOptions o = test::bench_options(argc, argv, 4,
                                             {{"bs", "4096"},
                                              {"depth", "32"},
                                              {"queues", "1"},
                                              {"size", "1073741824"},
                                              {"ms", "3000"},
                                              {"direct", "0"}});
  const auto disk =
      test::bench_disk(path, test::bench_format(format), o, [&](image::OpenOptions& options) {
        if (o.count("nonvolatile") != 0) options.assume_non_volatile = true;
        if (o.count("entries") != 0) options.limits.entry_cache = std::stoull(o["entries"]);
      });
  auto pattern = image::parse_pattern(argv[3]);
  if (!pattern) test::bench_die(pattern.error().to_string());
  image::BenchSpec spec;
  spec.pattern = *pattern;
  spec.block_size = std::stoull(o["bs"]);
  spec.iodepth = static_cast<std::uint32_t>(std::stoul(o["depth"]));
  spec.size = std::stoull(o["size"]);
  spec.runtime_ms = std::stoull(o["ms"]);
  auto result = image::run_bench(*disk, spec);
  if (!result) test::bench_die(result.error().to_string());
  const image::BackendStats stats = disk->backend_stats();
  std::printf("%s %s %s: read %.0f IOPS %.0f MB/s, write %.0f IOPS %.0f MB/s; checkpoints %llu\n",
              disk->facts().engine.c_str(), format.c_str(), argv[3], result->read.iops,
              result->read.bytes_per_second / 1e6, result->write.iops,
              result->write.bytes_per_second / 1e6,
              static_cast<unsigned long long>(stats.checkpoints));
  if (Error e = disk->close()) test::bench_die(e.to_string());
  return 0;
}
