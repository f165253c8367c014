// Opening, one-at-a-time requests, facts, extents, resizing, the rules for struct sizes.

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "cabi/cabi_lab.h"

using namespace pqblk::test;  // NOLINT

namespace {

constexpr std::uint64_t kMiB = 1024 * 1024;

pqblk_open_options options_for(const DiskFile& file) {
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  options.path = file.path().c_str();
  options.format = file.format();
  return options;
}

int with(const DiskFile& file, void (*change)(pqblk_open_options&)) {
  pqblk_open_options options = options_for(file);
  change(options);
  pqblk_error error = PQBLK_ERROR_INIT;
  const int kind = file.try_open(options, error);
  CHECK((error.message[0] != '\0') == (kind != PQBLK_OK));
  return kind;
}

// A struct of T with room for members that a later version might add.
template <class T>
struct Grown {
  T known;
  std::uint64_t later[2];
};

}  // namespace

TEST_CASE("one request after another, at any offset, is what a plain file would do") {
  for (const std::uint32_t format : {PQBLK_RAW, PQBLK_QCOW2, PQBLK_SEALED}) {
    INFO(format_name(format));
    const DiskFile file(format, 2 * kMiB);
    std::vector<std::uint8_t> model(2 * kMiB);
    pqblk_disk* disk = file.open(2);
    const std::vector<std::uint8_t> data = noise(100'000, format);
    CHECK(pqblk_size(disk) == 2 * kMiB);
    CHECK(pqblk_pwrite(disk, data.data(), data.size(), 12'345, 0, nullptr) == PQBLK_OK);
    std::copy(data.begin(), data.end(), model.begin() + 12'345);
    CHECK(pqblk_pwrite(disk, data.data(), 512, kMiB, PQBLK_FUA, nullptr) == PQBLK_OK);
    std::copy_n(data.begin(), 512, model.begin() + kMiB);
    CHECK(pqblk_write_zeroes(disk, 20'000, 777, PQBLK_UNMAP | PQBLK_FUA, nullptr) == PQBLK_OK);
    std::fill_n(model.begin() + 20'000, 777, 0);
    CHECK(pqblk_discard(disk, kMiB + 65'536, 65'536, nullptr) == PQBLK_OK);
    CHECK(pqblk_flush(disk, nullptr) == PQBLK_OK);
    std::vector<std::uint8_t> back(model.size());
    CHECK(pqblk_pread(disk, back.data(), back.size(), 0, nullptr) == PQBLK_OK);
    CHECK(back == model);

    pqblk_error error = PQBLK_ERROR_INIT;
    CHECK(pqblk_pread(disk, back.data(), 2, 2 * kMiB - 1, &error) == PQBLK_OUT_OF_RANGE);
    CHECK(error.kind == PQBLK_OUT_OF_RANGE);
    CHECK(std::strstr(error.message, "beyond the end of the disk") != nullptr);
    CHECK(pqblk_pwrite(disk, data.data(), 1, 0, PQBLK_UNMAP, &error) == PQBLK_INVALID_ARGUMENT);
    CHECK(pqblk_flush(disk, &error) == PQBLK_OK);
    CHECK(error.kind == PQBLK_OK);
    CHECK(error.message[0] == '\0');
    CHECK(pqblk_close(disk, &error) == PQBLK_OK);
    CHECK(file.content() == model);
  }
}

TEST_CASE("many threads may use one disk") {
  const DiskFile file(PQBLK_RAW, kMiB);
  pqblk_disk* disk = file.open(2);
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([=] {
      const std::vector<std::uint8_t> data(1000, static_cast<std::uint8_t>(t + 1));
      for (std::uint64_t i = 0; i < 50; ++i) {
        CHECK(pqblk_pwrite(disk, data.data(), 1000, t * 65536 + i * 1000, 0, nullptr) == PQBLK_OK);
      }
      pqblk_extent extent = PQBLK_EXTENT_INIT;
      CHECK(pqblk_get_extents(disk, 0, kMiB, &extent, 1, nullptr) == 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
  const std::vector<std::uint8_t> content = file.content();
  for (std::uint64_t i = 0; i < content.size(); ++i) {
    const bool written = i < 4 * 65536 && i % 65536 < 50'000;
    if (content[i] != (written ? i / 65536 + 1 : 0)) FAIL("byte " << i);
  }
}

TEST_CASE("a disk opens as it is told to, or says why not") {
  const DiskFile raw(PQBLK_RAW, kMiB), qcow2(PQBLK_QCOW2, kMiB), sealed(PQBLK_SEALED, kMiB);
  CHECK(with(raw, [](auto&) {}) == PQBLK_OK);
  CHECK(with(raw, [](auto& o) { o.format = 0; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.format = 4; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.path = nullptr; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.path = "/tmp/pqblk-nothing"; }) == PQBLK_NOT_FOUND);
  CHECK(with(raw, [](auto& o) { o.path = "/tmp"; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.flags = 1U << 31; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.flags = PQBLK_OPEN_TO_RESIZE; }) == PQBLK_OK);
  CHECK(with(raw, [](auto& o) { o.flags = PQBLK_OPEN_ASSUME_VOLATILE | 16; }) ==
        PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.cache = 4; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.engine = 4; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.queues = 65; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.backing_format = 9; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(raw, [](auto& o) { o.reserved = 1; }) == PQBLK_INVALID_ARGUMENT);
  for (std::uint32_t cache = 0; cache < 4; ++cache) {
    pqblk_open_options options = options_for(raw);
    options.cache = cache;
    options.engine = cache;  // as many of these
    options.queues = 3;
    options.ring_depth = 64;
    options.spin_us = 10;
    options.l2_cache_bytes = kMiB;
    pqblk_error error = PQBLK_ERROR_INIT;
    CHECK_MESSAGE(raw.try_open(options, error) == PQBLK_OK, error.message);
  }
  CHECK(with(qcow2, [](auto&) {}) == PQBLK_OK);
  CHECK(with(raw, [](auto& o) { o.format = PQBLK_QCOW2; }) == PQBLK_INVALID_ARGUMENT);
  CHECK(with(sealed, [](auto&) {}) == PQBLK_INVALID_ARGUMENT);  // no keys
  CHECK(with(sealed, [](auto& o) { o.format = PQBLK_QCOW2; }) == PQBLK_UNSUPPORTED);
}

TEST_CASE("a sealed disk opens with its own keys only") {
  const DiskFile file(PQBLK_SEALED, kMiB);
  pqblk_open_options options = options_for(file);
  pqblk_error error = PQBLK_ERROR_INIT;
  pqblk_keys* wrong = make_keys(0x66);
  options.keys = wrong;
  CHECK(file.try_open(options, error) == PQBLK_INTEGRITY);
  pqblk_keys* foreign = make_keys(0x11, 0x77);
  options.keys = foreign;
  CHECK(file.try_open(options, error) == PQBLK_WRONG_KEY);
  CHECK(std::strstr(error.message, "another volume") != nullptr);
  pqblk_keys* right = make_keys();
  options.keys = right;
  CHECK(file.try_open(options, error) == PQBLK_OK);
  CHECK(file.try_open(options, error) == PQBLK_OK);  // they were copied
  for (pqblk_keys* keys : {wrong, foreign, right}) pqblk_keys_free(keys);
}

TEST_CASE("one writer: the second opener is told who has the disk") {
  const DiskFile file(PQBLK_RAW, kMiB);
  pqblk_disk* disk = file.open();
  pqblk_image_info info = PQBLK_IMAGE_INFO_INIT;
  REQUIRE(pqblk_inspect(file.path().c_str(), PQBLK_RAW, &info, nullptr) == PQBLK_OK);
  CHECK((info.flags & PQBLK_IMAGE_IN_USE) != 0);
  CHECK(info.holder_pid == ::getpid());
  pqblk_open_options options = options_for(file);
  pqblk_error error = PQBLK_ERROR_INIT;
  CHECK(file.try_open(options, error) == PQBLK_LOCKED);
  CHECK(pqblk_kind_errno(error.kind) == EBUSY);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
}

TEST_CASE("a disk that was opened read-only is not written") {
  const DiskFile file(PQBLK_SEALED, kMiB);
  pqblk_disk* disk = file.open(1, PQBLK_OPEN_READ_ONLY);
  std::uint8_t byte = 1;
  CHECK(pqblk_pwrite(disk, &byte, 1, 0, 0, nullptr) == PQBLK_READ_ONLY);
  CHECK(pqblk_resize(disk, 2 * kMiB, nullptr) == PQBLK_READ_ONLY);
  CHECK(pqblk_pread(disk, &byte, 1, 0, nullptr) == PQBLK_OK);
  CHECK(byte == 0);
  pqblk_facts facts = PQBLK_FACTS_INIT;
  REQUIRE(pqblk_get_facts(disk, &facts, nullptr) == PQBLK_OK);
  CHECK((facts.flags & PQBLK_FACT_READ_ONLY) != 0);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
}

TEST_CASE("facts, counters and extents are the engine's") {
  const DiskFile file(PQBLK_SEALED, 4 * kMiB);
  pqblk_disk* disk = file.open(3);
  pqblk_facts facts = PQBLK_FACTS_INIT;
  REQUIRE(pqblk_get_facts(disk, &facts, nullptr) == PQBLK_OK);
  CHECK(facts.format == PQBLK_SEALED);
  CHECK(facts.disk_bytes == 4 * kMiB);
  CHECK(facts.cluster_bytes == 65'536);
  CHECK(facts.queues == 3);
  CHECK(std::string(facts.suite) == "AES-256-GCM");
  CHECK(facts.engine[0] != '\0');
  CHECK(facts.durability[0] != '\0');
  CHECK(facts.size == sizeof facts);

  const std::vector<std::uint8_t> data = noise(65'536, 1);
  REQUIRE(pqblk_pwrite(disk, data.data(), data.size(), kMiB, 0, nullptr) == PQBLK_OK);
  pqblk_stats stats = PQBLK_STATS_INIT;
  REQUIRE(pqblk_get_stats(disk, &stats, nullptr) == PQBLK_OK);
  CHECK(stats.sectors_sealed == 16);
  std::uint64_t written = 0;
  pqblk_queue_stats queue = PQBLK_QUEUE_STATS_INIT;
  for (std::uint32_t i = 0; i < 3; ++i) {
    REQUIRE(pqblk_get_queue_stats(disk, i, &queue, nullptr) == PQBLK_OK);
    written += queue.written_bytes;
  }
  CHECK(written == data.size());
  CHECK(pqblk_get_queue_stats(disk, 3, &queue, nullptr) == PQBLK_NOT_FOUND);

  pqblk_extent extents[8] = {PQBLK_EXTENT_INIT};
  const int count = pqblk_get_extents(disk, 0, 4 * kMiB, extents, 8, nullptr);
  REQUIRE(count == 3);
  CHECK(extents[1].kind == PQBLK_EXTENT_DATA);
  CHECK(extents[1].offset == kMiB);
  CHECK(extents[1].length == data.size());
  CHECK(extents[0].kind == PQBLK_EXTENT_HOLE);
  CHECK(extents[2].offset + extents[2].length == 4 * kMiB);
  CHECK(pqblk_get_extents(disk, 0, 4 * kMiB, extents, 1, nullptr) == 1);
  CHECK(pqblk_get_extents(disk, 4 * kMiB, 1, extents, 1, nullptr) == -PQBLK_OUT_OF_RANGE);
  CHECK(pqblk_get_extents(disk, 0, 1, extents, 0, nullptr) == -PQBLK_INVALID_ARGUMENT);

  CHECK(pqblk_resize(disk, 8 * kMiB, nullptr) == PQBLK_OK);
  CHECK(pqblk_size(disk) == 8 * kMiB);
  CHECK(pqblk_resize(disk, kMiB, nullptr) == PQBLK_INVALID_ARGUMENT);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);

  pqblk_image_info info = PQBLK_IMAGE_INFO_INIT;
  REQUIRE(pqblk_inspect(file.path().c_str(), PQBLK_SEALED, &info, nullptr) == PQBLK_OK);
  CHECK(info.disk_bytes == 8 * kMiB);
  CHECK((info.flags & PQBLK_IMAGE_CLEAN) != 0);
  CHECK((info.flags & PQBLK_IMAGE_IN_USE) == 0);
  CHECK(info.volume_uuid[15] == kUuidFill);
  CHECK(pqblk_inspect("/tmp/pqblk-nothing", PQBLK_RAW, &info, nullptr) == PQBLK_NOT_FOUND);
  CHECK(pqblk_inspect(file.path().c_str(), 0, &info, nullptr) == PQBLK_INVALID_ARGUMENT);
}

TEST_CASE("a backing file opens only through the caller's gate") {
  const DiskFile base(PQBLK_RAW, kMiB);
  const std::string path = base.path() + "-top";
  const std::string make = "qemu-img create -q -f qcow2 -F raw -b " + base.path() + " " + path;
  REQUIRE(std::system(make.c_str()) == 0);
  const int fd = ::open(base.path().c_str(), O_WRONLY | O_CLOEXEC);
  REQUIRE(::pwrite(fd, "below", 5, 0) == 5);
  ::close(fd);
  pqblk_error error = PQBLK_ERROR_INIT;
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  options.path = path.c_str();
  options.format = PQBLK_QCOW2;
  CHECK(base.try_open(options, error) == PQBLK_GATE_REFUSED);
  struct Asked {
    int count, answer;
    std::string path;
  } asked{0, 0, {}};
  options.gate_context = &asked;
  options.gate = [](void* context, const char* wanted) {
    auto& a = *static_cast<Asked*>(context);
    ++a.count;
    a.path = wanted;
    return a.answer;
  };
  CHECK(base.try_open(options, error) == PQBLK_GATE_REFUSED);
  asked.answer = 1;
  pqblk_disk* disk = nullptr;
  REQUIRE(pqblk_open(&options, &disk, &error) == PQBLK_OK);
  CHECK(asked.count == 2);
  CHECK(asked.path == base.path());
  char text[5];
  CHECK(pqblk_pread(disk, text, 5, 0, nullptr) == PQBLK_OK);
  CHECK(std::memcmp(text, "below", 5) == 0);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
  ::unlink(path.c_str());
}

TEST_CASE("structs of older and newer programs are understood or refused") {
  const DiskFile file(PQBLK_RAW, kMiB);
  pqblk_error error = PQBLK_ERROR_INIT;
  SUBCASE("an older program's options end earlier; the rest is the default, whatever follows") {
    pqblk_open_options options = options_for(file);
    options.cache = 77;
    options.size = offsetof(pqblk_open_options, flags);
    CHECK(file.try_open(options, error) == PQBLK_OK);
    options.size = offsetof(pqblk_open_options, flags) - 1;
    CHECK(file.try_open(options, error) == PQBLK_INVALID_ARGUMENT);
    options.size = 0;
    CHECK(file.try_open(options, error) == PQBLK_INVALID_ARGUMENT);
  }
  SUBCASE("a newer program's options may say nothing that is not known") {
    Grown<pqblk_open_options> options{options_for(file), {0, 0}};
    options.known.size = sizeof options;
    CHECK(file.try_open(options.known, error) == PQBLK_OK);
    options.later[1] = 1;
    CHECK(file.try_open(options.known, error) == PQBLK_UNSUPPORTED);
  }
  SUBCASE("what is filled keeps to its size") {
    pqblk_disk* disk = file.open();
    Grown<pqblk_facts> facts{PQBLK_FACTS_INIT, {7, 7}};
    facts.known.size = sizeof facts;
    CHECK(pqblk_get_facts(disk, &facts.known, nullptr) == PQBLK_OK);
    CHECK(facts.known.size == sizeof facts);
    CHECK(facts.known.disk_bytes == kMiB);
    CHECK(facts.later[0] == 0);
    CHECK(facts.later[1] == 0);
    pqblk_facts old;
    std::memset(&old, 0x55, sizeof old);
    old.size = offsetof(pqblk_facts, cluster_bytes);
    CHECK(pqblk_get_facts(disk, &old, nullptr) == PQBLK_OK);
    CHECK(old.disk_bytes == kMiB);
    CHECK(old.cluster_bytes == 0x55555555);
    old.size = 3;
    CHECK(pqblk_get_facts(disk, &old, nullptr) == PQBLK_INVALID_ARGUMENT);
    CHECK(pqblk_get_facts(disk, nullptr, nullptr) == PQBLK_INVALID_ARGUMENT);
    CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
  }
  SUBCASE("an error that has no room for the text has the kind, and its text always ends") {
    pqblk_error small;
    std::memset(&small, 0x55, sizeof small);
    small.size = 8;
    CHECK(pqblk_inspect("/tmp/pqblk-nothing", PQBLK_RAW, nullptr, &small) == PQBLK_NOT_FOUND);
    CHECK(small.kind == PQBLK_NOT_FOUND);
    CHECK(small.os_errno == 0x55555555);
    small.size = offsetof(pqblk_error, message) + 4;
    CHECK(pqblk_inspect("/tmp/pqblk-nothing", PQBLK_RAW, nullptr, &small) == PQBLK_NOT_FOUND);
    CHECK(small.os_errno == ENOENT);
    CHECK(std::string(small.message) == "/tm");
    CHECK(small.message[4] == 0x55);
    const std::string long_path =
        "/tmp/" + std::string(200, 'x') + "/" + std::string(200, 'y') + "/" + std::string(200, 'z');
    CHECK(pqblk_inspect(long_path.c_str(), PQBLK_RAW, nullptr, &error) != PQBLK_OK);
    CHECK(std::strlen(error.message) == sizeof error.message - 1);
  }
  SUBCASE("requests and completions may be larger, if they agree") {
    pqblk_disk* disk = file.open();
    pqblk_queue* queue = nullptr;
    REQUIRE(pqblk_queue_new(disk, 0, 4, &queue, nullptr) == PQBLK_OK);
    Grown<pqblk_request> batch[2] = {};
    for (auto& r : batch) {
      r.known = request(PQBLK_FLUSH, nullptr, 0, 9);
      r.known.size = sizeof r;
    }
    batch[1].later[0] = 1;
    CHECK(pqblk_submit(queue, &batch[0].known, 2) == 2);
    REQUIRE(readable(pqblk_queue_fd(queue), 60'000));
    Grown<pqblk_completion> done[4] = {};
    done[0].known.size = sizeof done[0];
    int kinds[2] = {-1, -1};
    for (int n = 0; n < 2;) {
      const int more = pqblk_poll(queue, &done[0].known, 4);
      for (int i = 0; i < more; ++i) kinds[n++] = done[i].known.kind;
    }
    CHECK(kinds[0] + kinds[1] == PQBLK_OK + PQBLK_UNSUPPORTED);
    batch[0].known.size = sizeof(pqblk_request) - 1;
    CHECK(pqblk_submit(queue, &batch[0].known, 1) == -PQBLK_INVALID_ARGUMENT);
    done[0].known.size = sizeof(pqblk_completion) - 1;
    CHECK(pqblk_poll(queue, &done[0].known, 1) == -PQBLK_INVALID_ARGUMENT);
    pqblk_queue_free(queue);
    CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
  }
}

TEST_CASE("kinds have names and errno values; nothing is done without a disk to put") {
  CHECK(pqblk_abi_version() == PQBLK_ABI_VERSION);
  CHECK(std::string(pqblk_version()) == PQBLK_VERSION);
  CHECK(std::string(pqblk_kind_name(PQBLK_OK)) == "ok");
  CHECK(std::string(pqblk_kind_name(PQBLK_NO_MEMORY)) == "no_memory");
  CHECK(std::string(pqblk_kind_name(PQBLK_NO_MEMORY + 1)) == "unknown");
  CHECK(std::string(pqblk_kind_name(-1)) == "unknown");
  CHECK(pqblk_kind_errno(PQBLK_OK) == 0);
  CHECK(pqblk_kind_errno(PQBLK_NO_SPACE) == ENOSPC);
  CHECK(pqblk_kind_errno(999) == EIO);
  CHECK(pqblk_open(nullptr, nullptr, nullptr) == PQBLK_INVALID_ARGUMENT);
  CHECK(pqblk_close(nullptr, nullptr) == PQBLK_OK);
}
