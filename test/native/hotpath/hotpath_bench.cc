// What the engine itself costs: the whole path of a request but the kernel and the device.
//
//   bench_hotpath null raw|qcow2|sealed|all [ops=200000] [rounds=9] [size=67108864] [depth=32]
//                 [dir=.] [json=1]
//   bench_hotpath make|count PATH file=IMAGE [ops=2000] [size=16777216] [depth=32]
//
// `null`: 4 KiB random reads of one queue, on one core, from image::Disk down to the ring, whose
// place a null ring has taken (null_ring.h): queue, request server, backend, coroutines, tables and
// entries, operation state machine, run loop. raw and qcow2 reads complete at once and move no
// byte. A sealed read needs its ciphertext to be where a device would have put it, since it is
// opened for real: the null ring copies it there, and the time of that copy, measured around each
// batch, is taken off; the figure before that is printed beside it. All metadata is in the caches.
// A round's time is the processor time of the queue's thread: what else the machine does hardly
// matters. `iops` is the median of the rounds.
//
// `make` and `count`: for scripts/instructions.mjs, which runs the second under callgrind and knows
// the paths. `make` is a program of its own since valgrind 3.19 cannot run io_uring.
// Only the `ops` operations between two marks are counted, on null rings with a clock that counts,
// so that a binary gives the same number each time.
#include <gnu/libc-version.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "bench_disk.h"
#include "hotpath/guest_load.h"
#include "hotpath/load.h"
#include "hotpath/null_ring.h"

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
constexpr bool kCanCount = true;
#else
#define CALLGRIND_START_INSTRUMENTATION
#define CALLGRIND_STOP_INSTRUMENTATION
constexpr bool kCanCount = false;
#endif

using namespace pqblk;  // NOLINT

namespace {

constexpr std::uint64_t kBlock = 4 * kKiB;

double thread_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e9 + static_cast<double>(t.tv_nsec);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// The engine reads files in memory with system calls of its own instead of the ring.
bool in_memory(const std::string& dir) {
  struct statfs facts {};
  if (::statfs(dir.c_str(), &facts) != 0) test::bench_die("no directory " + dir);
  return facts.f_type == TMPFS_MAGIC;
}

std::string image_path(const std::string& dir) {
  if (in_memory(dir)) test::bench_die(dir + " is in memory: give another dir=");
  return dir + "/hotpath-" + std::to_string(::getpid()) + ".img";
}

// A filled image, closed: nothing is left in its log.
void make_image(image::Format format, const std::string& path, test::BenchOptions o) {
  o["create"] = o["fill"] = o["quiet"] = o["queues"] = "1";
  o["direct"] = "0";
  if (Error e = test::bench_disk(path, format, o)->close()) test::bench_die(e.to_string());
}

// A disk over null rings.
struct Subject {
  test::NullDevice device;
  const std::string path;
  std::unique_ptr<image::Disk> disk;

