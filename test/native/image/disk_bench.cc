// Measures a disk through the engine alone: no Node, no keys on disk. Not run by the tests.
//
//   bench_disk PATH raw|qcow2|sealed PATTERN [bs=4096] [depth=32] [queues=1] [size=1073741824]
//              [ms=3000] [direct=0|1] [create=1] [fill=1] [engine=uring|aio|threads] [log=0]
//
// `create` makes the image first (sealed: with keys of zeros), `fill` writes all of it once.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "format/qcow2/create.h"
#include "image/bench.h"
#include "image/disk.h"
#include "io/queue_thread.h"
#include "sealed/backend_api.h"
#include "storage/file.h"

using namespace pqblk;  // NOLINT

namespace {

[[noreturn]] void die(const Error& error) {
  std::fprintf(stderr, "bench_disk: %s\n", error.to_string().c_str());
  std::exit(1);
}

sealed::VolumeKeys bench_keys() {
  const std::array<std::uint8_t, 32> zeros{};
  sealed::VolumeKeys keys;
  keys.integrity = std::move(*crypto::SecretKey::copy_of(zeros));
  keys.data.push_back({1, std::move(*crypto::SecretKey::copy_of(zeros))});
  keys.current_epoch = 1;
  return keys;
}

void create(const std::string& path, const std::string& format, std::uint64_t size,
            std::uint64_t log_bytes) {
  auto file = storage::open_file(path, {.create = true, .overwrite = true});
  if (!file) die(file.error());
  auto thread = io::QueueThread::start({});
  if (!thread) die(thread.error());
  Error error = (*thread)->run_sync([&]() -> Task<Error> {
    io::Queue& io = (*thread)->queue();
    if (format == "raw") co_return co_await io.truncate(*file, size);
    if (format == "qcow2") {
      format::qcow2::CreateOptions options;
      options.size = size;
      co_return co_await format::qcow2::create(io, *file, options);
    }
    sealed::CreateOptions options;
    options.size = size;
    options.log_bytes = log_bytes;
    options.key_area.resize(sealed::kKeyAreaBytes);
    const sealed::VolumeKeys keys = bench_keys();
    co_return co_await sealed::create_image(io, *file, options, keys);
  });
  if (error) die(error);
  storage::close_file(*file);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const std::string path = argv[1], format = argv[2];
  std::map<std::string, std::string> o{
      {"bs", "4096"}, {"depth", "32"}, {"queues", "1"}, {"size", "1073741824"},
      {"ms", "3000"}, {"direct", "0"}, {"log", "0"}};
  for (int i = 4; i < argc; ++i) {
    const std::string text = argv[i];
    const std::size_t at = text.find('=');
    o[text.substr(0, at)] = at == std::string::npos ? "1" : text.substr(at + 1);
  }
  const std::uint64_t size = std::stoull(o["size"]);
  if (o.count("create") != 0) create(path, format, size, std::stoull(o["log"]));
  image::OpenOptions options;
  options.path = path;
  options.format = format == "raw"     ? image::Format::raw
                   : format == "qcow2" ? image::Format::qcow2
                                       : image::Format::sealed;
  options.cache = o["direct"] == "1" ? image::Cache::none : image::Cache::writeback;
  options.queues = static_cast<std::uint32_t>(std::stoul(o["queues"]));
  if (o["engine"] == "aio") options.io.engine = io::EngineType::aio;
  if (o["engine"] == "threads") options.io.engine = io::EngineType::threads;
  if (format == "sealed") options.keys = bench_keys();
  auto disk = image::Disk::open(std::move(options));
  if (!disk) die(disk.error());
  if (o.count("fill") != 0) {
    image::BenchSpec fill;
    fill.pattern = image::Pattern::write;
    fill.block_size = kMiB;
    fill.iodepth = 4;
    fill.size = size;
    auto filled = image::run_bench(**disk, fill);
    if (!filled) die(filled.error());
    std::printf("fill %.0f MB/s\n", filled->write.bytes_per_second / 1e6);
  }
  auto pattern = image::parse_pattern(argv[3]);
  if (!pattern) die(pattern.error());
  image::BenchSpec spec;
  spec.pattern = *pattern;
  spec.block_size = std::stoull(o["bs"]);
  spec.iodepth = static_cast<std::uint32_t>(std::stoul(o["depth"]));
  spec.size = size;
  spec.runtime_ms = std::stoull(o["ms"]);
  auto result = image::run_bench(**disk, spec);
  if (!result) die(result.error());
  const image::BackendStats stats = (*disk)->backend_stats();
  std::printf("%s %s %s: read %.0f IOPS %.0f MB/s, write %.0f IOPS %.0f MB/s; checkpoints %llu\n",
              (*disk)->facts().engine.c_str(), format.c_str(), argv[3], result->read.iops,
              result->read.bytes_per_second / 1e6, result->write.iops,
              result->write.bytes_per_second / 1e6,
              static_cast<unsigned long long>(stats.checkpoints));
  if (Error e = (*disk)->close()) die(e);
  return 0;
}
