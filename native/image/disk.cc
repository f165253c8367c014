#include "image/disk.h"

#include <pthread.h>
#include <sys/stat.h>

#include <atomic>
#include <cassert>
#include <cinttypes>
#include <cstdio>
#include <utility>

#include "image/disk_impl.h"
#include "image/disk_open.h"
#include "io/queue_thread.h"

namespace pqblk::image {

namespace {

storage::OpenOptions file_options(const OpenOptions& options) {
  storage::OpenOptions file;
  file.read_only = options.read_only;
  file.lock = options.read_only ? storage::Lock::shared : storage::Lock::exclusive;
  file.assume_non_volatile = options.assume_non_volatile;
  if (options.cache == Cache::none) {
    file.direct = options.direct_required ? storage::Direct::required : storage::Direct::optional;
  }
  return file;
}

}  // namespace

Error Disk::Impl::start_queues(const OpenOptions& options) {
  for (std::uint32_t i = 0; i <= options.queues; ++i) {
    const bool is_service = i == options.queues;
    io::QueueOptions io = options.io;
    if (is_service) {  // it sleeps most of the time and must not burn a core
      io.sqpoll = false;
      io.spin_us = 0;
    }
    auto ring = options.make_ring ? options.make_ring(io)
                                  : io::make_queue(io, is_service ? nullptr : &fallback_cause);
    if (!ring) return ring.take_error();
    auto queue = RequestQueue::open(i, std::move(*ring), !is_service);
    if (!queue) return queue.take_error();
    (*queue)->ring().register_file(file);
    if (is_service) {
      io::run_sync((*queue)->ring(), []() -> Task<bool> {
        ::pthread_setname_np(::pthread_self(), "pqblk-svc");
        co_return true;
      });
      service = std::move(*queue);
    } else {
      queues.push_back(std::move(*queue));
    }
  }
  return {};
}

Error Disk::Impl::open_image(OpenOptions& options) {
  auto opened = io::run_sync(service->ring(),
                             [&] { return open_backend(service->context(), file, options); });
  if (!opened) return opened.take_error();
  backend = std::move(*opened);
  if (options.format == Format::sealed) sealed = static_cast<SealedBackend*>(backend.get());
  shape = backend->geometry();
  id = make_id();
  server = std::make_unique<RequestServer>(*backend, RequestServer::Settings{read_only, cache, id});
  for (auto& queue : queues) queue->set_handler(*server, &throttle);
  service->set_handler(*server, nullptr);
  return {};
}

// The serial number that guests see: the volume's own, or one that stays with the file.
std::string Disk::Impl::make_id() const {
  std::string own = backend->facts().id;
  if (!own.empty()) return own.substr(0, kIdBytes);
  struct stat status {};
  if (::fstat(file.fd, &status) != 0) return "pqblk";
  char text[kIdBytes + 1];
  const std::uint64_t number =
      (static_cast<std::uint64_t>(status.st_dev) << 40) ^ static_cast<std::uint64_t>(status.st_ino);
  std::snprintf(text, sizeof text, "PQ%016" PRIX64, number);
  return text;
}

void Disk::Impl::stop_threads() {
  for (auto& queue : queues) queue->stop();
  if (service) service->stop();
}

Disk::Disk(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Disk::~Disk() { static_cast<void>(close()); }

Error Limits::check() const {
  for (const std::uint64_t bytes : {l2_cache, entry_cache, pending_data}) {
    if (bytes <= kMax) continue;
    return Error(Kind::invalid_argument, "a cache has at most " + std::to_string(kMax) +
                                             " bytes, not " + std::to_string(bytes));
  }
  return {};
}

Result<std::unique_ptr<Disk>> Disk::open(OpenOptions options) {
  if (options.queues == 0 || options.queues > kMaxQueues) {
    return Error(Kind::invalid_argument, "a disk has 1 to " + std::to_string(kMaxQueues) +
                                             " queues, not " + std::to_string(options.queues));
  }
  if (Error e = options.limits.check()) return std::move(e).in(options.path);
  auto file = storage::open_file(options.path, file_options(options));
  if (!file) return file.take_error();
  auto impl = std::make_unique<Impl>();
  impl->cache = options.cache;
  impl->read_only = options.read_only;
  impl->file = std::move(*file);
  if (Error e = impl->start_queues(options)) return std::move(e).in(options.path);
  if (Error e = impl->open_image(options)) {
    return e.path().empty() ? std::move(e).in(options.path) : std::move(e);
  }
  return std::unique_ptr<Disk>(new Disk(std::move(impl)));
}

void Disk::submit(std::uint32_t queue, Request* first) {
  assert(queue < impl_->queues.size());
  if (first == nullptr || impl_->queues[queue]->submit(first)) return;
  while (first != nullptr) {
    Request* next = first->next;  // the request may be gone once complete
    refuse(*first, Kind::closed, "the disk is closed");
    first = next;
  }
}

void Disk::start(std::uint32_t queue, Request& request) { impl_->queues[queue]->start(request); }

void Disk::defer(std::uint32_t queue, Deferred& work) { impl_->queues[queue]->defer(work); }

void Disk::add_poller(std::uint32_t queue, Poller& poller) {
  impl_->queues[queue]->add_poller(poller);
}

void Disk::remove_poller(std::uint32_t queue, Poller& poller) {
  impl_->queues[queue]->remove_poller(poller);
}

void Disk::on_queue(std::uint32_t queue, std::function<void()> fn) {
  [](io::Queue& ring, std::function<void()> work) -> detail::Detached {
    co_await resume_on(ring);
    work();
  }(impl_->queues[queue]->ring(), std::move(fn));
}

io::Queue& Disk::ring(std::uint32_t queue) { return impl_->queues[queue]->ring(); }

Error Disk::close() {
  std::lock_guard guard(impl_->control);
  if (impl_->closed) return impl_->close_error;
  impl_->closed = true;
  const Hurry hurry(*this);
  for (auto& queue : impl_->queues) queue->shut();
  Impl& impl = *impl_;
  impl.close_error = io::run_sync(impl.service->ring(),
                                  [&] { return impl.backend->close(impl.service->context()); });
  impl.stop_threads();
  storage::close_file(impl.file);
  return impl.close_error;
}

Error Disk::resize(std::uint64_t new_size) {
  std::lock_guard guard(impl_->control);
  Impl& impl = *impl_;
  if (impl.closed) return impl.closed_error();
  if (impl.read_only) {
    return Error(Kind::read_only, "the disk was opened read-only").in(impl.file.path);
  }
  if (new_size % kVirtioSectorSize != 0) {
    return Error(Kind::invalid_argument, "a disk's size is a multiple of 512 bytes");
  }
  if (new_size < impl.server->size()) {
    return Error(Kind::invalid_argument, "the disk holds " + std::to_string(impl.server->size()) +
                                             " bytes and can only grow");
  }
  for (auto& queue : impl.queues) queue->pause();
  Error e = io::run_sync(impl.service->ring(),
                         [&] { return impl.backend->resize(impl.service->context(), new_size); });
  if (!e) impl.server->set_size(impl.backend->geometry().size);
  for (auto& queue : impl.queues) queue->resume();
  return e;
}

Result<Extent> Disk::extent(std::uint64_t offset, std::uint64_t length) {
  auto found = extents(offset, length, 1);
  if (!found) return found.take_error();
  return found->front();
}

// On the service queue; [begin, end) is aligned for the backend.
Task<Error> Disk::Impl::find_extents(std::uint64_t begin, std::uint64_t end, std::size_t max,
                                     std::vector<Extent>& out) {
  while (begin < end) {
    Result<Extent> found = co_await backend->extent(service->context(), {begin}, end - begin);
    if (!found) co_return found.take_error();
    begin += found->length;
    if (!out.empty() && out.back().kind == found->kind) {
      out.back().length += found->length;
    } else if (out.size() == max) {
      break;
    } else {
      out.push_back(*found);
    }
    if (max == 1) break;  // whoever wants one piece does not wait for all that joins it
  }
  co_return Error();
}

Result<std::vector<Extent>> Disk::extents(std::uint64_t offset, std::uint64_t length,
                                          std::size_t max) {
  std::lock_guard guard(impl_->control);
  Impl& impl = *impl_;
  if (impl.closed) return impl.closed_error();
  const std::uint64_t size = impl.server->size();
  if (max == 0 || length == 0 || offset > size || length > size - offset) {
    return Error(Kind::out_of_range, "no such range on the disk").at("extent", offset);
  }
  const std::uint64_t align = impl.shape.request_align;
  const std::uint64_t begin = align_down(offset, align);
  const std::uint64_t end = align_up(offset + length, align);
  std::vector<Extent> found;
  Error e =
      io::run_sync(impl.service->ring(), [&] { return impl.find_extents(begin, end, max, found); });
  if (e) return e;
  // Back from the backend's alignment to what was asked for.
  found.front().length -= offset - begin;
  std::uint64_t covered = 0;
  for (const Extent& extent : found) covered += extent.length;
  if (covered > length) found.back().length -= covered - length;
  return found;
}

Error Disk::set_rate_limits(const RateLimits& limits) {
  if (Error e = limits.check()) return std::move(e).in(impl_->file.path);
  impl_->throttle.set(limits, impl_->queues.front()->ring().now_ns());
  return {};
}

RateLimits Disk::rate_limits() const { return impl_->throttle.limits(); }

Disk::Hurry::Hurry(Disk& disk) : disk_(disk) { disk_.impl_->throttle.lift(); }

Disk::Hurry::~Hurry() { disk_.impl_->throttle.restore(); }

DiskFacts Disk::facts() const {
  const Impl& impl = *impl_;
  BackendFacts more = impl.backend->facts();
  DiskFacts facts;
  facts.path = impl.file.path;
  facts.format = impl.backend->format();
  facts.engine = impl.queues.front()->ring().engine();
  facts.fallback_cause = impl.fallback_cause;
  facts.durability_class = storage::durability_class(impl.file);
  facts.id = impl.id;
  facts.size = size();
  facts.cluster_size = impl.shape.cluster_size;
  facts.queues = static_cast<std::uint32_t>(impl.queues.size());
  facts.read_only = impl.read_only;
  facts.direct = impl.file.direct;
  facts.suite = std::move(more.suite);
  facts.aead = std::move(more.aead);
  facts.session_id = more.session_id;
  return facts;
}

std::uint64_t Disk::size() const { return impl_->server->size(); }

QueueStats Disk::queue_stats(std::uint32_t queue) const {
  return impl_->queues[queue]->counters().snapshot();
}

BackendStats Disk::backend_stats() const { return impl_->backend->stats(); }

Backend& Disk::backend() { return *impl_->backend; }

}  // namespace pqblk::image
