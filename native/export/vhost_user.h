// The vhost-user-blk server: a disk as a virtio block device for QEMU and whoever else speaks the
// protocol (https://qemu.org/docs/master/interop/vhost-user.html, back-end side).
//
// Room export/: owns the socket, the threads and the one session there can be. The disk is the
// caller's, and is closed after the server has stopped.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "image/disk.h"

namespace pqblk::exports {

struct VhostUserOptions {
  std::string path;  // of the socket to make; a stale one is replaced, one in use is not
  // Or: an inherited socket that listens, or is connected to the front-end already. start() takes
  // over a Unix stream socket in any case; another descriptor, which may be anything of this
  // process, it leaves alone.
  int fd = -1;
  // Rings of the device, 1 .. kMaxQueues; 0: as many as the disk has queues. Ring i runs on the
  // disk's queue i modulo their number.
  std::uint32_t queues = 0;
  // Lines for people: what a front-end did wrong, why a request failed. From any thread.
  std::function<void(const std::string&)> log;
};

struct VhostUserStats {
  bool connected = false;                   // a front-end is there
  std::uint32_t rings = 0;                  // of the device
  std::uint32_t running = 0;                // of those, in use now
  std::uint64_t accepted = 0, refused = 0;  // front-ends
  std::uint64_t requests = 0, errors = 0;   // answered; of those, with an error
};

class VhostUserServer {
 public:
  // Listens when it returns. Errors: exists (something else is at the path, or somebody listens
  // there), invalid_argument, and what the system says.
  static Result<std::unique_ptr<VhostUserServer>> start(image::Disk& disk,
                                                        VhostUserOptions options);
  ~VhostUserServer();  // stops
  // Ends the session, waits for its requests, removes the socket. Blocking, idempotent; on no
  // thread of the disk.
  void stop();
  // The disk has grown: the front-end is told, and with it the guest. Any thread.
  void config_changed();
  // False once it serves nobody any more: stop() was called, or the inherited connection ended.
  bool serving() const;
  // Whether a front-end is connected now.
  bool connected() const;
  VhostUserStats stats() const;  // any thread

 private:
  struct Impl;
  explicit VhostUserServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace pqblk::exports