  Subject(image::Format format, std::string file, test::BenchOptions o, bool counting_clock)
      : device(counting_clock), path(std::move(file)) {
    o["queues"] = "1";
    o["direct"] = "0";
    disk = test::bench_disk(path, format, o, [this](image::OpenOptions& options) {
      options.assume_non_volatile = false;
      options.make_ring = [this](const io::QueueOptions& ring) { return device.make_ring(ring); };
    });
  }
  ~Subject() {
    if (Error e = disk->close()) test::bench_die(e.to_string());
  }
  // Some reads with the real system calls come first: all metadata is in memory from then on.
  void begin(test::Answer answer, std::uint64_t reads, std::uint64_t blocks) {
    load({.ops = reads, .blocks = blocks});
    if (Error e = device.begin(answer, path)) test::bench_die(e.to_string());
  }
  void load(const test::LoadSpec& spec) {
    if (Error e = test::run_load(*disk, spec)) test::bench_die(e.to_string());
  }
};

struct NullResult {
  double own_ns = 0, with_answers_ns = 0;  // of one read
  double least_ns = 0, most_ns = 0;        // rounds
};

NullResult measure(image::Format format, test::BenchOptions& o) {
  const std::string path = image_path(o["dir"]);
  make_image(format, path, o);
  Subject subject(format, path, o, false);
  const bool sealed = format == image::Format::sealed;
  const std::uint64_t blocks = std::stoull(o["size"]) / kBlock;
  subject.begin(sealed ? test::Answer::content : test::Answer::count, 2 * blocks, blocks);
  ::unlink(path.c_str());
  test::LoadSpec spec;
  spec.ops = std::stoull(o["ops"]);
  spec.depth = static_cast<std::uint32_t>(std::stoul(o["depth"]));
  spec.blocks = blocks;
  spec.warm = spec.depth;
  double began = 0, took = 0;
  spec.begin = [&] {
    subject.device.forget_times();
    began = thread_ns();
  };
  spec.end = [&] { took = thread_ns() - began; };
  std::vector<double> own, all;
  for (std::uint64_t round = std::stoull(o["rounds"]); round != 0; --round) {
    subject.load(spec);
    all.push_back(took / static_cast<double>(spec.ops));
    own.push_back(all.back() - subject.device.ns_per_operation());
  }
  return {median(own), median(all), *std::min_element(own.begin(), own.end()),
          *std::max_element(own.begin(), own.end())};
}

void measure_null(const std::string& what, test::BenchOptions& o) {
  for (const std::string name : {"raw", "qcow2", "sealed"}) {
    if (what != name && what != "all") continue;
    const NullResult r = measure(test::bench_format(name), o);
    if (o.count("json") != 0) {
      std::printf(
          "{\"null\": \"%s\", \"iops\": %.0f, \"ns\": %.1f, \"ns_least\": %.1f, \"ns_most\": %.1f, "
          "\"ns_with_answers\": %.1f, \"rounds\": %s}\n",
          name.c_str(), 1e9 / r.own_ns, r.own_ns, r.least_ns, r.most_ns, r.with_answers_ns,
          o["rounds"].c_str());
      continue;
    }
    std::printf("%-6s %9.0f IOPS per core: %.0f ns a read (rounds %.0f to %.0f)", name.c_str(),
                1e9 / r.own_ns, r.own_ns, r.least_ns, r.most_ns);
    if (r.with_answers_ns > r.own_ns) {
      std::printf("; %.0f IOPS, %.0f ns with the copy that stands for the device",
                  1e9 / r.with_answers_ns, r.with_answers_ns);
    }
    std::printf("\n");
  }
}

void count_on() { CALLGRIND_START_INSTRUMENTATION; }

void count_off() { CALLGRIND_STOP_INSTRUMENTATION; }

std::string format_of(const std::string& path) {
  return path == "vhost-read" ? "raw" : path.substr(0, path.find('-'));
}

void count_path(const std::string& path, test::BenchOptions& o) {
  const std::string format = format_of(path);
  const bool sealed = format == "sealed";
  Subject subject(test::bench_format(format), o["file"], o, true);
  const std::uint64_t blocks = std::stoull(o["size"]) / kBlock;
  subject.begin(sealed ? test::Answer::content : test::Answer::count, 1000, blocks);
  test::LoadSpec spec;
  spec.ops = std::stoull(o["ops"]);
  spec.depth = static_cast<std::uint32_t>(std::stoul(o["depth"]));
  spec.blocks = blocks;
  spec.warm = 1000;
  spec.begin = count_on;
  spec.end = count_off;
  if (path == "vhost-read") {
    if (Error e = test::run_guest_load(*subject.disk, spec, subject.path + ".sock")) {
      test::bench_die(e.to_string());
    }
  } else if (path == "sealed-overwrite") {
    spec.type = image::RequestType::out;
    subject.load(spec);
  } else if (path == "sealed-checkpoint") {
    spec.type = image::RequestType::out;
    spec.begin = spec.end = nullptr;
    subject.load(spec);
    count_on();
    if (Error e = subject.disk->close()) test::bench_die(e.to_string());
    count_off();
    spec.ops += spec.warm;
  } else if (path == "raw-read" || path == "qcow2-read" || path == "sealed-read") {
    subject.load(spec);
  } else {
    test::bench_die("there is no path " + path);
  }
  const std::uint64_t due = path == "sealed-checkpoint" ? 1 : 0;
  if (subject.disk->backend_stats().checkpoints != due) test::bench_die("an unasked checkpoint");
  std::printf("{\"path\": \"%s\", \"ops\": %llu, ", path.c_str(),
              static_cast<unsigned long long>(spec.ops));
  std::printf("\"compiler\": \"%s\", \"libc\": \"%s\"}\n", __VERSION__, ::gnu_get_libc_version());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const std::string mode = argv[1], what = argv[2];
  const bool counts = mode == "count" || mode == "make";
  test::BenchOptions o = test::bench_options(argc, argv, 3,
                                             {{"ops", counts ? "2000" : "200000"},
                                              {"rounds", "9"},
                                              {"size", counts ? "16777216" : "67108864"},
                                              {"depth", "32"},
                                              {"dir", "."}});
  if (mode == "null") {
    measure_null(what, o);
    return 0;
  }
  if (!kCanCount) {
    std::printf("{\"skip\": \"bench_hotpath was built without valgrind's header\"}\n");
    return 0;
  }
  if (mode == "make") {
    if (in_memory(o["file"].substr(0, o["file"].rfind('/') + 1) + ".")) {
      std::printf("{\"skip\": \"the image would be in memory, which has a path of its own\"}\n");
      return 0;
    }
    o["log"] = "67108864";  // so long that no checkpoint begins by itself
    make_image(test::bench_format(format_of(what)), o["file"], o);
    std::printf("{}\n");
    return 0;
  }
  if (mode != "count") return 2;
  count_path(what, o);
  return 0;
}
