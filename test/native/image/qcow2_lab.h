// A bench for QCOW2 tests: real files, a real queue, and qemu-img as the peer and oracle.
//
// Room test/image. Every helper that cannot fail in a correct set-up ends the test run when it
// does.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "format/qcow2/check.h"
#include "format/qcow2/create.h"
#include "image/backend.h"
#include "image/qcow2_backend.h"
#include "io/queue_thread.h"
#include "io/stage.h"

namespace pqblk::image::test {

using Bytes = std::vector<std::uint8_t>;
using Random = io::test::Random;
namespace qcow2 = format::qcow2;

struct Shell {
  int code = 0;
  std::string output;  // stdout and stderr
};
Shell run_command(const std::string& command);

class Lab {
 public:
  explicit Lab(io::EngineType engine = io::EngineType::automatic);
  ~Lab();  // removes its directory

  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  Bytes load(const std::string& name) const;
  void save(const std::string& name, const Bytes& bytes) const;
  // qemu-img ARGS in the lab's directory; must succeed.
  std::string qemu_img(const std::string& args) const;
  // Content of an image as qemu-img reads it; `snapshot` by name.
  Bytes qemu_read(const std::string& name, const std::string& snapshot = {}) const;
  // "" when `qemu-img check` finds neither corruptions nor leaks, else its output.
  std::string qemu_check(const std::string& name) const;

  Error create(const std::string& name, const qcow2::CreateOptions& options);
  // The gate allows everything inside the lab's directory.
  Error open(const std::string& name, bool read_only = false,
             const std::string& backing_format = {}, bool direct = false,
             std::uint64_t l2_cache = 32 * kMiB);
  Error close();
  Backend& disk() { return *backend_; }
  std::uint64_t size() const { return backend_->geometry().size; }

  Error write(std::uint64_t offset, const Bytes& data, bool fua = false);
  Bytes read(std::uint64_t offset, std::uint64_t size);  // must succeed
  Error try_read(std::uint64_t offset, Bytes& out);
  Error flush();
  Result<qcow2::CheckReport> check(const std::string& name, bool repair);

  template <class Body>
  auto run(Body&& body) {
    return thread_->run_sync(std::forward<Body>(body));
  }
  QueueContext& context() { return *context_; }
  io::Queue& queue() { return thread_->queue(); }

 private:
  std::string directory_;
  std::unique_ptr<io::QueueThread> thread_;
  std::unique_ptr<QueueContext> context_;
  io::File file_;
  std::unique_ptr<Backend> backend_;
};

// Bytes with runs of zeros, of one value, and of noise, so that every kind of cluster comes up.
Bytes mixed_content(Random& random, std::uint64_t size);

struct ExerciseOptions {
  std::uint32_t rounds = 40;
  std::uint32_t parallel = 6;  // requests at once, disjoint
  std::uint64_t request_max = 200 * 1024;
  bool flushes = true;
};

// Random writes, discards, zeroes and flushes against `model`, compared after each round.
void exercise(Lab& lab, Bytes& model, Random& random, const ExerciseOptions& options = {});

// The first difference, for messages; "" when equal.
std::string difference(const Bytes& a, const Bytes& b);

}  // namespace pqblk::image::test
