#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>

#include "base/aligned.h"
#include "export/nbd_client.h"
#include "soak/transport.h"

namespace pqblk::soak {
namespace {

namespace nbd = exports::nbd;
using exports::test::Bytes;
using exports::test::NbdClient;

class NbdTransport final : public Transport {
 public:
  NbdTransport(std::string socket, bool structured, std::uint32_t places)
      : socket_(std::move(socket)), structured_(structured), requests_(places) {
    for (std::uint32_t i = 0; i < places; ++i) memory_.emplace_back(kRequestMax);
  }

  std::string connect() override {
    client_.reset();
    const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, socket_.c_str(), sizeof address.sun_path - 1);
    if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
      ::close(fd);
      return std::string("no connection: ") + std::strerror(errno);
    }
    client_.emplace(fd);
    if (client_->go(structured_, structured_)) return "";
    client_.reset();
    return "the handshake failed";
  }

  std::string disconnect() override {
    client_.reset();
    return "";
  }
  std::uint8_t* data(std::uint32_t place) override { return memory_[place].data(); }

  void submit(std::uint32_t place, const Request& r) override {
    if (!client_) return;
    requests_[place] = r;
    static constexpr nbd::Command kCommand[] = {nbd::Command::read, nbd::Command::write,
                                                nbd::Command::flush, nbd::Command::trim,
                                                nbd::Command::write_zeroes};
    const bool no_hole = r.op == Op::zeroes && !r.unmap;
    const auto flags =
        static_cast<std::uint16_t>((r.fua ? nbd::kFua : 0) | (no_hole ? nbd::kNoHole : 0));
    Bytes payload;
    if (r.op == Op::write) payload.assign(data(place), data(place) + r.bytes);
    client_->request(kCommand[static_cast<int>(r.op)], flags, place, r.offset, r.bytes, payload);
  }

  bool wait(std::vector<Done>& done, int ms) override {
    if (!client_) return false;
    pollfd p{client_->fd(), POLLIN, 0};
    while (::poll(&p, 1, done.empty() ? ms : 0) > 0) {
      if (!take(done)) {
        client_.reset();
        return false;
      }
    }
    return true;
  }

 private:
  // A simple reply does not say how long it is: its place does.
  bool take(std::vector<Done>& done) {
    std::uint8_t head[16];
    if (::recv(client_->fd(), head, sizeof head, MSG_PEEK | MSG_WAITALL) != sizeof head) {
      return false;
    }
    std::uint64_t place = 0;
    for (int i = 8; i < 16; ++i) place = place << 8U | head[i];
    if (place >= requests_.size()) return false;
    const Request& r = requests_[place];
    const auto reply = client_->reply(r.op == Op::read ? r.bytes : 0);
    if (!reply) return false;
    if (r.op == Op::read && reply->error == nbd::Errno::ok) {
      if (reply->data.size() != r.bytes) return false;
      std::memcpy(memory_[place].data(), reply->data.data(), r.bytes);
    }
    done.push_back({static_cast<std::uint32_t>(place), static_cast<int>(reply->error)});
    return true;
  }

  const std::string socket_;
  const bool structured_;
  std::optional<NbdClient> client_;
  std::vector<AlignedBuffer> memory_;
  std::vector<Request> requests_;
};

}  // namespace

std::unique_ptr<Transport> make_nbd(const std::vector<std::string>& words, std::uint32_t places) {
  return std::make_unique<NbdTransport>(words.at(1), words.size() > 2, places);
}

}  // namespace pqblk::soak
