// Images of our own making, repair, growth, backing rules, damaged files, several queues.

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <thread>

#include "base/endian.h"
#include "image/disk.h"
#include "image/qcow2_lab.h"

namespace pqblk::image::test {
namespace {

using format::Preallocation;

void expect_ok(const Error& error) { REQUIRE_MESSAGE(error.ok(), error.to_string()); }

void expect_file(Lab& lab, const std::string& name, const Bytes& model) {
  const std::string complaint = lab.qemu_check(name);
  CHECK_MESSAGE(complaint.empty(), complaint);
  const std::string what = difference(lab.qemu_read(name), model);
  CHECK_MESSAGE(what.empty(), "as qemu-img reads it: " << what);
}

std::uint64_t word(const Bytes& bytes, std::size_t at) {
  Be64 field;
  std::memcpy(&field, bytes.data() + at, sizeof field);
  return field;
}
void put_word(Bytes& bytes, std::size_t at, std::uint64_t value) {
  const Be64 field(value);
  std::memcpy(bytes.data() + at, &field, sizeof field);
}

}  // namespace

TEST_SUITE_BEGIN("solo");

TEST_CASE("qcow2 create: qemu-img finds our empty images clean, and our written ones") {
  struct Made {
    std::uint32_t version, cluster_bits, refcount_bits;
    bool extended;
    qcow2::Compression compression;
    Preallocation preallocation;
  };
  const auto zlib = qcow2::Compression::zlib;
  const auto zstd = qcow2::Compression::zstd;
  const Made all[] = {
      {3, 16, 16, false, zlib, Preallocation::off},
      {2, 16, 16, false, zlib, Preallocation::off},
      {3, 9, 64, false, zlib, Preallocation::off},
      {3, 9, 1, false, zlib, Preallocation::off},
      {3, 12, 8, false, zstd, Preallocation::off},
      {3, 21, 16, false, zlib, Preallocation::off},
      {3, 16, 32, true, zlib, Preallocation::off},
      {3, 14, 4, true, zstd, Preallocation::off},
      {3, 16, 16, false, zlib, Preallocation::metadata},
      {3, 9, 16, false, zlib, Preallocation::metadata},
      {2, 12, 16, false, zlib, Preallocation::falloc},
      {3, 16, 16, true, zlib, Preallocation::metadata},
      {3, 21, 64, false, zlib, Preallocation::falloc},
      {3, 16, 2, false, zlib, Preallocation::full},
  };
  for (const Made& made : all) {
    CAPTURE(made.version);
    CAPTURE(made.cluster_bits);
    CAPTURE(made.refcount_bits);
    CAPTURE(static_cast<int>(made.preallocation));
    Random random(21);
    Lab lab;
    qcow2::CreateOptions options;
    options.size = made.cluster_bits == 9 ? 1 * kMiB + 512 : 9 * kMiB + 512 * 3;
    options.version = made.version;
    options.cluster_bits = made.cluster_bits;
    options.refcount_bits = made.refcount_bits;
    options.extended_l2 = made.extended;
    options.compression = made.compression;
    options.preallocation = made.preallocation;
    std::uint64_t last = 0;
    options.progress = [&](std::uint64_t done, std::uint64_t) {
      CHECK(done >= last);
      last = done;
      return true;
    };
    expect_ok(lab.create("disk.qcow2", options));
    struct stat status {};
    REQUIRE(::stat(lab.path("disk.qcow2").c_str(), &status) == 0);
    // What file systems add for themselves stays below a few blocks.
    CHECK(static_cast<std::uint64_t>(status.st_blocks) * 512 <=
          qcow2::create_space(options) + 64 * kKiB);
    Bytes model(options.size);
    expect_file(lab, "disk.qcow2", model);
    expect_ok(lab.open("disk.qcow2"));
    exercise(lab, model, random, {.rounds = 12});
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
  }
}

TEST_CASE("qcow2 create: absurd options are refused") {
  qcow2::CreateOptions options;
  options.size = 1 * kGiB;
  CHECK(qcow2::check_create(options).ok());
  const auto refused = [&](auto change) {
    qcow2::CreateOptions bad = options;
    change(bad);
    return qcow2::check_create(bad).kind();
  };
  CHECK(refused([](auto& o) { o.size = 0; }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) { o.size = 1000; }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) { o.version = 4; }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) { o.cluster_bits = 22; }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) { o.refcount_bits = 3; }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) { o.refcount_bits = 128; }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) {
          o.version = 2;
          o.extended_l2 = true;
        }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) {
          o.extended_l2 = true;
          o.cluster_bits = 12;
        }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) { o.backing_name = "base"; }) == Kind::invalid_argument);
  CHECK(refused([](auto& o) {
          o.size = 256 * kGiB;
          o.cluster_bits = 9;
        }) == Kind::out_of_range);
}

