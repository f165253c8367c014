// Listening sockets of the NBD server.
//
// Room export/, private to it.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "base/error.h"

namespace pqblk::exports::nbd {

// A listening socket, non-blocking; its Unix socket file is removed with it.
class Listener {
 public:
  // A socket file that no server answers on is replaced. Mode 0600. Kind::exists when one answers
  // or the file is something else.
  static Result<Listener> on_unix(const std::string& path);
  static Result<Listener> on_tcp(const std::string& host, std::uint16_t port);
  Listener(Listener&& other) noexcept;
  Listener& operator=(Listener&&) = delete;
  ~Listener();

  int fd() const { return fd_; }
  std::uint16_t port() const;  // TCP

 private:
  explicit Listener(int fd) : fd_(fd) {}

  int fd_;
  std::string path_;  // Unix: what to remove, if it is still ours
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

}  // namespace pqblk::exports::nbd
