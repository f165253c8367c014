#include "export/vhost_user_lab.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "image/disk_create.h"
#include "sealed/layout.h"

namespace pqblk::exports::test {
namespace {

sealed::VolumeKeys keys() {
  std::array<std::uint8_t, 32> bytes{};
  bytes.fill(7);
  sealed::VolumeKeys made;
  made.integrity = std::move(*crypto::SecretKey::copy_of(bytes));
  bytes.fill(9);
  made.data.push_back({1, std::move(*crypto::SecretKey::copy_of(bytes))});
  made.current_epoch = 1;
  return made;
}

void must(const Error& error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", error.to_string().c_str());
  std::abort();
}

}  // namespace

Place::Place(image::Format format, std::uint64_t size, const char* where) : format_(format) {
  std::string name = std::string(where) + "/pqblk-export-XXXXXX";
  if (::mkdtemp(name.data()) == nullptr) std::abort();
  directory_ = name;
  image::CreateSpec spec;
  spec.path = image();
  spec.format = format;
  spec.size = size;
  if (format == image::Format::sealed) {
    spec.keys = keys();
    spec.key_area.resize(sealed::kKeyAreaBytes);
  }
  must(image::create_disk(spec));
}

Place::~Place() {
  ::unlink(image().c_str());
  ::unlink(socket().c_str());
  ::rmdir(directory_.c_str());
}

Result<std::unique_ptr<image::Disk>> Place::open(std::uint32_t queues, bool read_only) const {
  image::OpenOptions options;
  options.path = image();
  options.format = format_;
  options.queues = queues;
  options.read_only = read_only;
  options.cache = image::Cache::writeback;
  if (format_ == image::Format::sealed) options.keys = keys();
  return image::Disk::open(std::move(options));
}

Served::Served(const Place& place, std::uint32_t queues, std::uint32_t rings, bool read_only) {
  auto disk = place.open(queues, read_only);
  if (!disk) must(disk.error());
  disk_ = std::move(*disk);
  VhostUserOptions options;
  options.path = place.socket();
  options.queues = rings;
  options.log = [this](const std::string& line) {
    std::lock_guard guard(inner_);
    said_.push_back(line);
  };
  auto server = VhostUserServer::start(*disk_, std::move(options));
  if (!server) must(server.error());
  server_ = std::move(*server);
}

Served::~Served() {
  server_.reset();
  must(disk_->close());
}

std::vector<std::string> Served::said() {
  std::lock_guard guard(inner_);
  return said_;
}

bool Served::was_said(const std::string& part) {
  for (const std::string& line : said()) {
    if (line.find(part) != std::string::npos) return true;
  }
  return false;
}

}  // namespace pqblk::exports::test
