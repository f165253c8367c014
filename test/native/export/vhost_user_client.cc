#include "export/vhost_user_client.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "export/virtqueue.h"

namespace pqblk::exports::test {
namespace {

constexpr int kReplyWaitMs = 60'000;
// Header at 0, status at 24; a cache line, as a guest's request has it.
constexpr std::uint32_t kSlotArea = 64;
constexpr std::uint32_t kPage = 4096;
constexpr std::uint32_t kConfigBytes = 60;  // of a block device

void poke(int fd) {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t r = ::write(fd, &one, sizeof one);
}

}  // namespace

// ---- GuestRam ----

GuestRam::GuestRam(std::uint64_t bytes)
    : fd_(::memfd_create("guest-ram", MFD_CLOEXEC)),
      bytes_((bytes + 2 * kPage - 1) / (2 * kPage) * (2 * kPage)) {
  if (::ftruncate(fd_.get(), static_cast<off_t>(bytes_)) != 0) std::abort();
  void* data = ::mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) std::abort();
  data_ = static_cast<std::uint8_t*>(data);
  // The second half of the guest's memory is the first half of the file.
  const std::uint64_t half = bytes_ / 2;
  for (const std::uint64_t at : {std::uint64_t{0}, half}) {
    void* piece = ::mmap(data_ + at, half, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                         fd_.get(), static_cast<off_t>(half - at));
    if (piece == MAP_FAILED) std::abort();
  }
}

GuestRam::~GuestRam() { ::munmap(data_, bytes_); }

std::uint64_t GuestRam::allocate(std::uint64_t bytes, std::uint64_t align) {
  next_ = (next_ + align - 1) / align * align;
  // Rings and tables lie in one piece: not across the border of the regions.
  const std::uint64_t border = kGuestBase + bytes_ / 2;
  if (bytes < 64 * kPage && next_ < border && next_ + bytes > border) next_ = border;
  const std::uint64_t at = next_;
  next_ += bytes;
  if (next_ > end()) std::abort();
  return at;
}

std::vector<vu::MemoryRegion> GuestRam::regions() const {
  const std::uint64_t half = bytes_ / 2;
  return {{kGuestBase, half, kUserBase, half}, {kGuestBase + half, half, kUserBase + half, 0}};
}

// ---- Connection ----

Connection::Connection(const std::string& path) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    fd_ = std::move(fd);
  }
}

bool Connection::send(vu::Type type, const void* payload, std::size_t bytes,
                      const std::vector<int>& fds, std::uint32_t flags) {
  vu::Header header{static_cast<std::uint32_t>(type), vu::kVersion | flags,
                    static_cast<std::uint32_t>(bytes)};
  iovec v[2] = {{&header, sizeof header}, {const_cast<void*>(payload), bytes}};
  msghdr m{};
  m.msg_iov = v;
  m.msg_iovlen = bytes != 0 ? 2 : 1;
  std::vector<char> control(CMSG_SPACE(sizeof(int) * fds.size()));
  if (!fds.empty()) {
    m.msg_control = control.data();
    m.msg_controllen = control.size();
    cmsghdr* c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(c), fds.data(), sizeof(int) * fds.size());
  }
  return ::sendmsg(fd_.get(), &m, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof header + bytes);
}

bool Connection::send_raw(const void* data, std::size_t bytes) {
  return ::send(fd_.get(), data, bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

std::optional<vu::Message> Connection::receive() {
  vu::Message message;
  std::size_t have = 0;
  constexpr std::size_t kHeader = sizeof(vu::Header);
  while (have < kHeader || have < kHeader + message.header.size) {
    pollfd p{fd_.get(), POLLIN, 0};
    if (::poll(&p, 1, kReplyWaitMs) <= 0) return std::nullopt;
    const bool in_header = have < kHeader;
    iovec v{in_header ? reinterpret_cast<std::uint8_t*>(&message.header) + have
                      : message.payload.data() + (have - kHeader),
            (in_header ? kHeader : kHeader + message.header.size) - have};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 4)];
    msghdr m{};
    m.msg_iov = &v;
    m.msg_iovlen = 1;
    m.msg_control = control;
    m.msg_controllen = sizeof control;
    const ssize_t got = ::recvmsg(fd_.get(), &m, MSG_CMSG_CLOEXEC);
    if (got <= 0) return std::nullopt;
    if (cmsghdr* c = CMSG_FIRSTHDR(&m)) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c), sizeof fd);
      message.fds.emplace_back(fd);
    }
    have += static_cast<std::size_t>(got);
    if (message.header.size > vu::kPayloadMax) return std::nullopt;
  }
  return message;
}

std::optional<std::uint64_t> Connection::get(vu::Type type) {
  if (!send(type, nullptr, 0)) return std::nullopt;
  const auto reply = receive();
  return reply ? reply->as<std::uint64_t>() : std::nullopt;
}

