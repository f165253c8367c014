// What the disk tests share: a file to work on, requests that can be waited for, and a backend that
// watches the contract of backend.h while a real one does the work.
#pragma once

#include <doctest/doctest.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "image/disk.h"
#include "image/raw_backend.h"
#include "image/request_queue.h"
#include "image/request_server.h"
#include "io/queue_thread.h"
#include "storage/file.h"

namespace pqblk::image::test {

class TempFile {
 public:
  explicit TempFile(std::uint64_t size, const char* directory = "/tmp") {
    path_ = std::string(directory) + "/pqblk-disk-test-XXXXXX";
    const int fd = ::mkstemp(path_.data());
    REQUIRE(fd >= 0);
    REQUIRE(::ftruncate(fd, static_cast<off_t>(size)) == 0);
    ::close(fd);
  }
  ~TempFile() { ::unlink(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Waits for a number of requests, completed on any thread; each exactly once.
class Batch {
 public:
  Request& add(RequestType type, std::uint64_t offset, std::uint64_t length) {
    Request& r = requests_.emplace_back();
    r.type = type;
    r.offset = offset;
    r.length = length;
    r.context = this;
    r.complete = [](Request& done) { static_cast<Batch*>(done.context)->completed(done); };
    return r;
  }
  // The memory becomes the request's, cut into pieces of odd sizes when `pieces` is more than one.
  Request& add(RequestType type, std::uint64_t offset, std::vector<std::uint8_t>& data,
               std::uint32_t pieces = 1) {
    Request& r = add(type, offset, data.size());
    std::vector<iovec>& iov = iovecs_.emplace_back();
    std::size_t at = 0;
    for (std::uint32_t i = 0; i < pieces; ++i) {
      const std::size_t left = data.size() - at;
      const std::size_t take = i + 1 == pieces ? left : std::min<std::size_t>(left, 1 + left / 3);
      iov.push_back({data.data() + at, take});
      at += take;
    }
    r.iov = iov.data();
    r.iov_count = static_cast<std::uint32_t>(iov.size());
    return r;
  }
  // A list for submit(): the requests of `queue` out of `queues`, in order.
  Request* list(std::size_t queue, std::size_t queues) {
    Request* first = nullptr;
    Request** end = &first;
    for (std::size_t i = queue; i < requests_.size(); i += queues) {
      *end = &requests_[i];
      end = &requests_[i].next;
    }
    *end = nullptr;
    return first;
  }
  void wait() {
    std::unique_lock guard(inner_);
    changed_.wait(guard, [this] { return completed_ >= requests_.size(); });
    CHECK(completed_ == requests_.size());
  }
  std::size_t completed_count() {
    std::lock_guard guard(inner_);
    return completed_;
  }
  std::deque<Request>& requests() { return requests_; }

 private:
  void completed(Request&) {
    std::lock_guard guard(inner_);
    ++completed_;
    changed_.notify_all();
  }
  std::deque<Request> requests_;
  std::deque<std::vector<iovec>> iovecs_;
  std::mutex inner_;
  std::condition_variable changed_;
  std::size_t completed_ = 0;
};

// Does the work with a raw backend; checks what a backend may rely on, counts, and fails on
// request.
class WatchedBackend final : public Backend {
 public:
  WatchedBackend(std::unique_ptr<Backend> inner, Geometry geometry)
      : inner_(std::move(inner)), geometry_(geometry) {}

  std::atomic<int> violations{0}, writes{0}, fua_writes{0}, flushes{0};
  std::atomic<bool> fail_flush{false};

  Geometry geometry() const override { return geometry_; }
  std::string_view format() const override { return inner_->format(); }
  Task<Error> read(QueueContext& q, GuestOffset at, GuestBuffers data) override {
    check_buffers(at, data);
    co_return co_await inner_->read(q, at, data);
  }
  Task<Error> write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) override {
    check_buffers(at, data);
    ++writes;
    fua_writes += fua ? 1 : 0;
    const Exclusive exclusive(*this, at.bytes, data.size);
    co_await yield();  // gives an overlapping writer, if one gets through, the chance to be seen
    co_return co_await inner_->write(q, at, data, fua);
  }
  Task<Error> flush(QueueContext& q) override {
    ++flushes;
    if (fail_flush) co_return Error(Kind::io_error, "injected");
    co_return co_await inner_->flush(q);
  }
  Task<Error> discard(QueueContext& q, GuestOffset at, std::uint64_t length) override {
    check_range(at, length, kMaxZeroBytes);
    const Exclusive exclusive(*this, at.bytes, length);
    co_return co_await inner_->discard(q, at, length);
  }
  Task<Error> write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                           std::uint32_t flags) override {
    check_range(at, length, kMaxZeroBytes);
    const Exclusive exclusive(*this, at.bytes, length);
    co_return co_await inner_->write_zeroes(q, at, length, flags);
  }
  Task<Result<Extent>> extent(QueueContext& q, GuestOffset at, std::uint64_t length) override {
    co_return co_await inner_->extent(q, at, length);
  }
  Task<Error> resize(QueueContext& q, std::uint64_t size) override {
    co_return co_await inner_->resize(q, size);
  }
  Task<Error> close(QueueContext& q) override { co_return co_await inner_->close(q); }
  BackendStats stats() const override { return inner_->stats(); }

 private:
  struct Exclusive {
    Exclusive(WatchedBackend& b, std::uint64_t at, std::uint64_t length) : backend(b), begin(at) {
      std::lock_guard guard(backend.inner_lock_);
      for (const auto& [other, end] : backend.busy_) {
        if (begin < end && other < begin + length) ++backend.violations;
      }
      backend.busy_[begin] = begin + length;
    }
    ~Exclusive() {
      std::lock_guard guard(backend.inner_lock_);
      backend.busy_.erase(begin);
    }
    WatchedBackend& backend;
    const std::uint64_t begin;
  };

  void check_range(GuestOffset at, std::uint64_t length, std::uint64_t most) {
    const std::uint64_t align = geometry_.request_align;
    if (at.bytes % align != 0 || length % align != 0 || length == 0 || length > most) ++violations;
    if (at.bytes + length > align_up(geometry_.size, align)) ++violations;
  }
  void check_buffers(GuestOffset at, const GuestBuffers& data) {
    check_range(at, data.size, geometry_.max_transfer);
    if (data.size == 0 || data.iov.empty() || data.skip >= data.iov[0].iov_len) ++violations;
    if (geometry_.memory_align == 1) return;
    std::uint64_t sum = 0;
    for (const iovec& v : data.iov) {
      const auto bits = reinterpret_cast<std::uintptr_t>(v.iov_base) | v.iov_len | data.skip;
      if (sum < data.size && bits % geometry_.memory_align != 0) ++violations;
      sum += v.iov_len;
    }
  }

  const std::unique_ptr<Backend> inner_;
  const Geometry geometry_;
  std::mutex inner_lock_;
  std::map<std::uint64_t, std::uint64_t> busy_;
};

// Queues and a server over a watched raw backend.
class Bench {
 public:
  Bench(const TempFile& temp, Geometry geometry, std::uint32_t queue_count,
        RequestServer::Settings settings = {}) {
    storage::OpenOptions how;
    how.read_only = settings.read_only;
    auto opened = storage::open_file(temp.path(), how);
    REQUIRE(opened);
    file = std::move(*opened);
    for (std::uint32_t i = 0; i < queue_count; ++i) {
      auto ring = io::make_queue({});
      REQUIRE(ring);
      auto queue = RequestQueue::open(i, std::move(*ring));
      REQUIRE(queue);
      queues.push_back(std::move(*queue));
    }
    auto raw =
        io::run_sync(queues[0]->ring(), [&] { return open_raw(queues[0]->context(), file); });
    REQUIRE(raw);
    if (geometry.size == 0) geometry.size = (*raw)->geometry().size;
    backend = std::make_unique<WatchedBackend>(std::move(*raw), geometry);
    server = std::make_unique<RequestServer>(*backend, settings);
    for (auto& queue : queues) queue->set_handler(*server, nullptr);
  }
  ~Bench() {
    for (auto& queue : queues) queue->shut();
    for (auto& queue : queues) queue->stop();
    storage::close_file(file);
  }
  // Submits everything, spread over the queues, and waits.
  void run(Batch& batch) {
    for (std::size_t i = 0; i < queues.size(); ++i) {
      Request* list = batch.list(i, queues.size());
      if (list != nullptr) REQUIRE(queues[i]->submit(list));
    }
    batch.wait();
  }
  Error run_one(Request& request, Batch& batch) {
    run(batch);
    return request.error;
  }

  io::File file;
  std::vector<std::unique_ptr<RequestQueue>> queues;
  std::unique_ptr<WatchedBackend> backend;
  std::unique_ptr<RequestServer> server;
};

}  // namespace pqblk::image::test
