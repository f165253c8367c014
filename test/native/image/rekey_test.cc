// Rotation of the data key on a disk that is in use: guests write and read with a model beside them
// while every sector moves to the new epoch, and the old key opens nothing afterwards.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#include "effort.h"
#include "image/disk.h"
#include "image/disk_check.h"
#include "image/disk_create.h"
#include "image/disk_harness.h"
#include "image/disk_info.h"
#include "sealed/layout.h"
#include "sealed/sealed_subject.h"

using namespace pqblk;         // NOLINT
using namespace pqblk::image;  // NOLINT

namespace {

constexpr std::uint64_t kSize = 24 * kMiB;

sealed::VolumeKeys keys_of(std::initializer_list<std::uint32_t> epochs, std::uint32_t current) {
  sealed::VolumeKeys keys = pqblk::test::test_keys();
  keys.data.clear();
  for (const std::uint32_t epoch : epochs) keys.data.push_back(pqblk::test::test_data_key(epoch));
  keys.current_epoch = current;
  return keys;
}

class SealedDisk {
 public:
  SealedDisk() : file_(0) {
    CreateSpec spec;
    spec.path = file_.path();
    spec.overwrite = true;
    spec.format = Format::sealed;
    spec.size = kSize;
    spec.uuid = pqblk::test::test_uuid();
    spec.log_bytes = 8 * kMiB;
    spec.keys = keys_of({1}, 1);
    spec.key_area.assign(sealed::kKeyAreaBytes, 1);
    REQUIRE_FALSE(create_disk(spec));
  }
  std::unique_ptr<Disk> open(sealed::VolumeKeys keys, std::uint32_t queues = 2) {
    auto opened = try_open(std::move(keys), {.queues = queues});
    REQUIRE_MESSAGE(opened, opened.error().to_string());
    return std::move(*opened);
  }
  Result<std::unique_ptr<Disk>> try_open(sealed::VolumeKeys keys, OpenOptions options) {
    options.path = file_.path();
    options.format = Format::sealed;
    options.cache = Cache::writeback;
    options.keys = std::move(keys);
    options.expected_uuid = pqblk::test::test_uuid();
    return Disk::open(std::move(options));
  }
  DiskInfo info() {
    auto found = read_disk_info(file_.path(), Format::sealed);
    REQUIRE(found);
    return std::move(*found);
  }
  // The other copy of the key area full of `mark`.
  sealed::KeyAreaChange next_area(std::uint8_t mark) {
    const sealed::KeyArea area = info().sealed->key_area;
    return {std::vector<std::uint8_t>(sealed::kKeyAreaBytes, mark), 1, area[1].number + 1,
            sealed::state_of(area)};
  }
  std::vector<std::uint8_t> state() { return sealed::state_of(info().sealed->key_area); }
  const std::string& path() const { return file_.path(); }

 private:
  image::test::TempFile file_;
};

Error transfer(Disk& disk, std::uint32_t queue, RequestType type, std::uint64_t at,
               std::vector<std::uint8_t>& data) {
  image::test::Batch batch;
  Request& request = batch.add(type, at, data);
  disk.submit(queue, batch.list(0, 1));
  batch.wait();
  return request.error;
}

// One bit of the last block of the file that is not all zeros: a ciphertext, in an image that was
// only written forward.
void flip_last_bit(const std::string& path) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(0, std::ios::end);
  std::vector<char> block(4096);
  for (std::streamoff at = align_down<std::int64_t>(file.tellg(), 4096) - 4096; at > 0;
       at -= 4096) {
    file.seekg(at);
    file.read(block.data(), 4096);
    if (std::all_of(block.begin(), block.end(), [](char c) { return c == 0; })) continue;
    block[100] = static_cast<char>(block[100] ^ 1);
    file.seekp(at);
    file.write(block.data(), 4096);
    return;
  }
  FAIL("nothing was written");
}

// Writes and reads its own half of the disk, and remembers what each block of 4 KiB must hold.
class Guest {
 public:
  Guest(Disk& disk, std::uint32_t number, std::uint32_t of)
      : disk_(disk),
        number_(number),
        first_(kSize / 4096 / of * number),
        holds_(kSize / 4096 / of),
        random_(number + 1) {}

