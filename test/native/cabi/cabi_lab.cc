#include "cabi/cabi_lab.h"

#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <random>

#include "image/disk_create.h"

namespace pqblk::test {
namespace {

crypto::SecretKey key_of(std::uint8_t fill) {
  std::array<std::uint8_t, 32> bytes;
  bytes.fill(fill);
  return std::move(*crypto::SecretKey::copy_of(bytes));
}

sealed::VolumeKeys engine_keys() {
  sealed::VolumeKeys keys;
  keys.integrity = key_of(0x11);
  keys.data.push_back({1, key_of(0x12)});
  keys.current_epoch = 1;
  return keys;
}

sealed::Uuid engine_uuid() {
  sealed::Uuid uuid;
  uuid.fill(kUuidFill);
  return uuid;
}

image::Format engine_format(std::uint32_t format) {
  if (format == PQBLK_RAW) return image::Format::raw;
  return format == PQBLK_QCOW2 ? image::Format::qcow2 : image::Format::sealed;
}

}  // namespace

// As engine_keys(), through the C interface.
pqblk_keys* make_keys(std::uint8_t fill, std::uint8_t uuid_fill) {
  std::array<std::uint8_t, 16> uuid;
  uuid.fill(uuid_fill);
  std::array<std::uint8_t, 32> integrity;
  integrity.fill(fill);
  pqblk_data_key data{sizeof data, 1, {}};
  std::fill(std::begin(data.key), std::end(data.key), static_cast<std::uint8_t>(fill + 1));
  pqblk_keys* keys = nullptr;
  REQUIRE(pqblk_keys_new(uuid.data(), integrity.data(), &data, 1, 1, &keys, nullptr) == PQBLK_OK);
  return keys;
}

DiskFile::DiskFile(std::uint32_t format, std::uint64_t size) : format_(format) {
  static std::atomic<int> number{0};
  path_ = "/tmp/pqblk-cabi-" + std::to_string(::getpid()) + "-" + std::to_string(number++);
  image::CreateSpec spec;
  spec.path = path_;
  spec.format = engine_format(format);
  spec.size = size;
  if (format == PQBLK_SEALED) {
    spec.uuid = engine_uuid();
    spec.key_area.assign(sealed::kKeyAreaBytes, 0x5a);
    spec.keys = engine_keys();
  }
  const Error error = image::create_disk(spec);
  REQUIRE_MESSAGE(error.ok(), error.to_string());
}

DiskFile::~DiskFile() { ::unlink(path_.c_str()); }

int DiskFile::try_open(const pqblk_open_options& options, pqblk_error& error) const {
  pqblk_disk* disk = nullptr;
  const int kind = pqblk_open(&options, &disk, &error);
  CHECK((disk == nullptr) == (kind != PQBLK_OK));
  CHECK(error.kind == kind);
  CHECK(pqblk_close(disk, nullptr) == PQBLK_OK);
  return kind;
}

pqblk_disk* DiskFile::open(std::uint32_t queues, std::uint32_t flags) const {
  pqblk_error error = PQBLK_ERROR_INIT;
  pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
  options.path = path_.c_str();
  options.format = format_;
  options.queues = queues;
  options.flags = flags;
  pqblk_keys* keys = format_ == PQBLK_SEALED ? make_keys() : nullptr;
  options.keys = keys;
  pqblk_disk* disk = nullptr;
  const int kind = pqblk_open(&options, &disk, &error);
  pqblk_keys_free(keys);
  REQUIRE_MESSAGE(kind == PQBLK_OK, error.message);
  return disk;
}

std::vector<std::uint8_t> DiskFile::content() const {
  image::OpenOptions options;
  options.path = path_;
  options.format = engine_format(format_);
  options.read_only = true;
  if (format_ == PQBLK_SEALED) {
    options.keys = engine_keys();
    options.expected_uuid = engine_uuid();
  }
  auto disk = image::Disk::open(std::move(options));
  REQUIRE_MESSAGE(static_cast<bool>(disk), disk.error().to_string());
  std::vector<std::uint8_t> bytes((*disk)->size());
  const iovec iov{bytes.data(), bytes.size()};
  std::atomic<bool> done{false};
  image::Request request;
  request.length = bytes.size();
  request.iov = &iov;
  request.iov_count = 1;
  request.context = &done;
  request.complete = [](image::Request& r) {
    static_cast<std::atomic<bool>*>(r.context)->store(true, std::memory_order_release);
  };
  (*disk)->submit(0, &request);
  while (!done.load(std::memory_order_acquire)) ::usleep(100);
  REQUIRE(request.status == image::Status::ok);
  REQUIRE((*disk)->close().ok());
  return bytes;
}

std::string format_name(std::uint32_t format) {
  if (format == PQBLK_RAW) return "raw";
  return format == PQBLK_QCOW2 ? "qcow2" : "sealed";
}

std::vector<std::uint8_t> noise(std::uint64_t size, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> bytes(size);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

pqblk_request request(std::uint32_t type, const iovec* iov, std::uint64_t offset,
                      std::uint64_t cookie) {
  pqblk_request r = PQBLK_REQUEST_INIT;
  r.type = type;
  r.iov = iov;
  r.iov_count = iov == nullptr ? 0 : 1;
  r.offset = offset;
  r.cookie = cookie;
  return r;
}

bool readable(int fd, int timeout_ms) {
  pollfd wait{fd, POLLIN, 0};
  return ::poll(&wait, 1, timeout_ms) == 1;
}

std::vector<pqblk_completion> fetch(pqblk_queue* queue, std::size_t count) {
  std::vector<pqblk_completion> all;
  while (all.size() < count) {
    REQUIRE(readable(pqblk_queue_fd(queue), 60'000));
    std::array<pqblk_completion, 7> some{};
    some[0].size = sizeof(pqblk_completion);
    const int n = pqblk_poll(queue, some.data(), some.size());
    REQUIRE(n >= 0);
    all.insert(all.end(), some.begin(), some.begin() + n);
  }
  CHECK(all.size() == count);
  return all;
}

}  // namespace pqblk::test
