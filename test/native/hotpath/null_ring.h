// A queue over a device that takes no time: the engine's run loop and operation state machine as
// they are, without a kernel below.
//
// Room test/hotpath: for measuring what the engine itself costs. Until NullDevice::begin() every
// operation is an ordinary system call, so that images are made, filled and opened for real. From
// then on reads are answered in batches on the queue's own thread, once a turn of the loop, as a
// ring's completions are: either with nothing but the number of bytes (`Answer::count`), or with
// the file's content from a mapping (`Answer::content`), as far as it was mapped. That copy stands
// for the device's DMA; the time it takes is measured, for the caller to take off. Flushes are
// answered at once; writes stay system calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "io/queue.h"

namespace pqblk::test {

enum class Answer : std::uint8_t { system_call, count, content };

class NullDevice {
 public:
  explicit NullDevice(bool counting_clock = false) : counting_clock_(counting_clock) {}
  ~NullDevice();
  // For OpenOptions::make_ring. The device outlives the queue.
  Result<std::unique_ptr<io::Queue>> make_ring(const io::QueueOptions& options);

  // The rings' threads are idle. Maps the file where content is wanted; it may be gone afterwards.
  Error begin(Answer answer, const std::string& path);

  // What answering cost, on one ring; read while that ring's thread is idle. Nanoseconds for one
  // operation in the middle of all batches (a median: a batch that was interrupted does not count).
  double ns_per_operation() const;
  void forget_times() { batches_.clear(); }

 private:
  friend class NullRing;
  int answer(const io::Op& op) const;

  const bool counting_clock_;
  std::atomic<Answer> answer_{Answer::system_call};
  const std::uint8_t* content_ = nullptr;
  std::size_t size_ = 0;
  std::vector<double> batches_;  // of the one ring that is busy
};

}  // namespace pqblk::test
