// Speed of one queue beside fio's io_uring in the same run: 4 KiB random reads and writes.
//
//   bench_io [--seconds N] [--depth N] [--size-mib N] [--rounds N] [--place ram|disk]
//           [--no-fio] [engine ...]
//
// Each round measures fio, then each engine, on a RAM-backed file and on a file on disk with
// O_DIRECT; the ratio is the median over the rounds, so that a slow moment of the machine falls on
// both sides. Operations are resubmitted from their completion callbacks, as a busy guest does.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "base/units.h"
#include "io/queue.h"
#include "io/queue_thread.h"
#include "storage/file.h"

namespace pqblk::io {

namespace {

constexpr std::size_t kBlock = 4096;

struct Options {
  unsigned seconds = 2;
  std::uint32_t depth = 32;
  std::uint64_t size = 256 * kMiB;
  unsigned rounds = 3;
  std::string place;  // empty: all
  bool with_fio = true;
  std::vector<std::string> engines;
};

struct Load {
  Queue* queue = nullptr;
  const File* file = nullptr;
  std::uint64_t blocks = 0;
  std::uint64_t state = 88172645463325252ULL;
  std::uint64_t completed = 0;
  std::uint32_t running = 0;
  bool over = false;

  std::uint64_t next_block() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % blocks;
  }
};

struct LoadOp : Op {
  Load* load = nullptr;
  char* buffer = nullptr;

