// Hands the keys of one volume to processes of the same user that ask on a Unix socket.
//
// Room export/. The conversation is docs/handing-keys.md; the agent knows keys as bytes to send and
// never opens a disk. One client at a time: an answer takes microseconds, and who asks nothing is
// sent away.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "sealed/keys.h"

namespace pqblk::exports {

struct KeyAgentOptions {
  std::string path;  // of the socket; mode 0600
  sealed::Uuid uuid{};
  sealed::VolumeKeys keys;
  std::uint32_t count = 1;       // releases
  std::uint32_t timeout_ms = 0;  // 0: none
};

class KeyAgent {
 public:
  static constexpr std::uint32_t kClientMs = 2000;  // for a client to say what it wants
  static constexpr std::uint32_t kLookMs = 100;     // between two calls of `go_on`

  // From here on clients can connect. Kinds of listening (exists, permission, invalid_argument).
  static Result<std::unique_ptr<KeyAgent>> listen(KeyAgentOptions options);
  ~KeyAgent();  // wipes the keys, removes the socket

  // Blocks until `count` releases were made (ok), the time is over or go_on() is false (canceled).
  // The keys are wiped and the socket is gone when it returns. Once only.
  Error serve(const std::function<bool()>& go_on);

  std::uint32_t released() const;  // any thread
  std::uint32_t refused() const;

 private:
  struct Impl;
  explicit KeyAgent(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace pqblk::exports
