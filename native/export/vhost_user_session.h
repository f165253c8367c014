// One connection of a front-end: what it agreed on, its memory, its rings.
//
// Room export/: gives each message of the protocol its meaning. One thread runs a session from its
// first message to the last; rings run on the disk's queues. When the front-end goes away, in the
// middle of anything, requests in flight complete before the memory they touch is unmapped.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "export/vhost_user_protocol.h"
#include "export/vhost_user_vring.h"
#include "export/virtio_blk.h"

namespace pqblk::exports {

// What all sessions of a server share.
struct VhostDevice {
  image::Disk& disk;
  std::uint32_t queues;  // rings
  ReportLog& log;
  std::span<VringCounters> counters;  // one for each ring
  // What a front-end chose of the cache, which it does not say again to the next session.
  std::atomic<bool>& writeback;
};

class VhostSession {
 public:
  VhostSession(VhostDevice device, UniqueFd socket);
  ~VhostSession();

  // Any thread: the front-end shall read the configuration again, if it listens for that.
  void config_changed();

  // Serves the front-end until it goes, breaks the protocol, or `stop_fd` is readable. `knock` is
  // called when `listen_fd` has somebody else.
  template <class Knock>
  void run(int stop_fd, int listen_fd, Knock knock) {
    for (;;) {
      std::string why;
      const Received got = socket_.receive(message_, stop_fd, listen_fd, knock, why);
      if (got == Received::refused) say(why);
      if (got == Received::stopped) return end(true);
      if (got != Received::message || !serve()) break;
    }
    end(false);
  }

 private:
  struct Ring {
    std::unique_ptr<Vring> vring;
    std::uint32_t size = 0;
    std::optional<vu::VringAddress> address;
    std::uint32_t base = 0;
    bool kick_set = false;
    UniqueFd kick;
    bool enabled = false;
  };

  void say(const std::string& what) const;
  void end(bool orderly);
  bool serve();
  Error handle();
  Error handle_memory();
  Error handle_vring();
  Error answer(std::uint64_t value);
  Error answer_config();
  Error set_features(std::uint64_t features);
  Error set_config();
  Error set_channel();
  Error set_mem_table();
  Error add_region();
  Error remove_region();
  template <class Change>
  Error with_rings_stopped(Change change);
  Error set_log_base();
  void keep_writeback();
  Error get_inflight();
  Error set_inflight();
  Error set_address(const vu::VringAddress& address);
  Error set_event(vu::Type type);
  Error set_kick(std::uint32_t index, UniqueFd fd);
  Error get_base(std::uint32_t index);
  Error reset_device();
  Error refresh(std::uint32_t index);
  void halt(Ring& ring, bool orderly);
  std::optional<std::uint64_t> inflight_offset(std::uint32_t index) const;
  Result<RingSetup> setup_of(std::uint32_t index);
  std::optional<std::uint64_t> log_address(const Ring& ring) const;
  std::shared_ptr<DirtyLog> active_log() const;
  void renew_logs();
  template <class T>
  Result<T> payload() const {
    const auto value = message_.as<T>();
    if (value) return *value;
    return Error(Kind::invalid_argument,
                 "its payload has " + std::to_string(message_.header.size) + " bytes");
  }
  Result<std::uint32_t> ring_index(std::uint64_t index) const;

  const VhostDevice device_;
  VirtioBlk blk_;
  VhostSocket socket_;
  vu::Message message_;
  bool replied_ = false;
  bool lost_ = false;  // the front-end does not take replies
  bool told_ = false;  // the front-end knows the configuration, from here or a server before this

  std::uint64_t offered_ = 0, features_ = 0, protocol_features_ = 0;
  std::mutex channel_lock_;
  std::optional<VhostSocket> channel_;  // to the front-end, for what it did not ask
  GuestMemory memory_;
  std::shared_ptr<DirtyLog> log_;
  struct {
    SharedMapping mapping;
    vu::Inflight shape{};
    void* device = nullptr;  // the part in `mapping` that is about no ring
  } inflight_;
  std::vector<Ring> rings_;
};

}  // namespace pqblk::exports
