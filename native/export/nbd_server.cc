#include "export/nbd_server.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <optional>
#include <utility>

#include "export/nbd_listen.h"
#include "export/report_log.h"
#include "io/queue_thread.h"

namespace pqblk::exports::nbd {
namespace {

constexpr std::uint64_t kNsPerMs = 1'000'000;
constexpr long kSweepNs = 250 * static_cast<long>(kNsPerMs);
// Two seconds without a sweep: the server itself was stopped, or had no processor.
constexpr std::uint64_t kTicksAway = 8;
constexpr std::uint64_t kRetryNs = 100 * kNsPerMs;  // after accept() ran out of descriptors
constexpr std::size_t kHandshakeBytes = 4096;       // received at once

Error check(const ServerOptions& options) {
  std::string problem;
  if (options.unix_path.empty() && options.tcp_host.empty()) problem = "nowhere to listen";
  if (!options.tcp_host.empty() && !options.tls.wanted() && !options.insecure) {
    problem = "TCP needs TLS (pre-shared keys or certificates), or a word that it may be insecure";
  }
  if (options.export_name.size() > kNameMax || options.description.size() > kNameMax) {
    problem = "an export's name and description have at most 4096 bytes";
  }
  if (options.clients_max == 0 || options.clients_max > kClientsMax) {
    problem = "the number of clients is 1 to " + std::to_string(kClientsMax);
  }
  return problem.empty() ? Error() : Error(Kind::invalid_argument, problem).at("serve NBD");
}

void set_up_client(int fd) {
  // Both fail on Unix sockets, which need neither.
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  const int bytes = 4 << 20;  // the kernel takes what its limits allow
  ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

void add(ServerStats& sum, const ConnectionCounters& counters) {
  for (std::size_t i = 0; i < kCommands; ++i) sum.commands[i] += counters.commands[i].get();
  sum.errors += counters.errors.get();
  sum.refused += counters.refused.get();
  sum.received_bytes += counters.received_bytes.get();
  sum.sent_bytes += counters.sent_bytes.get();
}

}  // namespace

struct Server::Impl final : ConnectionOwner {
  Impl(image::Disk& d, ServerOptions o)
      : disk(d), facts(d.facts()), options(std::move(o)), log(options.log) {}

  // ---- ConnectionOwner, any thread ----
  io::Queue& service() override { return thread->queue(); }
  void report(const std::string& text) override { log.say(text); }
  void failed(const Error& error, const std::string& what) override { log.failed(error, what); }
  void ended(Connection& connection) override;

  // ---- the server's own thread ----
  ExportInfo export_info() const {
    return {options.export_name, options.description, disk.size(), facts.read_only};
  }
  struct Handshake {
    std::unique_ptr<Stream> stream;
    std::uint64_t due_ns;
  };
  Task<void> accept_clients(Listener& listener);
  Task<void> negotiate(int fd);
  Task<bool> agree(Stream& stream, Negotiation& talk, std::vector<std::uint8_t>& early);
  Task<bool> send_all(Stream& stream, std::vector<std::uint8_t>& bytes);
  Task<bool> shake_hands(Stream& stream);
  Task<Error> wait_for(Stream& stream, Stream::State state);
  Task<void> sweep();
  void sweep_once();
  void hand_over(Handshake& handshake, const Agreement& agreement,
                 std::span<const std::uint8_t> early);
  void tick(bool on);  // under the lock
  void take(int fd);
  void leave();  // one coroutine less

  image::Disk& disk;
  // Asked once: while the disk grows, asking would race. Its size is asked each time, of the disk.
  const image::DiskFacts facts;
  const ServerOptions options;
  ReportLog log;
  std::shared_ptr<TlsContext> tls;
  std::vector<Listener> listeners;
  std::unique_ptr<io::QueueThread> thread;
  int clock = -1;  // timerfd of the sweeps; ticks while there are clients
  std::list<Handshake> handshakes;
  std::uint32_t next_queue = 0;
  std::atomic<bool> closing{false};

