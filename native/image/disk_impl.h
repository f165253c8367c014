// What a Disk is made of.
//
// Room image/, private to disk.cc and disk_rekey.cc.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "image/disk.h"
#include "image/request_queue.h"
#include "image/request_server.h"
#include "image/sealed_backend.h"
#include "image/throttle.h"

namespace pqblk::image {

// Members in the order of their making; the destructor takes them down the other way round.
struct Disk::Impl {
  Cache cache = Cache::none;
  bool read_only = false;
  io::File file;
  std::string fallback_cause;
  std::string id;
  Throttle throttle;
  std::vector<std::unique_ptr<RequestQueue>> queues;
  std::unique_ptr<RequestQueue> service;  // background work of the backend, open, close
  std::unique_ptr<Backend> backend;
  SealedBackend* sealed = nullptr;  // the same backend, when the disk is sealed
  std::unique_ptr<RequestServer> server;
  Geometry shape;  // as opened: all but its size stays, and that the server knows

  std::mutex control;  // one of close, resize, extents, rekeying at a time
  bool closed = false;
  // The epoch that a whole pass found everything in; 0: none did since the last begin_epoch().
  std::uint32_t verified_epoch = 0;
  Error close_error;

  ~Impl() {
    server.reset();
    backend.reset();
    stop_threads();
    if (file.fd >= 0) storage::close_file(file);
  }

  Error start_queues(const OpenOptions& options);
  Error open_image(OpenOptions& options);
  std::string make_id() const;
  Task<Error> find_extents(std::uint64_t begin, std::uint64_t end, std::size_t max,
                           std::vector<Extent>& out);
  Task<Error> rekey_step(std::uint64_t size, std::uint64_t group, const RekeySpec& spec,
                         RekeyReport& report);
  Task<Error> rekey_group(std::uint64_t begin, std::uint64_t end, const RekeySpec& spec,
                          RekeyReport& report);
  Error check_sealed() const;
  void stop_threads();
  Error closed_error() const { return Error(Kind::closed, "the disk is closed").in(file.path); }
};

}  // namespace pqblk::image
