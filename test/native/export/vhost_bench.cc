// Measures a disk through its vhost-user server with a front-end of our own: rings without a guest.
// Not run by the tests.
//
//   bench_vhost PATH raw|qcow2|sealed randread|randwrite|read|write [bs=4096] [depth=32] [queues=1]
//               [rings=QUEUES] [size=1073741824] [ms=3000] [ramp=0] [direct=0|1] [create=1]
//               [fill=1] [packed=0|1] [indirect=0|1] [event_idx=1] [wait=poll|call] [stay=MS]
//               [json=1]
//   bench_vhost SOCKET attach PATTERN ...        measures a server that runs: ours or another's
//
// `create` makes the image first (sealed: with keys of zeros), `fill` writes all of it once. A ring
// is driven by a thread of its own, which looks for answers (poll) or sleeps until half of what is
// out is answered (call).
// What is answered in the first `ramp` milliseconds, before those of `ms`, does not count: pages of
// memory and entries of the disk are touched for the first time, threads find their processors.
// `stay` keeps the connection for so long after the load, without a request; `json` prints one
// object.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>

#include "bench_disk.h"
#include "export/vhost_user.h"
#include "export/vhost_user_client.h"
#include "image/latency.h"

using namespace pqblk;  // NOLINT

namespace {

using Clock = std::chrono::steady_clock;
using Options = test::BenchOptions;
using test::bench_die;

struct RingResult {
  std::uint64_t ops = 0, errors = 0;
  double seconds = 0;
  image::LatencyHistogram latency;
  void start_over() { ops = 0, latency = {}; }  // but for errors
};

constexpr int kPatienceMs = 60'000;

// A call for half of what is out lets a server work on while the driver wakes: Linux's drivers call
// that a delayed callback.
std::uint16_t half(std::uint32_t out) {
  return static_cast<std::uint16_t>(std::max<std::uint32_t>(1, out / 2));
}

// Keeps `depth` requests in flight until the time is up.
void drive(exports::test::FrontEnd& guest, std::uint32_t r, Options& o, RingResult& result) {
  const auto depth = static_cast<std::uint32_t>(std::stoul(o["depth"]));
  const auto bytes = static_cast<std::uint32_t>(std::stoul(o["bs"]));
  const std::uint64_t blocks = std::stoull(o["size"]) / bytes;
  const bool random = o["pattern"].starts_with("rand"), polls = o["wait"] == "poll";
  const std::uint32_t type = o["pattern"].ends_with("read") ? 0 : 1;
  std::uint64_t state = 0x9E3779B97F4A7C15U * (r + 1), sequence = blocks / 7 * r;
  std::vector<Clock::time_point> started(depth);
  const auto submit = [&](std::uint32_t slot, Clock::time_point now) {
    state ^= state << 13U;
    state ^= state >> 7U;
    state ^= state << 17U;
    const std::uint64_t block =
        random ? (state >> 32U) * blocks >> 32U : sequence++ % blocks;  // a division costs
    started[slot] = now;
    guest.add(r, slot, type, block * (bytes / 512), bytes);
  };
  auto begin = Clock::now();
  const auto counted = begin + std::chrono::milliseconds(std::stoull(o["ramp"]));
  const auto end = counted + std::chrono::milliseconds(std::stoull(o["ms"]));
  for (std::uint32_t slot = 0; slot < depth; ++slot) submit(slot, begin);
  guest.kick(r);
  std::uint32_t out = depth;
  bool counts = counted == begin;
  auto now = begin;
  while (out != 0) {
    auto answer = polls ? guest.poll(r) : guest.wait(r, kPatienceMs, half(out));
    if (!answer) continue;
    now = Clock::now();
    if (!counts && now >= counted) {
      counts = true;
      begin = now;
      result.start_over();
    }
    for (; answer; answer = guest.poll(r)) {
      ++result.ops;
      if (answer->status != 0) ++result.errors;
      result.latency.record(static_cast<std::uint64_t>(
          std::chrono::duration_cast<std::chrono::nanoseconds>(now - started[answer->slot])
              .count()));
      --out;
      if (now >= end) continue;
      submit(answer->slot, now);
      ++out;
    }
    guest.kick(r);
  }
  result.seconds = std::chrono::duration<double>(now - begin).count();
}

void measure(const std::string& socket, std::uint32_t rings, Options& o) {
  exports::test::FrontEndOptions options;
  options.rings = rings;
  options.depth = static_cast<std::uint32_t>(std::stoul(o["depth"]));
  options.slot_bytes =
      std::max<std::uint32_t>(4096, static_cast<std::uint32_t>(std::stoul(o["bs"])));
  options.ring.packed = o["packed"] == "1";
  options.ring.indirect = o["indirect"] == "1";
  options.ring.event_idx = o["event_idx"] == "1";
  while (options.ring.size < 4 * options.depth) options.ring.size *= 2;
  exports::test::FrontEnd guest(options);
  if (const std::string why = guest.connect(socket); !why.empty()) bench_die(why);
  std::vector<RingResult> results(rings);
  std::vector<std::thread> threads;
  for (std::uint32_t r = 0; r < rings; ++r) {
    threads.emplace_back([&, r] { drive(guest, r, o, results[r]); });
  }
  for (auto& thread : threads) thread.join();
  double sum = 0;
  image::LatencyHistogram latency;
  for (const RingResult& result : results) {
    if (result.errors != 0) bench_die(std::to_string(result.errors) + " requests failed");
    sum += static_cast<double>(result.ops) / result.seconds;
    latency.merge(result.latency);
  }
  const double bytes = std::stod(o["bs"]);
  if (o.count("json") != 0) {
    const auto us = [&](double percent) {
      return static_cast<double>(latency.percentile_ns(percent)) / 1000.0;
    };
    std::printf(
        "{\"iops\": %.0f, \"mean_us\": %.1f, \"p50_us\": %.1f, \"p90_us\": %.1f, "
        "\"p99_us\": %.1f, \"p99_9_us\": %.1f}\n",
        sum, latency.mean_ns() / 1000.0, us(50), us(90), us(99), us(99.9));
  } else {
    std::printf("%s, %u ring(s): %.0f IOPS, %.0f MB/s; mean %.1f us, p99 %.1f us\n",
                o["pattern"].c_str(), rings, sum, sum * bytes / 1e6, latency.mean_ns() / 1000.0,
                static_cast<double>(latency.percentile_ns(99)) / 1000.0);
  }
  std::fflush(stdout);
  std::this_thread::sleep_for(std::chrono::milliseconds(std::stoull(o["stay"])));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const std::string path = argv[1], what = argv[2];
  Options o = test::bench_options(argc, argv, 4,
                                  {{"bs", "4096"},
                                   {"depth", "32"},
                                   {"queues", "1"},
                                   {"size", "1073741824"},
                                   {"ms", "3000"},
                                   {"ramp", "0"},
                                   {"direct", "0"},
                                   {"packed", "0"},
                                   {"indirect", "0"},
                                   {"wait", "poll"},
                                   {"event_idx", "1"},
                                   {"stay", "0"},
                                   {"pattern", argv[3]}});
  const auto rings =
      static_cast<std::uint32_t>(std::stoul(o.count("rings") != 0 ? o["rings"] : o["queues"]));
  if (what == "attach") {
    measure(path, rings, o);
    return 0;
  }
  auto disk = test::bench_disk(path, test::bench_format(what), o);
  exports::VhostUserOptions options;
  options.path = "/tmp/bench-vhost-" + std::to_string(::getpid());
  options.queues = rings;
  options.log = [](const std::string& line) { std::fprintf(stderr, "%s\n", line.c_str()); };
  const std::string socket = options.path;
  auto server = exports::VhostUserServer::start(*disk, std::move(options));
  if (!server) bench_die(server.error().to_string());
  measure(socket, rings, o);
  (*server)->stop();
  if (Error e = disk->close()) bench_die(e.to_string());
  return 0;
}
