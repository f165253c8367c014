#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "export/vhost_user_client.h"
#include "soak/transport.h"

namespace pqblk::soak {
namespace {

namespace vu = exports::test;

// Place p is slot p / rings of ring p % rings.
class VhostTransport final : public Transport {
 public:
  VhostTransport(std::string socket, vu::FrontEndOptions options)
      : socket_(std::move(socket)), rings_(options.rings), guest_(options) {}

  std::string connect() override {
    const std::string why = guest_.connect(socket_);
    if (!why.empty()) guest_.disconnect();
    connected_ = why.empty();
    return why;
  }
  std::string disconnect() override {
    std::string why = connected_ ? guest_.stop_rings() : "";
    guest_.disconnect();
    connected_ = false;
    return why;
  }
  bool answers_later() const override { return true; }
  std::uint32_t offset_align() const override { return kBlock; }
  bool fua() const override { return false; }
  std::uint8_t* data(std::uint32_t place) override {
    return guest_.data(place % rings_, place / rings_);
  }

  void submit(std::uint32_t place, const Request& r) override {
    static constexpr std::uint32_t kType[] = {0, 1, 4, 11, 13};
    const std::uint32_t type = kType[static_cast<int>(r.op)];
    const std::uint32_t ring = place % rings_, slot = place / rings_;
    if (r.op == Op::discard || r.op == Op::zeroes) {
      const struct {
        std::uint64_t sector;
        std::uint32_t sectors, flags;
      } segment{r.offset / kBlock, r.bytes / kBlock, r.op == Op::zeroes && r.unmap ? 1U : 0U};
      std::memcpy(data(place), &segment, sizeof segment);
      guest_.add(ring, slot, type, 0, sizeof segment);
    } else {
      guest_.add(ring, slot, type, r.op == Op::flush ? 0 : r.offset / kBlock, r.bytes,
                 1 + static_cast<std::uint32_t>(r.offset / kBlock % 3));
    }
  }
  void kick() override {
    for (std::uint32_t r = 0; r < rings_; ++r) guest_.kick(r);
  }

  bool wait(std::vector<Done>& done, int ms) override {
    if (!connected_) return false;
    take(done);
    if (!done.empty()) return true;
    bool ready = false;
    for (std::uint32_t r = 0; r < rings_; ++r) ready |= guest_.ring(r).ask_for_calls();
    std::vector<pollfd> fds{{guest_.connection().fd(), POLLIN, 0}};
    for (std::uint32_t r = 0; r < rings_; ++r) fds.push_back({guest_.call_fd(r), POLLIN, 0});
    ::poll(fds.data(), fds.size(), ready ? 0 : ms);
    for (std::uint32_t r = 0; r < rings_; ++r) {
      std::uint64_t count = 0;
      [[maybe_unused]] const ssize_t n = ::read(guest_.call_fd(r), &count, sizeof count);
    }
    take(done);
    if ((fds[0].revents & (POLLIN | POLLHUP | POLLERR)) == 0) return true;
    guest_.disconnect();  // the server says nothing unasked: it is gone
    return connected_ = false;
  }

 private:
  void take(std::vector<Done>& done) {
    for (std::uint32_t r = 0; r < rings_; ++r) {
      while (const auto answer = guest_.poll(r)) {
        done.push_back({answer->slot * rings_ + r, answer->status == 0 ? 0 : EIO});
      }
      if (guest_.ring(r).complaints != 0) done.push_back({0, EPROTO});
    }
  }

  const std::string socket_;
  const std::uint32_t rings_;
  vu::FrontEnd guest_;
  bool connected_ = false;
};

}  // namespace

std::unique_ptr<Transport> make_vhost(const std::vector<std::string>& words, std::uint32_t places) {
  const auto has = [&](const char* word) {
    return std::find(words.begin(), words.end(), word) != words.end();
  };
  vu::FrontEndOptions options;
  options.rings = static_cast<std::uint32_t>(std::stoul(words.at(2)));
  options.depth = places / options.rings;
  options.slot_bytes = kRequestMax;
  options.inflight = true;
  options.ring.packed = has("packed");
  options.ring.indirect = has("indirect");
  options.ring.size = 256;
  return std::make_unique<VhostTransport>(words.at(1), options);
}

}  // namespace pqblk::soak