bool Connection::hung_up() {
  char byte = 0;
  pollfd p{fd_.get(), POLLIN, 0};
  if (::poll(&p, 1, kReplyWaitMs) <= 0) return false;
  return ::recv(fd_.get(), &byte, 1, 0) <= 0;
}

// ---- FrontEnd ----

FrontEnd::FrontEnd(FrontEndOptions options)
    : options_(options),
      ram_(std::uint64_t{options.rings} *
               (std::uint64_t{options.depth} * (options.slot_bytes + kSlotArea) +
                std::uint64_t{options.ring.size} * (32 + 16 * DriverRing::kTableMax) + 16 * kPage) +
           128 * kPage) {
  for (std::uint32_t r = 0; r < options.rings; ++r) {
    Ring ring;
    ring.driver = DriverRing::make(ram_, options.ring);
    ring.area = ram_.allocate(std::uint64_t{kSlotArea} * options.depth, kSlotArea);
    ring.data = ram_.allocate(std::uint64_t{options.slot_bytes} * options.depth, kPage);
    ring.base = options.ring.packed ? 0x8000'8000 : 0;
    ring.kick = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    ring.call = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    ring.error = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    rings_.push_back(std::move(ring));
  }
}

std::string FrontEnd::connect(const std::string& path) {
  Connection connection(path);
  if (!connection.connected()) return "no connection to " + path;
  return set_up(std::move(connection));
}

std::string FrontEnd::set_up(Connection made) {
  using vu::Type;
  connection_.emplace(std::move(made));
  Connection& c = *connection_;
  const auto offered = c.get(Type::get_features);
  if (!offered) return "no features";
  std::uint64_t without = options_.drop_features | vu::kFeatureLogAll;
  if (!options_.ring.packed) without |= kFeaturePacked;
  if (!options_.ring.indirect) without |= kFeatureIndirect;
  if (!options_.ring.event_idx) without |= kFeatureEventIdx;
  features_ = *offered & ~without;
  const auto protocol = c.get(Type::get_protocol_features);
  if (!protocol) return "no protocol features";
  if (!c.send(Type::set_protocol_features, *protocol)) return "protocol features";
  if (!c.send(Type::set_owner, nullptr, 0)) return "owner";
  if (options_.read_config && !std::exchange(knows_config_, true)) {
    std::vector<std::uint8_t> ask(sizeof(vu::Config) + kConfigBytes);
    const vu::Config head{0, kConfigBytes, 0};
    std::memcpy(ask.data(), &head, sizeof head);
    if (!c.send(Type::get_config, ask.data(), ask.size())) return "configuration";
    const auto config = c.receive();
    if (!config || config->header.size != ask.size()) return "no configuration";
  }
  const auto queues = c.get(Type::get_queue_num);
  if (!queues || *queues < options_.rings) return "too few queues";
  if (c.ask(Type::set_features, features_) != 0) return "features refused";
  std::vector<std::uint8_t> table(8);
  const std::uint32_t count = static_cast<std::uint32_t>(ram_.regions().size());
  std::memcpy(table.data(), &count, sizeof count);
  std::vector<int> fds;
  for (const vu::MemoryRegion& region : ram_.regions()) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(&region);
    table.insert(table.end(), bytes, bytes + sizeof region);
    fds.push_back(ram_.fd());
  }
  if (!c.send(Type::set_mem_table, table.data(), table.size(), fds, vu::kNeedReply))
    return "memory";
  const auto reply = c.receive();
  if (!reply || reply->as<std::uint64_t>() != 0) return "memory refused";
  if (options_.inflight) {
    if (!inflight_) {
      const vu::Inflight wanted{0, 0, static_cast<std::uint16_t>(options_.rings),
                                static_cast<std::uint16_t>(options_.ring.size), 0};
      if (!c.send(Type::get_inflight_fd, wanted)) return "in-flight region";
      auto got = c.receive();
      if (!got || got->fds.size() != 1 || !got->as<vu::Inflight>()) return "no in-flight region";
      inflight_shape_ = *got->as<vu::Inflight>();
      inflight_ = std::move(got->fds[0]);
    }
    // After a crash a front-end knows of the rings what lies in the guest's memory.
    if (crashed_) {
      for (Ring& ring : rings_) ring.base = ring.driver->base();
    }
    if (c.ask(Type::set_inflight_fd, inflight_shape_, {inflight_.get()}) != 0) {
      return "in-flight region refused";
    }
  }
  crashed_ = true;  // unless the rings are stopped in order
  return start_rings();
}

std::string FrontEnd::start_rings() {
  using vu::Type;
  Connection& c = *connection_;
  for (std::uint32_t r = 0; r < options_.rings; ++r) {
    Ring& ring = rings_[r];
    const DriverRing& d = *ring.driver;
    if (c.ask(Type::set_vring_num, vu::VringState{r, options_.ring.size}) != 0) return "ring size";
    if (c.ask(Type::set_vring_base, vu::VringState{r, ring.base}) != 0) return "ring base";
    const vu::VringAddress address{
        r, 0, ram_.user(d.descriptors), ram_.user(d.device), ram_.user(d.driver), 0};
    if (c.ask(Type::set_vring_addr, address) != 0) return "ring address";
    const std::uint64_t index = r;
    if (c.ask(Type::set_vring_call, index, {ring.call.get()}) != 0) return "call";
    if (c.ask(Type::set_vring_err, index, {ring.error.get()}) != 0) return "error";
    if (c.ask(Type::set_vring_kick, index, {ring.kick.get()}) != 0) return "kick";
    if (c.ask(Type::set_vring_enable, vu::VringState{r, 1}) != 0) return "enable";
  }
  return "";
}