  void fill() {
    for (std::uint64_t block = 0; block < holds_.size(); block += 16) {
      if (block / 16 % 8 == 7) continue;  // some of the disk stays empty
      write(block, 16);
    }
  }
  void work(const std::atomic<bool>& stop) {
    while (!stop.load(std::memory_order_relaxed)) {
      const std::uint64_t count = random_() % 4 == 0 ? 1 + random_() % 16 : 1;
      const std::uint64_t block = random_() % (holds_.size() - count);
      if (random_() % 2 == 0) {
        write(block, count);
      } else {
        CHECK(right(disk_, block, count));
      }
    }
  }
  bool all_right(Disk& disk) {
    for (std::uint64_t block = 0; block < holds_.size(); block += 16) {
      if (!right(disk, block, 16)) return false;
    }
    return true;
  }

 private:
  void write(std::uint64_t block, std::uint64_t count) {
    const auto value = static_cast<std::uint8_t>(1 + random_() % 255);
    std::vector<std::uint8_t> data(count * 4096, value);
    REQUIRE_FALSE(transfer(disk_, number_, RequestType::out, (first_ + block) * 4096, data));
    std::fill_n(holds_.begin() + static_cast<std::ptrdiff_t>(block), count, value);
  }
  bool right(Disk& disk, std::uint64_t block, std::uint64_t count) {
    std::vector<std::uint8_t> data(count * 4096);
    if (transfer(disk, number_, RequestType::in, (first_ + block) * 4096, data)) return false;
    for (std::uint64_t i = 0; i < data.size(); ++i) {
      if (data[i] != holds_[block + i / 4096]) return false;
    }
    return true;
  }
  Disk& disk_;
  const std::uint32_t number_;
  const std::uint64_t first_;
  std::vector<std::uint8_t> holds_;
  std::mt19937_64 random_;
};

}  // namespace

TEST_CASE("the data key rotates under guests that write, and the old key is forgotten") {
  SealedDisk sealed;
  std::unique_ptr<Disk> disk = sealed.open(keys_of({1}, 1));
  std::vector<Guest> guests{{*disk, 0, 2}, {*disk, 1, 2}};
  for (Guest& guest : guests) guest.fill();

  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (Guest& guest : guests) threads.emplace_back([&] { guest.work(stop); });
  CHECK_FALSE(disk->change_key_area(sealed.next_area(2)));
  CHECK_FALSE(disk->begin_epoch(pqblk::test::test_data_key(2), sealed.state()));

  // Not before everything was rewritten, and known to be.
  CHECK(disk->finish_epoch().kind() == Kind::invalid_argument);
  RekeySpec part;
  part.bytes_per_second = 64 * kMiB;  // in small groups, to stop between them
  part.progress = [](std::uint64_t done, std::uint64_t) { return done < kSize / 2; };
  auto first = disk->rekey(part);
  REQUIRE(first);
  CHECK_FALSE(first->complete);
  CHECK(first->sectors > 0);
  auto second = disk->rekey({.from = first->reached});
  REQUIRE(second);
  CHECK(second->complete);
  CHECK(disk->finish_epoch().kind() == Kind::invalid_argument);
  auto verified = disk->rekey({.verify = true});
  REQUIRE(verified);
  CHECK(verified->sectors == 0);
  CHECK_FALSE(disk->finish_epoch());
  sealed::KeyAreaChange stale = sealed.next_area(3);
  stale.expected[40] ^= 1;
  CHECK(disk->change_key_area(stale).kind() == Kind::locked);  // somebody else's is not lost
  CHECK_FALSE(disk->change_key_area(sealed.next_area(3)));
  stop = true;
  for (std::thread& thread : threads) thread.join();
  for (Guest& guest : guests) CHECK(guest.all_right(*disk));
  REQUIRE_FALSE(disk->close());
  CHECK(sealed.info().sealed->sessions == 1);
  const sealed::KeyArea area = sealed.info().sealed->key_area;
  CHECK(area[0].blob == std::vector<std::uint8_t>(sealed::kKeyAreaBytes, 1));
  CHECK(area[1].blob == std::vector<std::uint8_t>(sealed::kKeyAreaBytes, 3));

  // With the new key alone everything is there, and nothing is wrong with the image.
  disk = sealed.open(keys_of({2}, 2));
  for (Guest& guest : guests) CHECK(guest.all_right(*disk));
  REQUIRE_FALSE(disk->close());
  CheckSpec check;
  check.path = sealed.path();
  check.format = Format::sealed;
  check.keys = keys_of({2}, 2);
  check.expected_uuid = pqblk::test::test_uuid();
  auto checked = check_disk(std::move(check));
  REQUIRE(checked);
  CHECK_MESSAGE(checked->clean(), checked->corruptions << " " << checked->leaks);

  // And with the old key alone, nothing.
  OpenOptions old;
  old.path = sealed.path();
  old.format = Format::sealed;
  old.keys = keys_of({1}, 1);
  old.expected_uuid = pqblk::test::test_uuid();
  CHECK_FALSE(Disk::open(std::move(old)));
}