  mutable std::mutex inner;  // guards what follows
  std::condition_variable changed;
  std::list<std::unique_ptr<Connection>> connections;
  std::uint32_t coroutines = 0;
  bool ticking = false;
  ServerStats totals;  // of connections that ended; clients and negotiating are not kept here
  std::uint32_t negotiating = 0;
  bool closed = false;
};

// ---- any thread ----

void Server::Impl::ended(Connection& connection) {
  std::unique_ptr<Connection> gone;  // closes its socket, outside of the lock
  {
    std::lock_guard guard(inner);
    const auto at = std::find_if(connections.begin(), connections.end(),
                                 [&](const auto& c) { return c.get() == &connection; });
    add(totals, connection.counters());
    gone = std::move(*at);
    connections.erase(at);
    ++coroutines;  // until the socket is closed
  }
  gone.reset();
  leave();
}

// The last one out lets close() go on, which may destroy this at once: notified under the lock.
void Server::Impl::leave() {
  std::lock_guard guard(inner);
  --coroutines;
  changed.notify_all();
}

// ---- the server's own thread ----

Task<void> Server::Impl::accept_clients(Listener& listener) {
  co_await resume_on(thread->queue());
  while (!closing.load(std::memory_order_acquire)) {
    const int fd = ::accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
      take(fd);
    } else if (errno == EAGAIN) {
      static_cast<void>(co_await thread->queue().poll(listener.fd(), POLLIN));
    } else if (errno == EBADF || errno == EINVAL || errno == ENOTSOCK) {
      break;  // closing shut the socket down
    } else if (errno != EINTR && errno != ECONNABORTED) {
      // Out of descriptors or memory, or what the network did to that client (accept(2)).
      co_await thread->queue().sleep(kRetryNs);
    }
  }
  leave();
}

void Server::Impl::take(int fd) {
  bool room = false;
  {
    std::lock_guard guard(inner);
    ++totals.accepted;
    // Those who have not shown yet that they may come in keep nobody out who has.
    room = !closing && connections.size() < options.clients_max && negotiating < kNegotiatingMax;
    if (room) {
      ++negotiating;
      ++coroutines;
      tick(true);
    } else {
      ++totals.refused_clients;
    }
  }
  if (!room) {
    ::close(fd);
    return;
  }
  set_up_client(fd);
  spawn(negotiate(fd));
}

Task<void> Server::Impl::negotiate(int fd) {
  co_await resume_on(thread->queue());
  const std::uint64_t now = thread->queue().now_ns();
  handshakes.push_front({std::make_unique<Stream>(fd), now + options.handshake_ms * kNsPerMs});
  const auto self = handshakes.begin();
  if (closing) ::shutdown(fd, SHUT_RDWR);
  Negotiation talk(export_info(), tls != nullptr ? TlsPolicy::required : TlsPolicy::none);
  std::vector<std::uint8_t> early;
  const bool agreed = co_await agree(*self->stream, talk, early);
  if (agreed && !closing) {
    hand_over(*self, talk.agreement(), early);
  } else {
    std::lock_guard guard(inner);
    --negotiating;
  }
  handshakes.erase(self);
  leave();
}

// The dialogue up to the transmission phase; false: the client is gone or unwanted.
Task<bool> Server::Impl::agree(Stream& stream, Negotiation& talk,
                               std::vector<std::uint8_t>& early) {
  std::vector<std::uint8_t> buffer(kHandshakeBytes);
  std::size_t begin = 0, end = 0;
  for (;;) {
    std::size_t used = 0;
    const auto step = talk.feed({buffer.data() + begin, end - begin}, used);
    begin += used;
    const bool sent = co_await send_all(stream, talk.output());
    if (!sent || step == Negotiation::Step::end) co_return false;
    if (step == Negotiation::Step::transmission) {
      early.assign(buffer.begin() + static_cast<std::ptrdiff_t>(begin),
                   buffer.begin() + static_cast<std::ptrdiff_t>(end));
      co_return true;
    }
    if (step == Negotiation::Step::start_tls) {
      // What came before TLS must not be taken for something said under it.
      if (begin != end || stream.start_tls(tls)) co_return false;
      const bool shaken = co_await shake_hands(stream);
      if (!shaken) co_return false;
      talk.tls_started();
      continue;
    }
    begin = end = 0;
    const iovec to{buffer.data(), buffer.size()};
    const Stream::Transfer got = stream.receive({&to, 1});
    end = got.bytes;
    if (got.bytes != 0) continue;
    if (got.state == Stream::State::closed) co_return false;
    const Error failed = co_await wait_for(stream, got.state);
    if (failed) co_return false;
  }
}

Task<bool> Server::Impl::send_all(Stream& stream, std::vector<std::uint8_t>& bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const iovec from{bytes.data() + done, bytes.size() - done};
    const Stream::Transfer sent = stream.send({&from, 1});
    done += sent.bytes;
    if (sent.state == Stream::State::closed) co_return false;
    if (sent.state == Stream::State::ok) continue;
    const Error failed = co_await wait_for(stream, sent.state);
    if (failed) co_return false;
  }
  bytes.clear();
  co_return true;
}

