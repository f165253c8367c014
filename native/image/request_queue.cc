#include "image/request_queue.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace pqblk::image {
namespace {

Request* shut_mark() {
  static Request mark;
  return &mark;
}

}  // namespace

void refuse(Request& request, Kind kind, std::string message) {
  request.status = kind == Kind::unsupported ? Status::unsupp : Status::ioerr;
  request.error = Error(kind, std::move(message));
  request.complete(request);
}

Result<std::unique_ptr<RequestQueue>> RequestQueue::open(std::uint32_t index,
                                                         std::unique_ptr<io::Queue> ring,
                                                         bool register_arena) {
  std::unique_ptr<RequestQueue> queue(new RequestQueue);
  queue->context_ = std::make_unique<QueueContext>(*ring, index);
  ring->poll_hook = [self = queue.get()] { return self->turn(); };
  auto thread = io::QueueThread::start(std::move(ring), index);
  if (!thread) return thread.take_error();
  queue->thread_ = std::move(*thread);
  if (register_arena) {
    const std::span<std::uint8_t> arena = queue->context_->arena();
    const iovec buffer{arena.data(), arena.size()};
    queue->ring().register_buffers({&buffer, 1});
  }
  return queue;
}

RequestQueue::~RequestQueue() { stop(); }

void RequestQueue::stop() {
  if (thread_ == nullptr) return;
  thread_->stop();
  assert(running_ == 0 && waiting_ == nullptr && held_ == nullptr && pollers_ == nullptr);
}

// ---- any thread ----

bool RequestQueue::submit(Request* first) {
  // The list arrives oldest first; the inbox is a stack. It is pushed as a whole, so that one
  // exchange and one wake-up serve all of it.
  Request* newest = nullptr;
  for (Request* r = first; r != nullptr;) {
    Request* next = std::exchange(r->next, newest);
    newest = r;
    r = next;
  }
  Request* head = inbox_.load(std::memory_order_relaxed);
  do {
    if (head == shut_mark()) {
      first->next = nullptr;  // an attempt that failed has led it to somebody else's
      for (Request* r = newest; r != nullptr;) {  // give the list back as it came
        Request* older = r->next;
        r->next = r == newest ? nullptr : newest;
        newest = r;
        r = older;
      }
      return false;
    }
    first->next = head;
  } while (!inbox_.compare_exchange_weak(head, newest, std::memory_order_release,
                                         std::memory_order_relaxed));
  if (head == nullptr) ring().wake();
  return true;
}

// ---- own thread ----

// Once for each turn of the loop. What was deferred runs after the requests that it may announce;
// it never has more requests to start, so it does not count as work.
bool RequestQueue::turn() {
  bool worked = take_inbox();
  for (Poller* poller = pollers_; poller != nullptr; poller = poller->next) {
    if (poller->run(*poller)) worked = true;
  }
  Deferred* work = std::exchange(deferred_, nullptr);
  while (work != nullptr) {
    Deferred* next = work->next;
    work->pending = false;
    work->run(*work);
    work = next;
  }
  now_ns_ = 0;  // it may sleep now
  return worked;
}

void RequestQueue::defer(Deferred& work) {
  if (work.pending) return;
  work.pending = true;
  work.next = deferred_;
  deferred_ = &work;
  ring().wake();  // one more turn before it sleeps, wherever in this one we are
}

void RequestQueue::add_poller(Poller& poller) {
  poller.next = pollers_;
  pollers_ = &poller;
  ring().wake();  // it is asked before the thread sleeps
}

void RequestQueue::remove_poller(Poller& poller) {
  Poller** at = &pollers_;
  while (*at != &poller) at = &(*at)->next;
  *at = poller.next;
}

bool RequestQueue::take_inbox() {
  Request* newest = inbox_.load(std::memory_order_relaxed);
  if (newest == nullptr || newest == shut_mark()) return false;
  newest = inbox_.exchange(nullptr, std::memory_order_acquire);
  Request* oldest = nullptr;
  Request** end = &newest->next;  // the newest ends up last
  while (newest != nullptr) {
    Request* older = std::exchange(newest->next, oldest);
    arrived(*newest);
    oldest = newest;
    newest = older;
  }
  *waiting_end_ = oldest;
  waiting_end_ = end;
  drain();
  return true;
}

void RequestQueue::start(Request& request) {
  if (shut_) return refuse(request, Kind::closed, "the disk is closed");
  arrived(request);
  request.next = nullptr;
  *waiting_end_ = &request;
  waiting_end_ = &request.next;
  // A request that completes inside serve() may start another from its completion: the outermost
  // call picks it up, so that the stack stays flat.
  if (!draining_) drain();
}

void RequestQueue::arrived(Request& request) {
  request.arrived_ns = now();
  counters_.accepted.add(1);
}

// One look at the clock serves all that a turn picks up, and a completion has looked anyway.
std::uint64_t RequestQueue::now() {
  if (now_ns_ == 0) now_ns_ = ring().now_ns();
  return now_ns_;
}

