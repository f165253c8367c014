// A channel: the memory and the requests through which JavaScript feeds one queue of a disk.
//
// Room node/. Each channel has `slots` requests. JavaScript picks a free slot for each operation
// and hands it over in one of two ways: add() takes a JavaScript buffer (one native call an
// operation, nothing reaches the queue before kick()), or entries written to the shared memory are
// taken by kick(count) as a batch. Completions are written to the shared memory by the queue's
// thread and announced once a batch.
//
// Shared memory, little-endian, in this order (all offsets in channel.cc and src/disk/channel.ts):
//   64 bytes           word 0: number of completions so far (mod 2^32)
//   slots x 8 bytes    completions, at (number mod slots): slot, result (0 or -kind)
//   slots x 32 bytes   submissions: type | flags << 8, slot, offset (2 words), length (2 words),
//                      arena offset, 0
//   arena              4096-aligned memory for data
#pragma once

#include <napi.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "node/env.h"

namespace pqblk::node {

inline constexpr std::uint32_t kChannelSlotsMax = 4096;
inline constexpr std::uint64_t kChannelArenaMax = 1 * kGiB;

class Channel;

class ChannelCore final : public Notifier {
 public:
  ChannelCore(Hub& hub, std::shared_ptr<OpenDisk> owner, std::uint32_t queue, std::uint32_t slots,
              std::uint64_t arena_bytes);

  struct Memory;
  struct Slot {
    image::Request request;
    iovec one{};
    std::vector<iovec> many;
    std::atomic<bool> busy{false};  // from submission to completion
  };

  std::shared_ptr<Memory> memory() const { return memory_; }
  Slot* free_slot(std::uint32_t index);  // null: no such slot, or it is in use
  void add(Slot& slot);                  // joins the next batch
  bool take_entries(
      std::uint32_t count);  // false: an entry is malformed; those before it are taken
  bool kick();               // false: the disk is closed; nothing was submitted
  const image::Request& request(std::uint32_t index) const { return slots_[index].request; }
  std::uint32_t slots() const { return static_cast<std::uint32_t>(slots_.size()); }

 private:
  friend class Channel;
  bool take_entry(const std::uint8_t* entry);
  void completed(image::Request& request);  // the queue's thread
  void announce();                          // the queue's thread
  void notified(Napi::Env env) override;

  Hub& hub_;
  const std::shared_ptr<OpenDisk> owner_;
  // Of the batch in flight; the owner keeps it until everything in flight has completed.
  image::Disk* disk_ = nullptr;
  const std::uint32_t queue_;
  std::shared_ptr<Memory> memory_;
  std::vector<Slot> slots_;

  // The environment's thread.
  Channel* wrap_ = nullptr;
  bool held_ = false;
  image::Request* batch_ = nullptr;
  image::Request** batch_end_ = &batch_;
  std::uint64_t batch_size_ = 0;
  std::uint64_t submitted_ = 0;

  // The queue's thread.
  image::Deferred announcement_;
  std::uint64_t completed_ = 0;
  std::atomic<std::uint64_t> announced_{0};
};

// JavaScript: made by Disk handles only.
class Channel : public Napi::ObjectWrap<Channel> {
 public:
  static Napi::Function define(Napi::Env env);
  // `on_completions` is called with no arguments once for each batch.
  static Napi::Value make(Napi::Env env, std::shared_ptr<OpenDisk> disk, std::uint32_t queue,
                          std::uint32_t slots, std::uint64_t arena_bytes,
                          const Napi::Function& on_completions);
  explicit Channel(const Napi::CallbackInfo& info);
  ~Channel() override;

 private:
  friend class ChannelCore;
  Napi::Value add(const Napi::CallbackInfo& info);
  Napi::Value kick(const Napi::CallbackInfo& info);
  Napi::Value error(const Napi::CallbackInfo& info);
  Napi::Value memory(const Napi::CallbackInfo& info);

  std::shared_ptr<ChannelCore> core_;
};

}  // namespace pqblk::node