TEST_CASE("an epoch is not begun with a key of a key area that is there no more") {
  SealedDisk sealed;
  std::unique_ptr<Disk> disk = sealed.open(keys_of({1}, 1), 1);
  const std::vector<std::uint8_t> read = sealed.state();
  REQUIRE_FALSE(disk->change_key_area(sealed.next_area(2)));
  CHECK(disk->begin_epoch(pqblk::test::test_data_key(2), read).kind() == Kind::locked);
  CHECK(disk->begin_epoch(pqblk::test::test_data_key(2), {}).kind() == Kind::locked);
  std::vector<std::uint8_t> data(kMiB, 5);
  REQUIRE_FALSE(transfer(*disk, 0, RequestType::out, 0, data));
  REQUIRE_FALSE(disk->close());
  disk = sealed.open(keys_of({1}, 1), 1);  // nothing is of the other epoch
  REQUIRE_FALSE(transfer(*disk, 0, RequestType::in, 0, data));
  CHECK_FALSE(disk->begin_epoch(pqblk::test::test_data_key(2), sealed.state()));
  REQUIRE_FALSE(disk->close());
}

// Bytes of the file from its beginning on; it has the header and its extension.
std::vector<char> header_of(const std::string& path) {
  std::vector<char> bytes(sealed::kHeaderMacBytes);
  std::ifstream(path, std::ios::binary).read(bytes.data(), sealed::kHeaderMacBytes);
  return bytes;
}

void put_back(const std::string& path, const std::vector<char>& header) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
}

void grow_and_rotate(std::uint64_t grown_at, std::uint64_t reaches) {
  SealedDisk sealed;
  std::unique_ptr<Disk> disk = sealed.open(keys_of({1}, 1), 1);
  REQUIRE_FALSE(disk->resize(grown_at));
  REQUIRE_FALSE(disk->close());
  const std::vector<char> before = header_of(sealed.path());
  disk = sealed.open(keys_of({1}, 1), 1);
  REQUIRE_FALSE(disk->resize(2 * kSize));
  std::vector<std::uint8_t> data(4096, 5);
  REQUIRE_FALSE(transfer(*disk, 0, RequestType::out, reaches - 4096, data));
  REQUIRE_FALSE(transfer(*disk, 0, RequestType::out, kMiB, data));
  REQUIRE_FALSE(disk->close());

  put_back(sealed.path(), before);
  CHECK(sealed.try_open(keys_of({1}, 1), {}).error().kind() == Kind::corrupt);
  auto looked = sealed.try_open(keys_of({1}, 1), {.read_only = true});
  REQUIRE(looked);
  CHECK((*looked)->size() == grown_at);
  CHECK((*looked)->require_within_size().kind() == Kind::corrupt);
  REQUIRE_FALSE((*looked)->close());

  auto to_resize = sealed.try_open(keys_of({1}, 1), {.to_resize = true});
  REQUIRE(to_resize);
  disk = std::move(*to_resize);
  CHECK(disk->begin_epoch(pqblk::test::test_data_key(2), sealed.state()).kind() == Kind::corrupt);
  // A pass comes to nothing of another epoch, and yet what it does not come to needs its key.
  auto verified = disk->rekey({.verify = true});
  REQUIRE(verified);
  REQUIRE(verified->sectors == 0);
  CHECK(disk->finish_epoch().kind() == Kind::corrupt);
  for (const RequestType type : {RequestType::out, RequestType::discard, RequestType::write_zeroes})
    CHECK(transfer(*disk, 0, type, 2 * kMiB, data).kind() == Kind::corrupt);
  CHECK(disk->resize(reaches - 4096).kind() == Kind::corrupt);
  CHECK(disk->size() == grown_at);
  REQUIRE_FALSE(disk->resize(reaches));
  CHECK_FALSE(transfer(*disk, 0, RequestType::out, 2 * kMiB, data));
  REQUIRE_FALSE(disk->close());

  disk = sealed.open(keys_of({1, 2}, 2), 1);
  REQUIRE(disk->rekey({}));
  REQUIRE(disk->rekey({.verify = true}));
  CHECK_FALSE(disk->finish_epoch());
  REQUIRE_FALSE(disk->close());
  disk = sealed.open(keys_of({2}, 2), 1);
  std::vector<std::uint8_t> found(4096);
  CHECK_FALSE(transfer(*disk, 0, RequestType::in, reaches - 4096, found));
  CHECK(found == data);
  REQUIRE_FALSE(disk->close());
}

