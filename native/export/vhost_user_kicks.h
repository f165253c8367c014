// Wakes the queues' threads when a driver kicks: one thread waits for all kick descriptors.
//
// Room export/. A queue that is busy looks at its rings by itself and asks for no kicks; only one
// that sleeps comes this way, so the hop costs what a wake-up costs. It works with every I/O
// engine, and no descriptor that a front-end hands over can block a queue.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "export/vhost_user_protocol.h"
#include "image/disk.h"

namespace pqblk::exports {

inline constexpr int kPollEveryMs = 1;  // rings whose front-end has no kick descriptor

class KickThread {
 public:
  static Result<std::unique_ptr<KickThread>> start(image::Disk& disk);
  ~KickThread();

  // Wakes `queue` whenever `fd` (the caller's, until remove()) is signalled; without one, at
  // intervals. Returns what remove() takes. Error: what epoll says of the descriptor.
  Result<std::uint64_t> add(int fd, std::uint32_t queue);
  void remove(std::uint64_t token);

 private:
  struct Watch {
    int fd;
    std::uint32_t queue;
  };
  KickThread(image::Disk& disk, UniqueFd epoll, UniqueFd wake)
      : disk_(disk), epoll_(std::move(epoll)), wake_(std::move(wake)) {}
  void run();
  void wake();
  int timeout_ms();
  void kicked(std::uint64_t token);
  void poll_all();

  image::Disk& disk_;
  UniqueFd epoll_, wake_;
  std::atomic<bool> stopping_{false};
  std::mutex inner_;  // a watch and its descriptor live as long as it is in the map
  std::map<std::uint64_t, Watch> watches_;
  std::uint32_t polled_ = 0;
  std::uint64_t next_token_ = 1;
  std::thread thread_;
};

}  // namespace pqblk::exports