TEST_CASE("qcow2 create: stopping preallocation is an error of its own kind") {
  Lab lab;
  qcow2::CreateOptions options;
  options.size = 64 * kMiB;
  options.preallocation = Preallocation::full;
  options.progress = [](std::uint64_t done, std::uint64_t total) { return done < total / 4; };
  CHECK(lab.create("disk.qcow2", options).kind() == Kind::canceled);
}

TEST_CASE("qcow2 check: leaks and wrong counts are found and mended as qemu-img counts them") {
  for (const char* shape :
       {"", "cluster_size=512,refcount_bits=64", "cluster_size=4k,refcount_bits=2"}) {
    CAPTURE(shape);
    Random random(31);
    Lab lab;
    const Bytes model = mixed_content(random, 2 * kMiB);
    lab.save("source.raw", model);
    lab.qemu_img(std::string("convert -f raw -O qcow2 -o ") +
                 (*shape == '\0' ? "compat=1.1" : shape) + " source.raw disk.qcow2");
    auto clean = lab.check("disk.qcow2", false);
    REQUIRE_MESSAGE(clean, clean.error().to_string());
    CHECK(clean->clean());
    CHECK(clean->messages.empty());

    // Raise two counts of clusters and lower one, in the first refcount block.
    Bytes image = lab.load("disk.qcow2");
    const std::size_t block = word(image, word(image, 48));
    const std::uint32_t order = image[99];
    const std::uint64_t cluster_size = std::uint64_t{1} << image[23];
    const std::uint64_t clusters = image.size() / cluster_size;
    const std::uint64_t per_block = cluster_size * 8 >> order;
    std::vector<std::uint64_t> used;
    for (std::uint64_t c = 4; c < std::min(clusters, per_block); ++c) {
      if (qcow2::get_refcount(image.data() + block, order, c) == 1) used.push_back(c);
    }
    REQUIRE(used.size() > 3);
    qcow2::set_refcount(image.data() + block, order, used[used.size() - 1], 2);
    qcow2::set_refcount(image.data() + block, order, used[used.size() - 2], 0);
    lab.save("disk.qcow2", image);
    auto found = lab.check("disk.qcow2", false);
    REQUIRE(found);
    CHECK(found->leaks == 1);
    CHECK(found->corruptions >= 1);
    CHECK(lab.qemu_check("disk.qcow2") != "");
    auto repaired = lab.check("disk.qcow2", true);
    REQUIRE_MESSAGE(repaired, repaired.error().to_string());
    CHECK(repaired->clean());
    CHECK(repaired->leaks_fixed == 1);
    CHECK(repaired->corruptions_fixed >= 1);
    expect_file(lab, "disk.qcow2", model);
    auto again = lab.check("disk.qcow2", false);
    REQUIRE(again);
    CHECK(again->clean());
  }
}

TEST_CASE("qcow2 check: a damaged refcount structure is rebuilt, snapshots and all") {
  Random random(32);
  Lab lab;
  Bytes model = mixed_content(random, 6 * kMiB);
  lab.save("source.raw", model);
  lab.qemu_img("convert -f raw -O qcow2 -o cluster_size=4k source.raw disk.qcow2");
  const Bytes before = model;
  lab.qemu_img("snapshot -c first disk.qcow2");
  expect_ok(lab.open("disk.qcow2"));
  exercise(lab, model, random, {.rounds = 5});
  expect_ok(lab.close());
  for (const std::uint64_t entry :
       {std::uint64_t{4096 + 7}, std::uint64_t{0}, std::uint64_t{1} << 50, std::uint64_t{0x3000}}) {
    CAPTURE(entry);
    Bytes image = lab.load("disk.qcow2");
    put_word(image, word(image, 48), entry);
    lab.save("disk.qcow2", image);
    auto found = lab.check("disk.qcow2", false);
    REQUIRE(found);
    CHECK(found->corruptions > 0);
    auto repaired = lab.check("disk.qcow2", true);
    REQUIRE_MESSAGE(repaired, repaired.error().to_string());
    CHECK_MESSAGE(repaired->clean(), repaired->messages.front());
    expect_file(lab, "disk.qcow2", model);
    CHECK(difference(lab.qemu_read("disk.qcow2", "first"), before) == "");
  }
}

