// Ways in to a disk, as the soak's clients take them: NBD, vhost-user, the C library.
//
// Room test/soak. A way in carries one request of each place at a time and knows nothing of what is
// right. Room test.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pqblk::soak {

inline constexpr std::uint32_t kRequestMax = 1 << 20;

enum class Op : std::uint8_t { read, write, flush, discard, zeroes, count_ };

struct Request {
  Op op = Op::read;
  std::uint64_t offset = 0;
  std::uint32_t bytes = 0;
  bool fua = false, unmap = false;
};

struct Done {
  std::uint32_t place;
  int error;  // an errno; 0: it went well
};

class Transport {
 public:
  virtual ~Transport() = default;
  // Empty when requests can go. May be called again after `wait` lost the other end.
  virtual std::string connect() = 0;
  // Lets go of the other end; empty, or what went wrong. Nothing is on its way.
  virtual std::string disconnect() = 0;
  // Requests that were on their way when the other end was lost are answered after the next
  // connect(); otherwise nobody will ever know.
  virtual bool answers_later() const { return false; }
  virtual std::uint32_t offset_align() const { return kByte; }
  virtual bool fua() const { return true; }
  virtual std::uint8_t* data(std::uint32_t place) = 0;  // kRequestMax bytes
  virtual void submit(std::uint32_t place, const Request& request) = 0;
  virtual void kick() {}
  // Adds what completed, waiting up to `ms` for the first. False: the other end is lost.
  virtual bool wait(std::vector<Done>& done, int ms) = 0;

  static constexpr std::uint32_t kByte = 1, kBlock = 512;
};

// Each takes `words` as the command line has them:
//   nbd SOCKET [structured]
//   vhost SOCKET RINGS [packed] [indirect]
//   c DISK FORMAT QUEUES CACHE ENGINE AGENT-SOCKET|- [non-volatile] [backed] [l2CacheBytes=N]
//     [entryCacheBytes=N] [pendingDataBytes=N]    numbers of pqblk.h; `backed`: by whatever it
//     names
std::unique_ptr<Transport> make_nbd(const std::vector<std::string>& words, std::uint32_t places);
std::unique_ptr<Transport> make_vhost(const std::vector<std::string>& words, std::uint32_t places);
std::unique_ptr<Transport> make_c(const std::vector<std::string>& words, std::uint32_t places);

}  // namespace pqblk::soak
