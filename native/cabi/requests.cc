// Requests that the caller waits for.
//
// Room cabi/.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "cabi/convert.h"

namespace pqblk::cabi {
namespace {

// A thread keeps to one engine queue; threads spread over all of them.
std::uint32_t queue_of_this_thread(const pqblk_disk& disk) {
  static std::atomic<std::uint32_t> threads{0};
  thread_local const std::uint32_t number = threads.fetch_add(1, std::memory_order_relaxed);
  return number % disk.queues;
}

Error run(pqblk_disk& disk, image::Request& request) {
  struct Waiter {
    std::mutex inner;
    std::condition_variable changed;
    bool done = false;
  } waiter;
  request.context = &waiter;
  request.complete = [](image::Request& r) {
    auto& w = *static_cast<Waiter*>(r.context);
    // Under the lock: once it is free the waiter may be gone.
    const std::lock_guard guard(w.inner);
    w.done = true;
    w.changed.notify_one();
  };
  disk.disk->submit(queue_of_this_thread(disk), &request);
  std::unique_lock guard(waiter.inner);
  waiter.changed.wait(guard, [&] { return waiter.done; });
  return request.status == image::Status::ok ? Error() : std::move(request.error);
}

// With a null `data`: a request that moves none.
int call(pqblk_disk* disk, pqblk_error* error, std::uint32_t type, std::uint32_t flags,
         std::uint64_t offset, std::uint64_t length, void* data = nullptr) {
  return guarded(error, [&]() -> Error {
    image::Request request;
    if (Error e = fill_request(type, flags, offset, length, request)) return e;
    const iovec memory{data, static_cast<std::size_t>(length)};
    if (type == PQBLK_READ || type == PQBLK_WRITE) {
      request.iov = &memory;
      request.iov_count = 1;
    }
    return run(*disk, request);
  });
}

}  // namespace
}  // namespace pqblk::cabi

using pqblk::cabi::call;

int pqblk_pread(pqblk_disk* disk, void* data, uint64_t length, uint64_t offset,
                pqblk_error* error) {
  return call(disk, error, PQBLK_READ, 0, offset, length, data);
}

int pqblk_pwrite(pqblk_disk* disk, const void* data, uint64_t length, uint64_t offset,
                 uint32_t flags, pqblk_error* error) {
  return call(disk, error, PQBLK_WRITE, flags, offset, length, const_cast<void*>(data));
}

int pqblk_flush(pqblk_disk* disk, pqblk_error* error) {
  return call(disk, error, PQBLK_FLUSH, 0, 0, 0);
}

int pqblk_discard(pqblk_disk* disk, uint64_t offset, uint64_t length, pqblk_error* error) {
  return call(disk, error, PQBLK_DISCARD, 0, offset, length);
}

int pqblk_write_zeroes(pqblk_disk* disk, uint64_t offset, uint64_t length, uint32_t flags,
                       pqblk_error* error) {
  return call(disk, error, PQBLK_WRITE_ZEROES, flags, offset, length);
}