TEST_CASE("qcow2 check: wrong COPIED flags are mended") {
  Lab lab;
  Random random(33);
  const Bytes model = mixed_content(random, 3 * kMiB);
  lab.save("source.raw", model);
  lab.qemu_img("convert -f raw -O qcow2 source.raw disk.qcow2");
  Bytes image = lab.load("disk.qcow2");
  const std::size_t l1 = word(image, 40);
  const std::size_t l2 = word(image, l1) & 0x00fffffffffffe00;
  put_word(image, l1, word(image, l1) & ~(std::uint64_t{1} << 63));
  for (std::size_t at = l2; at < l2 + 512; at += 8) {
    if (word(image, at) == 0) continue;
    put_word(image, at, word(image, at) & ~(std::uint64_t{1} << 63));
    break;
  }
  lab.save("disk.qcow2", image);
  auto found = lab.check("disk.qcow2", false);
  REQUIRE(found);
  CHECK(found->corruptions == 2);
  auto repaired = lab.check("disk.qcow2", true);
  REQUIRE(repaired);
  CHECK(repaired->corruptions == 0);
  CHECK(repaired->corruptions_fixed == 2);
  expect_file(lab, "disk.qcow2", model);
}

TEST_CASE("qcow2: a dirty image is repaired before it is written, and read as it is") {
  Lab lab;
  lab.qemu_img("create -f qcow2 -o lazy_refcounts=on disk.qcow2 16M");
  const Shell crash = run_command("cd " + lab.path("") +
                                  " && qemu-io -f qcow2 -c 'write -P 0x5a 1M 3M' -c flush -c abort "
                                  "disk.qcow2");
  CHECK(crash.code != 0);
  Bytes image = lab.load("disk.qcow2");
  REQUIRE((image[79] & 1) == 1);  // the dirty bit
  Bytes model(16 * kMiB);
  std::memset(model.data() + 1 * kMiB, 0x5a, 3 * kMiB);
  expect_ok(lab.open("disk.qcow2", true));
  CHECK(difference(lab.read(0, model.size()), model) == "");
  expect_ok(lab.close());
  expect_ok(lab.open("disk.qcow2"));
  CHECK(difference(lab.read(0, model.size()), model) == "");
  Random random(41);
  exercise(lab, model, random, {.rounds = 5});
  expect_ok(lab.close());
  CHECK((lab.load("disk.qcow2")[79] & 1) == 0);
  expect_file(lab, "disk.qcow2", model);
}

TEST_CASE("qcow2: an image marked corrupt opens read-only") {
  Lab lab;
  lab.qemu_img("create -f qcow2 disk.qcow2 16M");
  Bytes image = lab.load("disk.qcow2");
  image[79] |= 2;
  lab.save("disk.qcow2", image);
  CHECK(lab.open("disk.qcow2").kind() == Kind::corrupt);
  expect_ok(lab.open("disk.qcow2", true));
  CHECK(lab.write(0, Bytes(512)).kind() == Kind::read_only);
  expect_ok(lab.close());
  REQUIRE(lab.check("disk.qcow2", true));
  expect_ok(lab.open("disk.qcow2"));
  expect_ok(lab.close());
}

TEST_CASE("qcow2: corruption met by a write marks the image") {
  Lab lab;
  lab.qemu_img("create -f qcow2 disk.qcow2 1G");
  Bytes image = lab.load("disk.qcow2");
  put_word(image, word(image, 40), word(image, 48));  // the first L2 table: the refcount table
  lab.save("disk.qcow2", image);
  expect_ok(lab.open("disk.qcow2"));
  CHECK(lab.write(0, Bytes(4096, 1)).kind() == Kind::corrupt);
  expect_ok(lab.close());
  CHECK((lab.load("disk.qcow2")[79] & 2) == 2);
}

TEST_CASE("qcow2 resize: grows, also where L1 has to move, and the new part reads as zeros") {
  for (const char* shape : {"cluster_size=512", "", "compat=0.10", "extended_l2=on"}) {
    CAPTURE(shape);
    Random random(51);
    Lab lab;
    const std::uint64_t size = 1 * kMiB + 512 * 3;
    Bytes base(4 * kMiB, 0xee);
    lab.save("base.raw", base);
    lab.qemu_img("create -f qcow2 -b base.raw -F raw " +
                 (*shape == '\0' ? std::string() : "-o " + std::string(shape)) + " disk.qcow2 " +
                 std::to_string(size));
    Bytes model(size, 0xee);
    expect_ok(lab.open("disk.qcow2"));
    exercise(lab, model, random, {.rounds = 6});
    for (const std::uint64_t grown : {size + 512, 3 * kMiB, 40 * kMiB + 512}) {
      expect_ok(lab.run([&] { return lab.disk().resize(lab.context(), grown); }));
      model.resize(grown);
      CHECK(lab.size() == grown);
      const std::string what = difference(lab.read(0, grown), model);
      CHECK_MESSAGE(what.empty(), what);
      exercise(lab, model, random, {.rounds = 4});
    }
    CHECK(lab.run([&] { return lab.disk().resize(lab.context(), size); }).kind() ==
          Kind::invalid_argument);
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
  }
}