void RequestQueue::drain() {
  draining_ = true;
  const bool more = drain_waiting() || (held_ != nullptr && drain_held());
  draining_ = false;
  if (!more) return;
  drain_later_.run = [](Deferred& work) { static_cast<RequestQueue*>(work.context)->drain(); };
  drain_later_.context = this;
  defer(drain_later_);
}

void RequestQueue::serve_first(Request*& list, Request**& list_end) {
  Request& request = *list;
  list = request.next;
  if (list == nullptr) list_end = &list;
  ++running_;
  handler_->serve(*this, request);
}

// True: there is more to start, in the next turn.
bool RequestQueue::drain_waiting() {
  for (std::uint32_t n = 0; waiting_ != nullptr && running_ < kRunningMax && !paused_; ++n) {
    if (n == kStartsAtOnce) return true;
    const bool limited = throttle_ != nullptr && throttle_->on() &&
                         waiting_->type != RequestType::flush &&
                         waiting_->type != RequestType::get_id;
    if (!limited) {
      serve_first(waiting_, waiting_end_);
      continue;
    }
    Request& request = *waiting_;
    waiting_ = request.next;
    if (waiting_ == nullptr) waiting_end_ = &waiting_;
    request.next = nullptr;
    *held_end_ = &request;
    held_end_ = &request.next;
  }
  return false;
}

// ---- limits ----

// Whether the limits let the first one go. It reserves once; the queues' reservations take turns.
bool RequestQueue::may_start() {
  if (!throttle_->on()) {
    reserved_version_ = 0;
    return true;
  }
  const std::uint64_t now_ns = ring().now_ns();
  const std::uint64_t version = throttle_->version();
  if (reserved_version_ != version) {
    const bool counts = held_->type == RequestType::in || held_->type == RequestType::out;
    held_until_ns_ = throttle_->reserve(counts ? held_->length : 0, now_ns);
    reserved_version_ = version;
    if (held_until_ns_ > now_ns) counters_.throttled.add(1);
  }
  if (held_until_ns_ > now_ns) return false;
  reserved_version_ = 0;
  return true;
}

// True: there is more to start, in the next turn.
bool RequestQueue::drain_held() {
  for (std::uint32_t n = 0; held_ != nullptr && running_ < kRunningMax && !paused_; ++n) {
    if (n == kStartsAtOnce) return true;
    if (!may_start()) {
      if (!watching_) watch_clock();
      return false;
    }
    serve_first(held_, held_end_);
  }
  return false;
}

// Sleeps in short steps, since nothing else ends its sleep when the limits change or the disk is
// closed. It ends when nothing waits for the clock; whoever completes or resumes looks again.
detail::Detached RequestQueue::watch_clock() {
  watching_ = true;
  while (held_ != nullptr && running_ < kRunningMax && !paused_) {
    const std::uint64_t now_ns = ring().now_ns();
    if (throttle_->on() && held_until_ns_ > now_ns) {
      co_await ring().sleep(std::min(held_until_ns_ - now_ns, kWatchNs));
    } else {
      co_await yield();
    }
    drain();
  }
  watching_ = false;
  tell_if_quiet();
}

void RequestQueue::finish(Request& request) {
  --running_;
  now_ns_ = ring().now_ns();
  counters_.count(request, now_ns_ - request.arrived_ns);
  request.complete(request);
  if ((waiting_ != nullptr || held_ != nullptr) && !draining_) drain();
  tell_if_quiet();
}

// ---- control, from outside ----

bool RequestQueue::quiet() const {
  if (running_ != 0) return false;
  return paused_ || (waiting_ == nullptr && held_ == nullptr && !watching_);
}

void RequestQueue::tell_if_quiet() {
  if (idle_waiter_ != nullptr && quiet()) ring().post(*std::exchange(idle_waiter_, nullptr));
}

// Returns once nothing runs and, unless paused, nothing waits.
Task<bool> RequestQueue::idle() {
  struct Idle : ReadyNode {
    RequestQueue& queue;
    explicit Idle(RequestQueue& q) : queue(q) {}
    bool await_ready() const { return queue.quiet(); }
    void await_suspend(std::coroutine_handle<> h) {
      handle = h;
      queue.idle_waiter_ = this;
    }
    void await_resume() const {}
  };
  co_await Idle(*this);
  co_return true;
}

void RequestQueue::pause() {
  thread_->run_sync([&]() -> Task<bool> {
    paused_ = true;
    co_return co_await idle();
  });
}

void RequestQueue::resume() {
  thread_->run_sync([&]() -> Task<bool> {
    paused_ = false;
    drain();
    co_return true;
  });
}

// Takes what is in the inbox and closes it in one step.
void RequestQueue::refuse_later_ones() {
  for (;;) {
    take_inbox();
    Request* expected = nullptr;
    if (inbox_.compare_exchange_strong(expected, shut_mark(), std::memory_order_acq_rel)) return;
    if (expected == shut_mark()) return;
  }
}

void RequestQueue::shut() {
  thread_->run_sync([&]() -> Task<bool> {
    shut_ = true;
    refuse_later_ones();
    drain();  // what the limits held back, now that they are lifted
    co_return co_await idle();
  });
}

}  // namespace pqblk::image
