// A queue on a thread of its own; see queue_thread.h.

#include "io/queue_thread.h"

#include <system_error>

#include "io/thread_setup.h"

namespace pqblk::io {

Result<std::unique_ptr<QueueThread>> QueueThread::start(const QueueOptions& options, unsigned index,
                                                        std::string* fallback_cause) {
  Result<std::unique_ptr<Queue>> queue = make_queue(options, fallback_cause);
  if (!queue) return queue.take_error();
  return start(std::move(*queue), index);
}

Result<std::unique_ptr<QueueThread>> QueueThread::start(std::unique_ptr<Queue> queue,
                                                        unsigned index) {
  std::unique_ptr<QueueThread> self(new QueueThread(std::move(queue)));
  try {
    self->thread_ = std::thread([q = self->queue_.get(), index] {
      set_up_thread(("pqblk-q" + std::to_string(index)).c_str());
      q->run();
    });
  } catch (const std::system_error& error) {
    return Error::from_errno(error.code().value(), "start queue thread");
  }
  return self;
}

void QueueThread::stop() {
  if (!thread_.joinable()) return;
  assert(Executor::current() != queue_.get());
  queue_->stop();
  thread_.join();
}

}  // namespace pqblk::io
