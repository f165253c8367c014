// A sealed disk on a quiet simulated device, for tests that look at or change its bytes.
//
// Room test/sealed. A Lab opens one image in a world of its own; image() is what it has become.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "sealed/sealed_subject.h"
#include "sim/choices.h"
#include "sim/device.h"
#include "sim/model.h"
#include "sim/world.h"

namespace pqblk::test {

// Where things are, from the image's own bytes.
struct Places {
  sealed::Extension extension;
  std::uint64_t l1 = 0, refcount_table = 0;
  std::vector<std::uint64_t> l2;  // of each L1 entry
  std::uint64_t slot(std::uint64_t n) const { return l2[n / per_table] + n % per_table * 8; }
  std::uint64_t per_table = 0;
};
Places places_of(const sim::Pages& image);
std::uint64_t load64(const sim::Pages& image, std::uint64_t at);

class Lab {
 public:
  explicit Lab(const SealedShape& shape, sim::Device image = {});
  ~Lab();  // closes
  Lab(const Lab&) = delete;

  Error create();
  Error open(bool read_only = false);
  Error open(image::SealedOptions options);
  Error close();
  bool is_open() const { return backend_ != nullptr; }

  Error write(std::uint64_t sector, std::uint64_t version, std::uint64_t count = 1);
  Error zero(std::uint64_t sector, std::uint64_t count = 1);
  Error flush();
  Error checkpoint();
  Error begin_epoch(std::uint32_t epoch);
  // What the sector holds; all its blocks are alike, or it counts as garbage.
  Error read(std::uint64_t sector, sim::Seen& seen);
  // Short for messages and comparisons: "v7", "zeros", "garbage", or the error's kind.
  std::string look(std::uint64_t sector);
  std::vector<std::string> look_at_all();

  image::SealedBackend& backend() { return *backend_; }
  const sim::Device& image() { return world_.device(*file_); }
  template <class T>
  T run(Task<T> task, T fallback) {
    return world_.run(std::move(task), std::move(fallback));
  }
  image::QueueContext& queue() { return *q_; }
  sim::World& world() { return world_; }
  const io::File& file() { return *file_; }

 private:
  const SealedShape shape_;
  sim::QuietChoices quiet_;
  sim::World world_{quiet_};
  std::unique_ptr<image::QueueContext> q_;
  io::File* file_ = nullptr;
  std::unique_ptr<image::SealedBackend> backend_;
};

// The image that a power loss leaves which loses nothing that was written.
sim::Device killed(const sim::Device& device);

}  // namespace pqblk::test