Task<bool> Server::Impl::shake_hands(Stream& stream) {
  for (;;) {
    const Stream::State state = stream.handshake();
    if (state == Stream::State::ok) co_return true;
    if (state == Stream::State::closed) {
      {
        std::lock_guard guard(inner);
        ++totals.failed_handshakes;
      }
      report("a TLS handshake failed: " + stream.tls_failure());
      co_return false;
    }
    const Error failed = co_await wait_for(stream, state);
    if (failed) co_return false;
  }
}

Task<Error> Server::Impl::wait_for(Stream& stream, Stream::State state) {
  const short events = state == Stream::State::wait_write ? POLLOUT : POLLIN;
  co_return co_await thread->queue().poll(stream.fd(), events);
}

void Server::Impl::hand_over(Handshake& handshake, const Agreement& agreement,
                             std::span<const std::uint8_t> early) {
  {
    std::lock_guard guard(inner);
    if (connections.size() >= options.clients_max) {  // others were through sooner
      --negotiating;
      ++totals.refused_clients;
      return;
    }
  }
  const std::uint32_t queue = next_queue++ % facts.queues;
  auto made = std::make_unique<Connection>(*this, disk, queue, std::move(handshake.stream),
                                           agreement, facts.cluster_size != 0, early);
  Connection& connection = *made;
  std::lock_guard guard(inner);
  --negotiating;
  connections.push_back(std::move(made));
  // Under the lock: once it runs it may end at once, but not before it is let go of here.
  connection.start();
  if (closing) connection.stop();
}

void Server::Impl::tick(bool on) {
  if (std::exchange(ticking, on) == on) return;
  const long ns = on ? kSweepNs : 0;
  const itimerspec when{{0, ns}, {0, ns}};
  ::timerfd_settime(clock, 0, &when, nullptr);
}

Task<void> Server::Impl::sweep() {
  co_await resume_on(thread->queue());
  for (;;) {
    static_cast<void>(co_await thread->queue().poll(clock, POLLIN));
    std::uint64_t ticks = 0;
    [[maybe_unused]] const ssize_t r = ::read(clock, &ticks, sizeof ticks);
    const bool away = ticks >= kTicksAway && !closing;
    if (!away) sweep_once();
    std::lock_guard guard(inner);
    // What clients said meanwhile was not heard yet: they have a whole tick from now.
    if (away && std::exchange(ticking, false)) tick(true);
    // close() ends the sweeps last: there are neither clients nor other coroutines then.
    if (closing && coroutines == 1 && connections.empty()) break;
  }
  leave();
}

// Clients whose time is up lose their sockets; whoever waits on one is woken by that.
void Server::Impl::sweep_once() {
  const std::uint64_t now = thread->queue().now_ns();
  std::uint64_t timeouts = 0;
  for (Handshake& handshake : handshakes) {
    if (handshake.stream == nullptr || (now < handshake.due_ns && !closing)) continue;
    ::shutdown(handshake.stream->fd(), SHUT_RDWR);
    handshake.due_ns = ~std::uint64_t{0};
    if (!closing) ++timeouts;
  }
  {
    std::lock_guard guard(inner);
    for (const auto& connection : connections) {
      const bool stalled = connection->stalled_ns(now) > options.stall_ms * kNsPerMs;
      const bool idles =
          options.idle_ms != 0 && connection->idle_ns(now) > options.idle_ms * kNsPerMs;
      if (!stalled && !idles) continue;
      connection->cut();
      ++timeouts;
    }
    totals.timeouts += timeouts;
    if (connections.empty() && negotiating == 0 && !closing) tick(false);
  }
  if (timeouts != 0) report("clients that were silent for too long were disconnected");
}