TEST_CASE("qcow2 backing: the gate, unknown formats, loops and protocols") {
  Lab lab;
  lab.save("base.raw", Bytes(1 * kMiB, 7));
  lab.qemu_img("create -f qcow2 -u -b base.raw -F raw disk.qcow2 1M");
  lab.qemu_img("create -f qcow2 -u -b /etc/hostname -F raw outside.qcow2 1M");
  CHECK(lab.open("outside.qcow2").kind() == Kind::gate_refused);
  lab.qemu_img("create -f qcow2 -u -b loop.qcow2 -F qcow2 other.qcow2 1M");
  std::filesystem::rename(lab.path("other.qcow2"), lab.path("loop.qcow2"));
  CHECK(lab.open("loop.qcow2", true).kind() == Kind::corrupt);
  lab.qemu_img("create -f qcow2 -u -b a.qcow2 -F qcow2 b.qcow2 1M");
  lab.qemu_img("create -f qcow2 -u -b b.qcow2 -F qcow2 a.qcow2 1M");
  CHECK(lab.open("a.qcow2", true).kind() == Kind::corrupt);
  lab.qemu_img("create -f qcow2 -u -b nbd://localhost/x -F raw far.qcow2 1M");
  CHECK(lab.open("far.qcow2").kind() == Kind::unsupported);
  lab.qemu_img("create -f qcow2 -u -b base.raw -F vmdk odd.qcow2 1M");
  CHECK(lab.open("odd.qcow2").kind() == Kind::unsupported);
  lab.qemu_img("create -f qcow2 -u -b gone.raw -F raw gone.qcow2 1M");
  CHECK(lab.open("gone.qcow2").kind() == Kind::not_found);
  // No format in the header: never guessed, unless the opener says it.
  lab.qemu_img("create -f qcow2 -u -b base.raw -F raw bare.qcow2 1M");
  Bytes image = lab.load("bare.qcow2");
  const std::size_t extension = image[103];  // header length: the first extension
  REQUIRE(image[extension] == 0xe2);
  image[extension] = 0x12;
  lab.save("bare.qcow2", image);
  CHECK(lab.open("bare.qcow2").kind() == Kind::unsupported);
  expect_ok(lab.open("bare.qcow2", false, "raw"));
  CHECK(lab.read(0, 1 * kMiB) == Bytes(1 * kMiB, 7));
  expect_ok(lab.close());
}

TEST_CASE("qcow2: O_DIRECT, where every transfer and table is aligned") {
  Random random(61);
  Lab lab;
  for (const char* shape : {"cluster_size=4k", "", "extended_l2=on,cluster_size=128k"}) {
    CAPTURE(shape);
    Bytes model = mixed_content(random, 5 * kMiB);
    lab.save("source.raw", model);
    lab.qemu_img(std::string("convert -f raw -O qcow2 ") +
                 (*shape == '\0' ? "" : std::string("-o ") + shape) + " source.raw disk.qcow2");
    const Error error = lab.open("disk.qcow2", false, {}, true);
    if (error.kind() == Kind::unsupported) {
      MESSAGE("SKIPPED: the scratch directory takes no O_DIRECT: " << error.to_string());
      return;
    }
    expect_ok(error);
    for (std::uint64_t at = 0; at + 96 * kKiB <= model.size(); at += 160 * kKiB) {
      const Bytes noise = io::test::pattern(at, 96 * kKiB - 4096);
      expect_ok(lab.write(at + 4096, noise));
      std::memcpy(model.data() + at + 4096, noise.data(), noise.size());
    }
    CHECK(difference(lab.read(0, model.size()), model) == "");
    expect_ok(lab.close());
    expect_file(lab, "disk.qcow2", model);
  }
}

