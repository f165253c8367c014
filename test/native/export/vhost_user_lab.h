// Disks and servers for the tests of the vhost-user server.
//
// Room test/export.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "export/vhost_user.h"
#include "export/vhost_user_client.h"
#include "image/disk.h"

namespace pqblk::exports::test {

// A directory with a new disk and room for a socket; gone at the end.
class Place {
 public:
  Place(image::Format format, std::uint64_t size, const char* where = "/tmp");
  ~Place();
  Place(const Place&) = delete;
  Result<std::unique_ptr<image::Disk>> open(std::uint32_t queues, bool read_only = false) const;
  std::string socket() const { return directory_ + "/s"; }
  std::string image() const { return directory_ + "/disk"; }

 private:
  const image::Format format_;
  std::string directory_;
};

// A disk that is served.
class Served {
 public:
  Served(const Place& place, std::uint32_t queues, std::uint32_t rings = 0, bool read_only = false);
  ~Served();
  image::Disk& disk() { return *disk_; }
  VhostUserServer& server() { return *server_; }
  std::vector<std::string> said();
  bool was_said(const std::string& part);

 private:
  std::mutex inner_;
  std::vector<std::string> said_;
  std::unique_ptr<image::Disk> disk_;
  std::unique_ptr<VhostUserServer> server_;
};

// Small, fast, the same everywhere.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U + 1) {}
  std::uint64_t next() {
    state_ ^= state_ << 13U;
    state_ ^= state_ >> 7U;
    state_ ^= state_ << 17U;
    return state_;
  }
  std::uint32_t below(std::uint32_t n) { return static_cast<std::uint32_t>(next() >> 32U) % n; }

 private:
  std::uint64_t state_;
};

}  // namespace pqblk::exports::test