std::string FrontEnd::stop_rings() {
  for (std::uint32_t r = 0; r < options_.rings; ++r) {
    const vu::VringState state{r, 0};
    if (!connection_->send(vu::Type::get_vring_base, state)) return "get base";
    const auto reply = connection_->receive();
    if (!reply || !reply->as<vu::VringState>()) return "no base";
    rings_[r].base = reply->as<vu::VringState>()->number;
  }
  crashed_ = false;
  return "";
}

std::uint64_t FrontEnd::data_address(std::uint32_t r, std::uint32_t slot) const {
  return rings_[r].data + std::uint64_t{options_.slot_bytes} * slot;
}
std::uint8_t* FrontEnd::data(std::uint32_t r, std::uint32_t slot) const {
  return ram_.at(data_address(r, slot));
}
std::uint64_t FrontEnd::header_address(std::uint32_t r, std::uint32_t slot) const {
  return rings_[r].area + std::uint64_t{kSlotArea} * slot;
}
std::uint64_t FrontEnd::status_address(std::uint32_t r, std::uint32_t slot) const {
  return header_address(r, slot) + 24;
}

void FrontEnd::add(std::uint32_t r, std::uint32_t slot, std::uint32_t type, std::uint64_t sector,
                   std::uint32_t bytes, std::uint32_t pieces) {
  std::uint8_t* header = ram_.at(header_address(r, slot));
  const std::uint32_t reserved = 0;
  std::memcpy(header, &type, 4);
  std::memcpy(header + 4, &reserved, 4);
  std::memcpy(header + 8, &sector, 8);
  *ram_.at(status_address(r, slot)) = 0xff;
  const bool reads = type == 0 || type == 8;
  std::array<Buffer, DriverRing::kTableMax> buffers;
  if (pieces + 2 > buffers.size()) std::abort();
  std::size_t count = 0;
  buffers[count++] = {header_address(r, slot), 16, false};
  std::uint32_t done = 0;
  for (std::uint32_t p = 0; p < pieces && bytes != 0; ++p) {
    // Odd sizes, none of them empty.
    const std::uint32_t left = bytes - done;
    const std::uint32_t length = p + 1 == pieces || left < 2 ? left : left / 3 + 1;
    buffers[count++] = {data_address(r, slot) + done, length, reads};
    done += length;
    if (done == bytes) break;
  }
  buffers[count++] = {status_address(r, slot), 1, true};
  rings_[r].driver->add(std::span(buffers.data(), count), slot);
}

void FrontEnd::kick(std::uint32_t r) {
  if (rings_[r].driver->publish()) poke(rings_[r].kick.get());
}

void FrontEnd::scribble_inflight(const std::function<void(std::uint8_t*, std::size_t)>& change) {
  const std::size_t bytes = inflight_shape_.size;
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, inflight_.get(), 0);
  if (data == MAP_FAILED) std::abort();
  change(static_cast<std::uint8_t*>(data), bytes);
  ::munmap(data, bytes);
}

void FrontEnd::force_kick(std::uint32_t r) { poke(rings_[r].kick.get()); }

std::optional<Answer> FrontEnd::poll(std::uint32_t r) {
  const auto used = rings_[r].driver->pop();
  if (!used) return std::nullopt;
  return Answer{used->token, *ram_.at(status_address(r, used->token)), used->written};
}

std::optional<Answer> FrontEnd::wait(std::uint32_t r, int timeout_ms, std::uint16_t answers) {
  using clock = std::chrono::steady_clock;
  const auto end = clock::now() + std::chrono::milliseconds(timeout_ms);
  while (clock::now() < end) {
    if (auto answer = poll(r)) return answer;
    if (rings_[r].driver->ask_for_calls(answers)) continue;
    pollfd p{rings_[r].call.get(), POLLIN, 0};
    ::poll(&p, 1, timeout_ms);
    std::uint64_t count = 0;
    [[maybe_unused]] const ssize_t n = ::read(rings_[r].call.get(), &count, sizeof count);
  }
  return poll(r);
}

std::uint8_t FrontEnd::run(std::uint32_t r, std::uint32_t type, std::uint64_t sector,
                           std::uint32_t bytes, std::uint32_t pieces) {
  add(r, 0, type, sector, bytes, pieces);
  kick(r);
  const auto answer = wait(r);
  return answer && answer->slot == 0 ? answer->status : 0xff;
}

}  // namespace pqblk::exports::test