TEST_CASE("qcow2: an L2 cache far smaller than the tables") {
  Random random(71);
  Lab lab;
  qcow2::CreateOptions options;
  options.size = 40 * kMiB;
  options.cluster_bits = 9;
  expect_ok(lab.create("disk.qcow2", options));
  Bytes model(options.size);
  expect_ok(lab.open("disk.qcow2", false, {}, false, 1));
  for (int i = 0; i < 1500; ++i) {
    const Bytes noise = io::test::pattern(random.next(), 512 * (1 + random.below(4)));
    const std::uint64_t at = 512 * random.below((options.size - 4096) / 512);
    expect_ok(lab.write(at, noise));
    std::memcpy(model.data() + at, noise.data(), noise.size());
  }
  CHECK(difference(lab.read(0, model.size()), model) == "");
  expect_ok(lab.close());
  expect_file(lab, "disk.qcow2", model);
}

TEST_CASE("qcow2: truncated and garbage images are refused, or read without a crash") {
  Random random(81);
  Lab lab;
  const Bytes model = mixed_content(random, 2 * kMiB);
  lab.save("source.raw", model);
  lab.qemu_img("convert -f raw -O qcow2 -o cluster_size=4k source.raw good.qcow2");
  const Bytes good = lab.load("good.qcow2");
  const auto try_everything = [&] {
    if (lab.open("bad.qcow2")) return;
    Bytes part(64 * kKiB);
    for (std::uint64_t at = 0; at + part.size() <= model.size(); at += part.size()) {
      static_cast<void>(lab.try_read(at, part).ok());
      static_cast<void>(lab.write(at + 512, Bytes(512, 1)).ok());
    }
    static_cast<void>(lab.close().ok());
    auto report = lab.check("bad.qcow2", true);
    if (report) static_cast<void>(report->clean());
  };
  for (const std::size_t size : {0u, 3u, 71u, 72u, 104u, 512u, 4096u, 8192u, 16384u, 40000u}) {
    CAPTURE(size);
    lab.save("bad.qcow2", Bytes(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)));
    try_everything();
  }
  for (int i = 0; i < 60; ++i) {
    CAPTURE(i);
    Bytes bad = good;
    // Damage to the first clusters: header, refcounts, L1, L2.
    for (int n = 0; n < 3; ++n) {
      bad[random.below(6 * 4096)] = static_cast<std::uint8_t>(random.below(256));
    }
    lab.save("bad.qcow2", bad);
    try_everything();
  }
}

TEST_SUITE_END();

TEST_CASE("qcow2: two queues write to the same clusters, and nothing is lost") {
  Lab lab;
  qcow2::CreateOptions options;
  options.size = 64 * kMiB;
  options.cluster_bits = 16;
  expect_ok(lab.create("disk.qcow2", options));
  Bytes model(options.size);
  OpenOptions how;
  how.path = lab.path("disk.qcow2");
  how.format = Format::qcow2;
  how.cache = Cache::writeback;
  how.queues = 2;
  Result<std::unique_ptr<Disk>> disk = Disk::open(std::move(how));
  REQUIRE_MESSAGE(disk, disk.error().to_string());
  Random random(91);
  struct Job {
    Request request;
    Bytes data;
    iovec iov{};
    std::atomic<bool> done{false};
  };
  for (int round = 0; round < 30; ++round) {
    // Neighbouring sectors of a few fresh clusters, dealt to both queues.
    std::vector<std::unique_ptr<Job>> jobs;
    const std::uint64_t base = 512 * random.below((options.size - 2 * kMiB) / 512);
    for (int i = 0; i < 64; ++i) {
      auto job = std::make_unique<Job>();
      job->data = io::test::pattern(random.next(), 4096);
      job->iov = {job->data.data(), job->data.size()};
      job->request.type = i % 16 == 15 ? RequestType::flush : RequestType::out;
      job->request.offset = base + static_cast<std::uint64_t>(i) * 8192;
      if (job->request.type == RequestType::out) {
        job->request.length = job->data.size();
        job->request.iov = &job->iov;
        job->request.iov_count = 1;
        std::memcpy(model.data() + job->request.offset, job->data.data(), job->data.size());
      }
      job->request.context = job.get();
      job->request.complete = [](Request& r) {
        static_cast<Job*>(r.context)->done.store(true, std::memory_order_release);
      };
      jobs.push_back(std::move(job));
    }
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      (*disk)->submit(static_cast<std::uint32_t>(i % 2), &jobs[i]->request);
    }
    for (const auto& job : jobs) {
      while (!job->done.load(std::memory_order_acquire)) std::this_thread::yield();
      REQUIRE_MESSAGE(job->request.status == Status::ok, job->request.error.to_string());
    }
  }
  expect_ok((*disk)->close());
  disk->reset();
  expect_file(lab, "disk.qcow2", model);
}

}  // namespace pqblk::image::test