// ---- Server ----

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() {
  close();
  if (impl_->clock >= 0) ::close(impl_->clock);
}

Result<std::unique_ptr<Server>> Server::start(image::Disk& disk, ServerOptions options) {
  if (Error e = check(options)) return e;
  std::unique_ptr<Server> self(new Server(std::make_unique<Impl>(disk, std::move(options))));
  Impl& impl = *self->impl_;
  if (impl.options.tls.wanted()) {
    TlsOptions tls = impl.options.tls;
    tls.any_client = impl.options.insecure;
    auto context = TlsContext::load(tls);
    if (!context) return context.take_error();
    impl.tls = std::move(*context);
  }
  if (!impl.options.unix_path.empty()) {
    auto listener = Listener::on_unix(impl.options.unix_path);
    if (!listener) return listener.take_error();
    impl.listeners.push_back(std::move(*listener));
  }
  if (!impl.options.tcp_host.empty()) {
    auto listener = Listener::on_tcp(impl.options.tcp_host, impl.options.tcp_port);
    if (!listener) return listener.take_error();
    impl.listeners.push_back(std::move(*listener));
  }
  impl.clock = ::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  if (impl.clock < 0) return Error::from_errno(errno, "serve NBD");
  io::QueueOptions ring;
  ring.engine = io::EngineType::threads;  // it only waits for sockets
  auto thread = io::QueueThread::start(ring, impl.facts.queues + 1);
  if (!thread) return thread.take_error();
  impl.thread = std::move(*thread);
  impl.coroutines = 1 + static_cast<std::uint32_t>(impl.listeners.size());
  spawn(impl.sweep());
  for (Listener& listener : impl.listeners) spawn(impl.accept_clients(listener));
  return self;
}

void Server::adopt(int fd) {
  ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
  impl_->take(fd);
}

std::uint16_t Server::tcp_port() const {
  return impl_->options.tcp_host.empty() ? 0 : impl_->listeners.back().port();
}

ServerStats Server::stats() const {
  std::lock_guard guard(impl_->inner);
  ServerStats sum = impl_->totals;
  sum.clients = static_cast<std::uint32_t>(impl_->connections.size());
  sum.negotiating = impl_->negotiating;
  for (const auto& connection : impl_->connections) add(sum, connection->counters());
  return sum;
}

void Server::close() {
  Impl& impl = *impl_;
  if (impl.thread == nullptr) return;  // it never started
  std::unique_lock guard(impl.inner);
  if (std::exchange(impl.closed, true)) return;
  impl.closing.store(true, std::memory_order_release);
  for (const Listener& listener : impl.listeners) ::shutdown(listener.fd(), SHUT_RDWR);
  for (const auto& connection : impl.connections) connection->stop();
  const itimerspec now{{0, kSweepNs}, {0, 1}};
  ::timerfd_settime(impl.clock, 0, &now, nullptr);
  // The sweeps shut down what still negotiates, and end last.
  const auto grace = std::chrono::milliseconds(kCloseGraceMs);
  const auto done = [&] { return impl.connections.empty() && impl.coroutines <= 1; };
  if (!impl.changed.wait_for(guard, grace, done)) {
    for (const auto& connection : impl.connections) connection->cut();
    impl.changed.wait(guard, done);
  }
  ::timerfd_settime(impl.clock, 0, &now, nullptr);
  impl.changed.wait(guard, [&] { return impl.coroutines == 0; });
  guard.unlock();
  impl.thread->stop();
  impl.listeners.clear();
}

}  // namespace pqblk::exports::nbd
