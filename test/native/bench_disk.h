// What the benchmarks of disks share: options `name=value`, and a disk that is made, filled,
// opened.
//
// Room test. A sealed disk has keys of zeros: benchmarks measure, they hide nothing.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "image/bench.h"
#include "image/disk.h"
#include "image/disk_create.h"
#include "sealed/backend_api.h"

namespace pqblk::test {

using BenchOptions = std::map<std::string, std::string>;

[[noreturn]] inline void bench_die(const std::string& why) {
  std::fprintf(stderr, "bench: %s\n", why.c_str());
  std::exit(1);
}

// `argv[first]` and on over `defaults`; an option without a value is "1".
inline BenchOptions bench_options(int argc, char** argv, int first, BenchOptions defaults) {
  for (int i = first; i < argc; ++i) {
    const std::string text = argv[i];
    const std::size_t at = text.find('=');
    defaults[text.substr(0, at)] = at == std::string::npos ? "1" : text.substr(at + 1);
  }
  return defaults;
}

inline image::Format bench_format(const std::string& name) {
  if (name == "raw") return image::Format::raw;
  if (name == "qcow2") return image::Format::qcow2;
  if (name == "sealed") return image::Format::sealed;
  bench_die("expected raw, qcow2 or sealed, found " + name);
}

inline sealed::VolumeKeys bench_keys() {
  const std::array<std::uint8_t, 32> zeros{};
  sealed::VolumeKeys keys;
  keys.integrity = std::move(*crypto::SecretKey::copy_of(zeros));
  keys.data.push_back({1, std::move(*crypto::SecretKey::copy_of(zeros))});
  keys.current_epoch = 1;
  return keys;
}

// Options: size, queues, direct (0|1), engine, log; `create` makes the image first, `fill` writes
// all of it once. `adjust` has the last word on how it is opened.
inline std::unique_ptr<image::Disk> bench_disk(
    const std::string& path, image::Format format, BenchOptions& o,
    const std::function<void(image::OpenOptions&)>& adjust = {}) {
  const std::uint64_t size = std::stoull(o["size"]);
  if (o.count("create") != 0) {
    image::CreateSpec spec;
    spec.path = path;
    spec.format = format;
    spec.size = size;
    spec.overwrite = true;
    if (format == image::Format::sealed) {
      spec.keys = bench_keys();
      spec.key_area.resize(sealed::kKeyAreaBytes);
      spec.log_bytes = o.count("log") != 0 ? std::stoull(o["log"]) : 0;
    }
    if (Error e = image::create_disk(spec)) bench_die(e.to_string());
  }
  image::OpenOptions options;
  options.path = path;
  options.format = format;
  options.cache = o["direct"] == "1" ? image::Cache::none : image::Cache::writeback;
  options.queues = static_cast<std::uint32_t>(std::stoul(o["queues"]));
  if (o["engine"] == "aio") options.io.engine = io::EngineType::aio;
  if (o["engine"] == "threads") options.io.engine = io::EngineType::threads;
  if (format == image::Format::sealed) options.keys = bench_keys();
  if (adjust) adjust(options);
  auto disk = image::Disk::open(std::move(options));
  if (!disk) bench_die(disk.error().to_string());
  if (o.count("fill") != 0) {
    image::BenchSpec fill;
    fill.pattern = image::Pattern::write;
    fill.block_size = kMiB;
    fill.iodepth = 4;
    fill.size = size;
    auto filled = image::run_bench(**disk, fill);
    if (!filled) bench_die(filled.error().to_string());
    if (o.count("quiet") == 0)
      std::fprintf(stderr, "fill %.0f MB/s\n", filled->write.bytes_per_second / 1e6);
  }
  return std::move(*disk);
}

}  // namespace pqblk::test