TEST_CASE("no write and no rotation while there is data beyond the size that the header has") {
  SUBCASE("in other clusters") { grow_and_rotate(kSize, kSize + 9 * kMiB); }
  SUBCASE("in the last cluster, part of which is the disk's") {
    grow_and_rotate(kSize + 4096, kSize + 8192);
  }
}

TEST_CASE("going back is not in the way of a damaged sector that has never left") {
  SealedDisk sealed;
  std::unique_ptr<Disk> disk = sealed.open(keys_of({1}, 1), 1);
  std::vector<std::uint8_t> data(kMiB, 5);
  REQUIRE_FALSE(transfer(*disk, 0, RequestType::out, 0, data));
  REQUIRE_FALSE(disk->close());
  flip_last_bit(sealed.path());
  disk = sealed.open(keys_of({1, 2}, 2), 1);
  auto forward = disk->rekey({});
  REQUIRE(forward);
  REQUIRE(forward->damaged == 1);
  REQUIRE_FALSE(disk->begin_epoch(pqblk::test::test_data_key(1), sealed.state()));
  auto back = disk->rekey({});
  REQUIRE(back);
  CHECK(back->damaged == 0);
  CHECK(back->sectors == kMiB / 4096 - 1);
  auto verified = disk->rekey({.verify = true});
  REQUIRE(verified);
  CHECK(verified->sectors == 0);
  CHECK_FALSE(disk->finish_epoch());
  REQUIRE_FALSE(disk->close());
}

TEST_CASE("a rotation keeps to its limits, and names what it cannot read") {
  SealedDisk sealed;
  std::unique_ptr<Disk> disk = sealed.open(keys_of({1}, 1), 1);
  std::vector<std::uint8_t> data(kMiB, 5);
  for (std::uint64_t at = 0; at < 4 * kMiB; at += kMiB) {
    REQUIRE_FALSE(transfer(*disk, 0, RequestType::out, at, data));
  }
  REQUIRE_FALSE(disk->close());
  flip_last_bit(sealed.path());
  disk = sealed.open(keys_of({1, 2}, 2), 1);
  const auto started = std::chrono::steady_clock::now();
  auto report = disk->rekey({.bytes_per_second = 8 * kMiB});
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
  REQUIRE(report);
  CHECK(report->sectors == 4 * kMiB / 4096 - 1);
  REQUIRE(report->damaged == 1);
  CHECK(took.count() > 0.35);
  auto verified = disk->rekey({.verify = true});
  REQUIRE(verified);
  CHECK(verified->sectors == 1);
  CHECK(disk->finish_epoch().kind() == Kind::invalid_argument);

  // The guest writes over it, and the rotation can end.
  std::vector<std::uint8_t> block(4096, 6);
  REQUIRE_FALSE(transfer(*disk, 0, RequestType::out, report->damaged_sectors[0] * 4096, block));
  REQUIRE(disk->rekey({.verify = true}));
  CHECK_FALSE(disk->finish_epoch());
  CHECK(disk->rekey({.share = 0}).error().kind() == Kind::invalid_argument);
  REQUIRE_FALSE(disk->close());
}
