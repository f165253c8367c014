// Measures the rotation of a data key against what it may cost at least: a plain copy of as many
// bytes on the same file system, and the cipher. Not run by the tests.
//
//   bench_rekey PATH [size=1073741824] [rounds=3] [direct=0|1] [log=0] [online=1]
//
// Each round copies a raw file (1 MiB reads and writes, 8 in flight, to a new file with its space
// taken beforehand, one sync at the end), then moves a full sealed disk to the next epoch: rewrite,
// verify, finish. PATH and PATH.from, PATH.to are made and removed.
//
// `online`: what guests keep of their IOPS (4 KiB, half of them writes, 32 in flight) while passes
// with a fifth of the time run, as the command does on a disk that is served.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "base/aligned.h"
#include "base/sync.h"
#include "bench_disk.h"
#include "crypto/aead.h"
#include "image/disk_info.h"
#include "io/queue_thread.h"
#include "storage/file.h"

using namespace pqblk;  // NOLINT

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kPiece = 1 * kMiB;
constexpr std::uint32_t kCopiers = 8;

template <class F>
double seconds(F&& work) {
  const Clock::time_point begin = Clock::now();
  if (Error e = work()) test::bench_die(e.to_string());
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

sealed::DataKey key_of(std::uint32_t epoch) {
  std::array<std::uint8_t, 32> bytes{};
  bytes[0] = static_cast<std::uint8_t>(epoch);
  return {epoch, std::move(*crypto::SecretKey::copy_of(bytes))};
}

struct Copy {
  const io::File& from;
  io::File to;
  std::uint64_t size = 0, next = 0;
  std::uint32_t active = kCopiers;
  Error error;
  Watermark ended{0};
};

Task<void> copier(io::Queue& q, Copy& copy) {
  AlignedBuffer buffer(kPiece);
  while (copy.next < copy.size && !copy.error) {
    const std::uint64_t at = copy.next;
    copy.next += kPiece;
    Error e = co_await q.read(copy.from, at, buffer.data(), kPiece);
    if (!e) e = co_await q.write(copy.to, at, buffer.data(), kPiece);
    if (e && !copy.error) copy.error = std::move(e);
  }
  if (--copy.active == 0) copy.ended.advance(1);
}

Task<Error> copy_all(io::Queue& q, Copy& copy) {
  for (std::uint32_t i = 0; i < kCopiers; ++i) spawn(copier(q, copy));
  co_await copy.ended.reach(1);
  if (copy.error) co_return std::move(copy.error);
  co_return co_await q.fdatasync(copy.to);
}

io::File open_plain(const std::string& path, bool direct) {
  storage::OpenOptions options;
  options.create = options.overwrite = true;
  options.lock = storage::Lock::none;
  options.direct = direct ? storage::Direct::optional : storage::Direct::off;
  auto file = storage::open_file(path, options);
  if (!file) test::bench_die(file.error().to_string());
  return std::move(*file);
}

Task<Error> fill_plain(io::Queue& q, const io::File& file, std::uint64_t size) {
  AlignedBuffer buffer(kPiece);
  if (Error e = crypto::random_bytes(buffer.span())) co_return e;
  for (std::uint64_t at = 0; at < size; at += kPiece) {
    if (Error e = co_await q.write(file, at, buffer.data(), kPiece)) co_return e;
  }
  co_return co_await q.fdatasync(file);
}

double measure_copy(io::QueueThread& thread, const io::File& from, std::uint64_t size,
                    const std::string& path, bool direct) {
  Copy copy{from, open_plain(path + ".to", direct), size};
  io::Queue& q = thread.queue();
  if (Error e = thread.run_sync([&]() -> Task<Error> {
        co_return co_await q.fallocate(copy.to, io::FallocateMode::allocate, 0, copy.size);
      })) {
    test::bench_die(e.to_string());
  }
  const double took = seconds([&] { return thread.run_sync([&] { return copy_all(q, copy); }); });
  storage::close_file(copy.to);
  ::unlink((path + ".to").c_str());
  return took;
}

// Opens and seals the sectors of a buffer in the caches: seconds for `size` bytes.
double measure_cipher(std::uint64_t size) {
  constexpr std::size_t kSector = 4096;
  auto key = crypto::AeadKey::create(crypto::Suite::aes_256_gcm,
                                     std::array<std::uint8_t, crypto::kKeyBytes>{});
  if (!key) test::bench_die(key.error().to_string());
  std::vector<std::uint8_t> in(16 * kSector), out(in.size());
  const std::array<std::uint8_t, 36> aad{};
  std::array<crypto::Tag, 16> tags{};
  for (std::size_t i = 0; i < 16; ++i) {
    key->seal({}, aad, &in[i * kSector], &out[i * kSector], kSector, tags[i]);
  }
  return seconds([&] {
    for (std::uint64_t at = 0; at < size; at += kSector) {
      const std::size_t i = at / kSector % 16;
      const std::size_t place = i * kSector;
      if (!key->open({}, aad, &out[place], &in[place], kSector, tags[i])) {
        return Error(Kind::integrity, "a tag does not hold");
      }
      key->seal({}, aad, &in[place], &out[place], kSector, tags[i]);
    }
    return Error();
  });
}

double guest_iops(image::Disk& disk) {
  image::BenchSpec spec;
  spec.pattern = image::Pattern::randrw;
  spec.runtime_ms = 3000;
  spec.ramp_ms = 500;
  auto result = image::run_bench(disk, spec);
  if (!result) test::bench_die(result.error().to_string());
  return result->read.iops + result->write.iops;
}

// The key area never changes here.
void begin_epoch(image::Disk& disk, const std::string& path, std::uint32_t epoch) {
  auto info = image::read_disk_info(path, image::Format::sealed);
  if (!info) test::bench_die(info.error().to_string());
  const std::vector<std::uint8_t> state = sealed::state_of(info->sealed->key_area);
  if (Error e = disk.begin_epoch(key_of(epoch), state)) test::bench_die(e.to_string());
}

void measure_online(image::Disk& disk, const std::string& path, std::uint32_t rounds) {
  std::uint32_t epoch = 1;
  for (std::uint32_t round = 0; round < rounds; ++round) {
    const double alone = guest_iops(disk);
    std::atomic<bool> stop{false};
    std::uint64_t moved = 0;
    std::thread rotation([&] {
      while (!stop) {
        begin_epoch(disk, path, ++epoch);
        image::RekeySpec spec;
        spec.share = 0.2;
        spec.progress = [&](std::uint64_t, std::uint64_t) { return !stop.load(); };
        auto pass = disk.rekey(spec);
        if (!pass) test::bench_die(pass.error().to_string());
        moved += pass->sectors;
      }
    });
    const double beside = guest_iops(disk);
    stop = true;
    rotation.join();
    std::printf("guests: %.0f IOPS alone, %.0f beside a rotation (%.2f), which moved %llu MiB\n",
                alone, beside, beside / alone, static_cast<unsigned long long>(moved / 256));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const std::string path = argv[1];
  test::BenchOptions o = test::bench_options(argc, argv, 2,
                                             {{"size", "1073741824"},
                                              {"queues", "1"},
                                              {"direct", "0"},
                                              {"rounds", "3"},
                                              {"create", "1"},
                                              {"fill", "1"}});
  const bool direct = o["direct"] == "1";
  const auto disk = test::bench_disk(path, image::Format::sealed, o);
  const std::uint64_t size = std::stoull(o["size"]);
  const auto rounds = static_cast<std::uint32_t>(std::stoul(o["rounds"]));
  if (o["online"] == "1") {
    measure_online(*disk, path, rounds);
    if (Error e = disk->close()) test::bench_die(e.to_string());
    ::unlink(path.c_str());
    return 0;
  }
  io::File from = open_plain(path + ".from", direct);
  auto thread = io::QueueThread::start(io::QueueOptions{});
  if (!thread) test::bench_die(thread.error().to_string());
  if (Error e = (*thread)->run_sync([&] { return fill_plain((*thread)->queue(), from, size); })) {
    test::bench_die(e.to_string());
  }
  const double mb = static_cast<double>(size) / 1e6;
  for (std::uint32_t round = 0; round < rounds; ++round) {
    const double cipher = measure_cipher(size);
    const double copied = measure_copy(**thread, from, size, path, direct);
    begin_epoch(*disk, path, 2 + round);
    const auto pass = [&](bool verify) {
      return seconds([&] {
        auto report = disk->rekey({.verify = verify});
        return report ? Error() : report.take_error();
      });
    };
    const double rewritten = pass(false), verified = pass(true);
    const double finished = seconds([&] { return disk->finish_epoch(); });
    const double all = rewritten + verified + finished;
    std::printf(
        "copy %.0f MB/s, cipher %.0f MB/s; rotation %.0f MB/s (rewrite %.2f s, verify %.2f s, "
        "finish %.2f s): %.2f of the slower\n",
        mb / copied, mb / cipher, mb / all, rewritten, verified, finished,
        std::max(copied, cipher) / all);
    std::fflush(stdout);
  }
  if (Error e = disk->close()) test::bench_die(e.to_string());
  (*thread)->stop();
  storage::close_file(from);
  ::unlink((path + ".from").c_str());
  ::unlink(path.c_str());
  return 0;
}