  void again() {
    offset = load->next_block() * kBlock;
    single = {buffer, kBlock};
    iov = nullptr;
    load->queue->submit(*this);
  }
};

void on_completion(Op& op) {
  auto& self = static_cast<LoadOp&>(op);
  if (op.result != 0) {
    std::fprintf(stderr, "io_bench: %s\n", std::strerror(-op.result));
    std::exit(1);
  }
  ++self.load->completed;
  if (self.load->over) {
    --self.load->running;
  } else {
    self.again();
  }
}

// Operations per second of one engine.
double measure(EngineType engine, const File& file, OpType type, const Options& options) {
  auto started = QueueThread::start({.engine = engine, .depth = options.depth});
  if (!started) {
    std::fprintf(stderr, "io_bench: %s\n", started.error().to_string().c_str());
    return 0;
  }
  Queue& queue = (*started)->queue();
  AlignedBuffer memory(options.depth * kBlock);
  const iovec arena{memory.data(), memory.size()};
  queue.register_buffers({&arena, 1});
  queue.register_file(file);
  Load load{.queue = &queue, .file = &file, .blocks = options.size / kBlock};
  std::vector<LoadOp> ops(options.depth);
  double rate = 0;
  (*started)->run_sync([&]() -> Task<> {
    const int buffer_index = queue.facts().buffers_registered ? 0 : -1;
    const std::uint64_t begin = queue.now_ns();
    for (std::size_t i = 0; i < ops.size(); ++i) {
      ops[i].type = type;
      ops[i].file = &file;
      ops[i].load = &load;
      ops[i].buffer = reinterpret_cast<char*>(memory.data()) + i * kBlock;
      ops[i].buffer_index = buffer_index;
      ops[i].completed = on_completion;
      ++load.running;
      ops[i].again();
    }
    co_await queue.sleep(options.seconds * 1'000'000'000ULL);
    rate = static_cast<double>(load.completed) * 1e9 / static_cast<double>(queue.now_ns() - begin);
    load.over = true;
    while (load.running > 0) co_await queue.sleep(1'000'000);
  });
  if (std::getenv("IO_BENCH_FACTS") != nullptr) {
    const QueueFacts f = queue.facts();
    std::printf("  %s: %.2f operations per kernel entry, fixed buffers %llu, fixed files %llu\n",
                f.engine.c_str(),
                static_cast<double>(f.operations) / static_cast<double>(f.kernel_entries),
                static_cast<unsigned long long>(f.fixed_buffer_ops),
                static_cast<unsigned long long>(f.fixed_file_ops));
  }
  queue.unregister_file(file);
  return rate;
}

double fio(const File& file, OpType type, const Options& options) {
  const std::string command =
      "fio --name=b --ioengine=io_uring --bs=4k --time_based --output-format=terse "
      "--terse-version=3 --filename=" +
      file.path + " --size=" + std::to_string(options.size) +
      " --iodepth=" + std::to_string(options.depth) +
      " --runtime=" + std::to_string(options.seconds) + " --direct=" + (file.direct ? "1" : "0") +
      " --rw=" + (type == OpType::read ? "randread" : "randwrite");
  FILE* pipe = ::popen(command.c_str(), "r");
  if (pipe == nullptr) return 0;
  std::string line;
  char chunk[4096];
  while (std::fgets(chunk, sizeof chunk, pipe) != nullptr) line += chunk;
  ::pclose(pipe);
  constexpr int kReadIops = 7;  // fields of fio's terse format 3, from 0
  constexpr int kWriteIops = 48;
  std::size_t at = 0;
  for (int i = 0; i < (type == OpType::read ? kReadIops : kWriteIops); ++i) {
    at = line.find(';', at);
    if (at == std::string::npos) return 0;
    ++at;
  }
  return std::atof(line.c_str() + at);
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

EngineType engine_named(const std::string& name) {
  if (name == "uring") return EngineType::uring;
  if (name == "aio") return EngineType::aio;
  return EngineType::threads;
}

void compare(const File& file, const char* place, OpType type, const Options& options) {
  std::vector<double> reference;
  std::vector<std::vector<double>> rates(options.engines.size());
  std::vector<std::vector<double>> ratios(options.engines.size());
  // The order turns around from round to round: what one run leaves behind in the device's caches
  // falls on both.
  for (unsigned round = 0; round < options.rounds; ++round) {
    const bool fio_first = round % 2 == 0;
    if (options.with_fio && fio_first) reference.push_back(fio(file, type, options));
    for (std::size_t i = 0; i < options.engines.size(); ++i) {
      rates[i].push_back(measure(engine_named(options.engines[i]), file, type, options));
    }
    if (options.with_fio && !fio_first) reference.push_back(fio(file, type, options));
    for (std::size_t i = 0; i < options.engines.size() && options.with_fio; ++i) {
      ratios[i].push_back(rates[i].back() / reference.back());
      if (std::getenv("IO_BENCH_FACTS") != nullptr) {
        std::printf("  round %u: fio %.0f, %s %.0f\n", round, reference.back(),
                    options.engines[i].c_str(), rates[i].back());
      }
    }
  }
  const char* what = type == OpType::read ? "random read" : "random write";
  std::printf("%-5s %-12s %-8s %10.0f IOPS\n", place, what, "fio", median(reference));
  for (std::size_t i = 0; i < options.engines.size(); ++i) {
    std::printf("%-5s %-12s %-8s %10.0f IOPS  %.2f of fio\n", place, what,
                options.engines[i].c_str(), median(rates[i]), median(ratios[i]));
  }
  std::fflush(stdout);
}

// A file whose blocks are all written, so that no later write allocates.
Result<File> make_file(const std::string& path, storage::Direct direct, std::uint64_t size) {
  auto file = storage::open_file(path, {.direct = direct, .create = true, .overwrite = true});
  if (!file) return file;
  AlignedBuffer chunk(kMiB);
  for (std::uint64_t at = 0; at < size; at += kMiB) {
    if (::pwrite(file->fd, chunk.data(), kMiB, static_cast<off_t>(at)) != ssize_t{kMiB}) {
      return Error::from_errno(errno, "fill", path);
    }
  }
  ::fdatasync(file->fd);
  return file;
}

int bench(const Options& options) {
  const struct {
    const char* name;
    std::string path;
    storage::Direct direct;
  } places[] = {{"ram", "/dev/shm/pqblk-io-bench", storage::Direct::off},
                {"disk", "/var/tmp/pqblk-io-bench", storage::Direct::required}};
  for (const auto& place : places) {
    if (!options.place.empty() && options.place != place.name) continue;
    Result<File> file = make_file(place.path, place.direct, options.size);
    if (!file) {
      std::fprintf(stderr, "io_bench: %s\n", file.error().to_string().c_str());
      return 1;
    }
    compare(*file, place.name, OpType::read, options);
    compare(*file, place.name, OpType::write, options);
    ::unlink(place.path.c_str());
    storage::close_file(*file);
  }
  return 0;
}

}  // namespace

}  // namespace pqblk::io

int main(int argc, char** argv) {
  pqblk::io::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] { return i + 1 < argc ? std::strtoull(argv[++i], nullptr, 10) : 0; };
    if (word == "--seconds") {
      options.seconds = static_cast<unsigned>(value());
    } else if (word == "--depth") {
      options.depth = static_cast<std::uint32_t>(value());
    } else if (word == "--size-mib") {
      options.size = value() * pqblk::kMiB;
    } else if (word == "--rounds") {
      options.rounds = static_cast<unsigned>(value());
    } else if (word == "--place") {
      options.place = i + 1 < argc ? argv[++i] : "";
    } else if (word == "--no-fio") {
      options.with_fio = false;
    } else {
      options.engines.push_back(word);
    }
  }
  if (options.engines.empty()) options.engines = {"uring", "aio", "threads"};
  return pqblk::io::bench(options);
}
