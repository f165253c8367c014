// Tables, refcounts, allocator on real files: what the sealed disk builds on, and the bounds.

#include <doctest/doctest.h>
#include <unistd.h>

#include <filesystem>
#include <set>

#include "format/qcow2/create.h"
#include "format/qcow2/metadata.h"
#include "image/qcow2_lab.h"
#include "storage/file.h"

namespace pqblk::format::qcow2 {
namespace {

using image::test::Lab;
using image::test::Random;

// An image of our own making, opened as metadata alone.
struct Image {
  Lab lab;
  io::File file;
  std::unique_ptr<Metadata> metadata;

  template <class Body>
  auto run(Body&& body) {
    return lab.run(std::forward<Body>(body));
  }
  explicit Image(const CreateOptions& options) {
    const Error error = lab.create("disk.qcow2", options);
    REQUIRE_MESSAGE(error.ok(), error.to_string());
    open();
  }
  ~Image() {
    metadata.reset();
    storage::close_file(file);
  }
  void open(const OpenOptions& options = {}) {
    metadata.reset();
    storage::close_file(file);
    Result<io::File> opened = storage::open_file(lab.path("disk.qcow2"), {});
    REQUIRE(opened);
    file = std::move(*opened);
    auto result = run([&] { return Metadata::open(lab.queue(), file, options); });
    REQUIRE_MESSAGE(result, result.error().to_string());
    metadata = std::move(*result);
  }
  // qemu-img check of a copy: the file itself is locked while it is open here.
  image::test::Shell qemu_check() {
    std::filesystem::copy_file(lab.path("disk.qcow2"), lab.path("copy.qcow2"),
                               std::filesystem::copy_options::overwrite_existing);
    return image::test::run_command("qemu-img check -f qcow2 " + lab.path("copy.qcow2"));
  }
  void ok(const Error& error) { REQUIRE_MESSAGE(error.ok(), error.to_string()); }
};

CreateOptions options_of(std::uint64_t size, std::uint32_t cluster_bits = 16,
                         std::uint32_t refcount_bits = 16) {
  CreateOptions options;
  options.size = size;
  options.cluster_bits = cluster_bits;
  options.refcount_bits = refcount_bits;
  return options;
}

}  // namespace

TEST_CASE("qcow2 refcounts: the table grows and moves as the file grows") {
  // 512-byte clusters and 64-bit counts: a block covers 32 KiB, a table cluster 2 MiB.
  Image image(options_of(1 * kMiB, 9, 64));
  const HostOffset first_table = image.metadata->header().refcount_table_offset;
  std::set<std::uint64_t> seen;
  Random random(1);
  std::vector<HostRun> runs;
  for (int i = 0; i < 3000; ++i) {
    const std::uint64_t want = 1 + random.below(12);
    const bool contiguous = random.below(2) == 0;
    auto run = image.run(
        [&] { return image.metadata->allocator().take(image.lab.queue(), want, contiguous); });
    REQUIRE_MESSAGE(run, run.error().to_string());
    if (contiguous) REQUIRE(run->clusters == want);
    REQUIRE(run->clusters >= 1);
    REQUIRE(run->clusters <= want);
    for (std::uint64_t c = 0; c < run->clusters; ++c) {
      REQUIRE(seen.insert(run->at.bytes / 512 + c).second);  // never handed out twice
    }
    runs.push_back(*run);
    if (random.below(3) == 0) {
      const std::size_t victim = random.below(runs.size());
      for (std::uint64_t c = 0; c < runs[victim].clusters; ++c) {
        seen.erase(runs[victim].at.bytes / 512 + c);
      }
      image.ok(image.run(
          [&] { return image.metadata->allocator().give_back(image.lab.queue(), runs[victim]); }));
      runs.erase(runs.begin() + static_cast<std::ptrdiff_t>(victim));
    }
  }
  CHECK(image.metadata->header().refcount_table_offset != first_table);
  // A long contiguous run, over many blocks that do not exist yet.
  auto run =
      image.run([&] { return image.metadata->allocator().take(image.lab.queue(), 5000, true); });
  REQUIRE_MESSAGE(run, run.error().to_string());
  CHECK(run->clusters == 5000);
  runs.push_back(*run);
  for (const HostRun& r : runs) {
    image.ok(
        image.run([&] { return image.metadata->allocator().give_back(image.lab.queue(), r); }));
  }
  image.ok(image.run([&] { return image.metadata->close(image.lab.queue()); }));
  CHECK(image.qemu_check().code == 0);
}

TEST_CASE("qcow2 allocator: a reserve pool leaks at worst, and gives back what it did not use") {
  Image image(options_of(64 * kMiB));
  Allocator* allocator = &image.metadata->allocator();
  allocator->use_reserve_mode();
  HostOffset at;
  CHECK_FALSE(allocator->try_take(1, at));
  image.ok(image.run([&] { return allocator->reserve(image.lab.queue(), 3); }));
  CHECK(allocator->pooled() >= kReserveBatchMin);
  REQUIRE(allocator->try_take(3, at));
  const std::uint64_t left = allocator->pooled();
  CHECK(allocator->recycle(at));
  CHECK(allocator->recycle(at + 2 * 65536));
  CHECK(allocator->recycle(at + 65536));
  CHECK(allocator->pooled() == left + 3);
  HostOffset again;
  REQUIRE(allocator->try_take(left + 3, again));  // one run again
  CHECK(again == at);
  // As after a crash: the counts on disk say used, and nothing refers to them.
  const image::test::Shell leaked = image.qemu_check();
  CHECK(leaked.code == 3);
  CHECK(leaked.output.find("leaked clusters") != std::string::npos);
  for (std::uint64_t i = 0; i < left + 3; ++i) {
    CHECK(allocator->recycle(again + i * 65536));
  }
  image.ok(image.run([&] { return allocator->release_pool(image.lab.queue()); }));
  CHECK(allocator->pooled() == 0);
  CHECK(image.qemu_check().code == 0);
}

TEST_CASE("qcow2 allocator: a batch that fills holes takes one sync for all of them") {
  Image image(options_of(64 * kMiB));
  Allocator* allocator = &image.metadata->allocator();
  allocator->use_reserve_mode();
  io::Queue& q = image.lab.queue();
  image.ok(image.run([&] { return allocator->reserve(q, kReserveBatchMin); }));
  std::vector<HostOffset> odd, even;
  HostOffset at;
  while (allocator->try_take(1, at)) (at.bytes / 65536 % 2 == 0 ? even : odd).push_back(at);
  REQUIRE(even.size() >= kReserveBatchMin / 2);
  image.ok(image.run([&] { return allocator->free(q, even); }));
  int syncs = 0;
  image.metadata->io().sync_by = [&](io::Queue& on) -> Task<Error> {
    ++syncs;
    co_return co_await on.fdatasync(image.file);
  };
  image.ok(image.run([&] { return allocator->reserve(q, 1); }));
  CHECK(syncs == 1);
  CHECK(allocator->pooled() == 4 * kReserveBatchMin);  // the second batch, whole
  for (const HostOffset hole : even) {
    REQUIRE(allocator->try_take(1, at));
    CHECK(at == hole);
  }
  while (allocator->try_take(1, at)) even.push_back(at);
  for (const HostOffset cluster : odd) CHECK(allocator->recycle(cluster));
  for (const HostOffset cluster : even) CHECK(allocator->recycle(cluster));
  image.ok(image.run([&] { return allocator->release_pool(q); }));
  CHECK(image.qemu_check().code == 0);
}

TEST_CASE("qcow2 tables: ensure_table and store are home at once") {
  CreateOptions options = options_of(1 * kGiB, 12);
  Image image(options);
  Allocator* allocator = &image.metadata->allocator();
  allocator->use_reserve_mode();
  Tables* tables = &image.metadata->tables();
  io::Queue& q = image.lab.queue();
  std::vector<SlotUpdate> updates;
  for (const std::uint64_t slot : {0ULL, 1ULL, 63ULL, 64ULL, 511ULL, 512ULL, 70000ULL}) {
    image.ok(image.run([&] { return tables->ensure_table(q, {slot}); }));
    auto run = image.run([&] { return allocator->take(q, 1); });
    REQUIRE(run);
    updates.push_back({{slot}, data_entry(run->at)});
    // Every cluster that an entry names is in the file.
    REQUIRE(::ftruncate(image.file.fd, static_cast<off_t>(image.metadata->io().host_end())) == 0);
  }
  image.ok(image.run([&] { return tables->store(q, updates); }));
  // Another opener (the file as it is now, nothing flushed by the first) sees the same.
  image.open();
  tables = &image.metadata->tables();
  for (const SlotUpdate& update : updates) {
    auto entry = image.run([&] { return tables->entry(q, update.slot); });
    REQUIRE_MESSAGE(entry, entry.error().to_string());
    CHECK(entry->raw == update.raw_entry);
    L2Entry cached;
    REQUIRE(tables->cached_entry(update.slot, cached));
    CHECK(cached.host == entry->host);
  }
  auto other = image.run([&] { return tables->entry(q, {2}); });
  REQUIRE(other);
  CHECK(other->kind == EntryKind::unallocated);
  L2Entry untouched;
  CHECK(tables->cached_entry({40000}, untouched));  // no table: known without I/O
  CHECK(untouched.kind == EntryKind::unallocated);
}

// Against a model: entries that count up and entries that do not, in more tables than the cache
// holds, changed one by one and in runs.
TEST_CASE("qcow2 tables: the look-up without a lock says what the tables say") {
  constexpr std::uint64_t kTables = 300, kEntries = 512, kSlots = kTables * kEntries;
  constexpr std::uint64_t kHosts = std::uint64_t{1} << 36, kCluster = 4096;
  Image image(options_of(kSlots * kCluster, 12));
  OpenOptions small;
  small.l2_cache_bytes = 256 * kKiB;
  image.open(small);
  Tables& tables = image.metadata->tables();
  io::Queue& q = image.lab.queue();
  image.metadata->io().raise_host_end(kHosts << 2);  // nothing is read there
  std::vector<std::uint64_t> model(kSlots);
  std::vector<bool> has_table(kTables);
  Random random(7);
  std::uint64_t answered = 0, wrong = 0;
  for (int step = 0; step < 4000; ++step) {
    const std::uint64_t table = random.below(kTables);
    const std::uint64_t first = table * kEntries + random.below(kEntries / 64) * 64;
    if (!has_table[table]) {
      image.ok(image.run([&] { return tables.ensure_table_lazy(q, {first}); }));
      has_table[table] = true;
    }
    // A whole run in order, or one entry: in order, anywhere, without COPIED, zero, gone.
    const bool whole = random.below(3) == 0;
    const std::uint64_t begin = whole ? first : first + random.below(64);
    const std::uint64_t kind = whole ? 0 : random.below(5);
    std::vector<SlotUpdate> updates;
    for (std::uint64_t slot = begin; slot < (whole ? first + 64 : begin + 1); ++slot) {
      const HostOffset home{kHosts + slot * kCluster};
      const std::uint64_t away = kHosts * 2 + random.below(kSlots) * kCluster;
      const std::uint64_t entries[] = {data_entry(home), data_entry({away}), home.bytes,
                                       zero_entry(home), 0};
      model[slot] = entries[kind];
      updates.push_back({{slot}, model[slot]});
    }
    image.ok(image.run([&] { return tables.set(q, updates); }));
    if (step % 512 == 0) image.ok(image.run([&] { return image.metadata->flush(q); }));
    for (int look = 0; look < 16; ++look) {
      const std::uint64_t slot = look < 8 ? first + random.below(64) : random.below(kSlots);
      std::uint64_t raw = 0;
      const bool plain = tables.plain_entry({slot}, 0, raw);
      answered += plain ? 1 : 0;
      wrong += plain && raw != model[slot] ? 1 : 0;
      if (plain || look % 4 != 0) continue;
      auto entry = image.run([&] { return tables.entry(q, {slot}); });
      REQUIRE(entry);
      wrong += entry->raw != model[slot] ? 1 : 0;
    }
  }
  CHECK(wrong == 0);
  CHECK(answered > 10000);
  CHECK(tables.cache_misses() > kTables);  // slices came and went
}

TEST_CASE("qcow2 metadata: no write lands on another structure") {
  Image image(options_of(64 * kMiB));
  MetaIo& meta = image.metadata->io();
  AlignedBuffer block(4096);
  const HostOffset l1 = image.metadata->header().l1_offset;
  const auto write = [&](Part part, HostOffset at) {
    return image.run([&] { return meta.write(image.lab.queue(), part, at, block.data(), 512); });
  };
  CHECK(write(Part::l1, l1).ok());
  CHECK(write(Part::l2, l1).kind() == Kind::corrupt);
  CHECK(write(Part::refcount_block, {0}).kind() == Kind::corrupt);
  CHECK(write(Part::l2, {10 * 65536}).kind() == Kind::corrupt);  // no L2 table there
  image.metadata->add_region({20 * 65536}, 2 * 65536, "the log");
  CHECK(meta.map().add_cluster({21 * 65536}, Part::l2));
  const Error error = write(Part::l2, {21 * 65536});
  CHECK(error.kind() == Kind::corrupt);
  CHECK(error.message().find("the log") != std::string::npos);
}

TEST_CASE("qcow2 tables: an entry that points at metadata is refused to a writer") {
  Image image(options_of(64 * kMiB));
  io::Queue& q = image.lab.queue();
  Tables* tables = &image.metadata->tables();
  image.ok(image.run([&] { return tables->ensure_table_lazy(q, {5}); }));
  const SlotUpdate bad{{5}, data_entry(image.metadata->header().l1_offset)};
  image.ok(image.run([&] { return tables->set(q, {&bad, 1}); }));
  image.ok(image.run([&] { return image.metadata->flush(q); }));
  image.open();
  tables = &image.metadata->tables();
  auto entry = image.run([&] { return tables->entry(q, {5}); });
  CHECK_FALSE(entry);
  L2Entry out;
  CHECK_FALSE(tables->cached_entry({5}, out));  // neither on the fast path
  OpenOptions read_only;
  read_only.read_only = true;
  image.open(read_only);
  auto readable = image.run([&] { return image.metadata->tables().entry(q, {5}); });
  CHECK(readable);
}

TEST_CASE("qcow2 metadata: unknown extensions and names survive, autoclear bits do not") {
  Lab lab;
  lab.qemu_img("create -f qcow2 disk.qcow2 16M");
  lab.qemu_img("bitmap --add disk.qcow2 b0");
  image::test::Bytes bytes = lab.load("disk.qcow2");
  CHECK((bytes[95] & 1) == 1);  // the bitmaps bit
  REQUIRE(lab.open("disk.qcow2").ok());
  REQUIRE(lab.close().ok());
  bytes = lab.load("disk.qcow2");
  CHECK((bytes[95] & 1) == 0);
  const std::string info = lab.qemu_img("info disk.qcow2");
  CHECK(info.find("b0") == std::string::npos);
}

}  // namespace pqblk::format::qcow2
