// What is put to the test: how to create, open and steer an image in the simulator.
//
// Room test/sim. Whoever tests a format fills one of these; the runners (crash_runs.h, scope.h,
// planted.h) do the rest. The functions may be called for many worlds; they keep no world in mind.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "base/task.h"
#include "image/backend.h"
#include "io/queue.h"
#include "sim/model.h"
#include "sim/pages.h"
#include "sim/world.h"

namespace pqblk::sim {

struct Subject {
  std::string name;
  std::uint64_t sectors = 16;  // guest size in 4096-byte sectors
  std::uint64_t sectors_per_cluster = 16;
  std::uint32_t unit = kSectorSize;  // ModelOptions
  bool open_is_durable = true;
  bool kill_keeps = true;
  bool backed = false;
  bool discard_zeroes = true;  // false: a discarded sector may keep its content
  FileFacts file;

  // Makes a new image in an empty file; called once for a series of runs, in a quiet world of one
  // queue.
  std::function<Task<Error>(io::Queue& io, const io::File& file)> create;
  // Opens (and recovers) it. `service` is the last queue of the world; the guest's are 0, 1, ...
  std::function<Task<Result<std::unique_ptr<image::Backend>>>(image::QueueContext& service,
                                                              const io::File& file)>
      open;

  // ---- optional ----
  // Work that is not a guest's request; `full` as in sealed-format's full checkpoint.
  std::function<Task<Error>(image::Backend&, image::QueueContext&, bool full)> checkpoint;
  // Moves a cluster to a new host place. Runs under the range lock of that cluster.
  std::function<Task<Error>(image::Backend&, image::QueueContext&, std::uint64_t cluster)> relocate;
  // A run begins: reset tracers, seed the random source. The seed is the run's.
  std::function<void(std::uint64_t seed)> begin_run;
  // Asked after every life; not empty: what is wrong (a nonce that repeated).
  std::function<std::string()> verdict;
  // Looks into an image that was closed cleanly (refcounts), in a quiet world of its own. An image
  // that crashed before may have leaked clusters.
  std::function<Task<Error>(image::QueueContext& q, const io::File& file, bool leaks_allowed)>
      check_closed;
};

inline ModelOptions model_options(const Subject& subject) {
  return {.sectors = subject.sectors,
          .unit = subject.unit,
          .open_is_durable = subject.open_is_durable,
          .kill_keeps = subject.kill_keeps,
          .backed = subject.backed};
}

// Tells the allocator to keep large blocks: lives come and go too fast for mmap and page faults.
void keep_memory();

// The image `create` makes, durable. `error` is set when it fails.
Device fresh_image(const Subject& subject, std::string& error);

}  // namespace pqblk::sim
