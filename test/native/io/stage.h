// An engine under test together with a place for its files, and an oracle that goes around it.
//
// Room test/io. The conformance suite speaks only to this; stages() lists one maker for each
// engine, the simulator included.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/task.h"
#include "io/queue.h"

namespace pqblk::io::test {

using Bytes = std::vector<std::uint8_t>;

class Stage {
 public:
  virtual ~Stage() = default;
  virtual Queue& queue() = 0;
  // A fresh file of `size` zero bytes; it lives as long as the stage.
  virtual File& make_file(std::uint64_t size, bool direct) = 0;
  // Runs the coroutine on the queue's thread to its end.
  virtual Error run(const std::function<Task<Error>()>& body) = 0;
  // The oracle: content and size by other means than the engine's. Beyond the end: zeros.
  virtual Bytes peek(const File& file, std::uint64_t offset, std::size_t size) = 0;
  virtual void poke(File& file, std::uint64_t offset, std::span<const std::uint8_t> data) = 0;
  virtual std::uint64_t size_of(const File& file) = 0;
};

struct StageType {
  std::string name;
  bool real;  // the kernel's files: any offset, size and mode works
  std::function<std::unique_ptr<Stage>(std::uint32_t depth)> make;
};
const std::vector<StageType>& stages();
std::unique_ptr<Stage> make_real_stage(const QueueOptions& options);

// Where tests put files: $TMPDIR or /tmp (a disk, as a rule).
std::string scratch_directory();

// Reproducible bytes that differ with the seed and from place to place.
Bytes pattern(std::uint64_t seed, std::size_t size);

// A small random source (xorshift64*), the same on every machine.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
  std::uint64_t next();
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }

 private:
  std::uint64_t state_;
};

// Starts `tasks` together and waits for all; the first error wins.
Task<Error> all_of(Queue& queue, std::vector<Task<Error>> tasks);

}  // namespace pqblk::io::test
