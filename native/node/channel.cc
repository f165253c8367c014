#include "node/channel.h"

#include <algorithm>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "node/convert.h"

namespace pqblk::node {
namespace {

constexpr std::uint64_t kHeaderBytes = 64;
constexpr std::uint64_t kCompletionBytes = 8;
constexpr std::uint64_t kSubmissionBytes = 32;
constexpr std::uint64_t kArenaAlign = 4096;

constexpr char kOnCompletions[] = "onCompletions";

enum Flags : std::uint32_t { kFua = 1, kUnmap = 2 };

std::uint32_t word(const std::uint8_t* from, std::size_t index) {
  std::uint32_t value;
  std::memcpy(&value, from + index * sizeof value, sizeof value);
  return value;
}

bool known_type(std::uint32_t type) {
  switch (static_cast<image::RequestType>(type)) {
    case image::RequestType::in:
    case image::RequestType::out:
    case image::RequestType::flush:
    case image::RequestType::get_id:
    case image::RequestType::discard:
    case image::RequestType::write_zeroes:
      return true;
  }
  return false;
}

void fill(image::Request& r, std::uint32_t type, std::uint32_t flags, std::uint64_t offset,
          std::uint64_t length) {
  r.type = static_cast<image::RequestType>(type);
  r.fua = (flags & kFua) != 0;
  r.zero_flags = (flags & kUnmap) != 0 ? std::uint32_t{image::kZeroUnmap} : 0;
  r.offset = offset;
  r.length = length;
  r.iov = nullptr;
  r.iov_count = 0;
}

}  // namespace

// Shared by the channel and the ArrayBuffer that JavaScript sees; whoever goes last frees it.
struct ChannelCore::Memory {
  Memory(std::uint32_t slots, std::uint64_t arena)
      : completions(kHeaderBytes),
        submissions(completions + slots * kCompletionBytes),
        arena_offset(align_up(submissions + slots * kSubmissionBytes, kArenaAlign)),
        arena_bytes(arena),
        bytes(align_up(arena_offset + arena, kArenaAlign)),
        data(static_cast<std::uint8_t*>(std::aligned_alloc(kArenaAlign, bytes))) {
    if (data != nullptr) std::memset(data, 0, bytes);
  }
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const std::uint64_t completions, submissions, arena_offset, arena_bytes, bytes;
  std::uint8_t* const data;
  bool given_out = false;  // one ArrayBuffer at most may stand for a piece of memory
};

ChannelCore::ChannelCore(Hub& hub, std::shared_ptr<OpenDisk> owner, std::uint32_t queue,
                         std::uint32_t slots, std::uint64_t arena_bytes)
    : hub_(hub),
      owner_(std::move(owner)),
      queue_(queue),
      memory_(std::make_shared<Memory>(slots, arena_bytes)),
      slots_(slots) {
  for (Slot& slot : slots_) {
    slot.request.context = this;
    slot.request.complete = [](image::Request& r) {
      static_cast<ChannelCore*>(r.context)->completed(r);
    };
  }
  announcement_.context = this;
  announcement_.run = [](image::Deferred& d) { static_cast<ChannelCore*>(d.context)->announce(); };
}

// ---- the environment's thread ----

ChannelCore::Slot* ChannelCore::free_slot(std::uint32_t index) {
  if (index >= slots_.size()) return nullptr;
  Slot& slot = slots_[index];
  return slot.busy.load(std::memory_order_acquire) ? nullptr : &slot;
}

void ChannelCore::add(Slot& slot) {
  slot.busy.store(true, std::memory_order_relaxed);
  slot.request.next = nullptr;
  *batch_end_ = &slot.request;
  batch_end_ = &slot.request.next;
  ++batch_size_;
}

bool ChannelCore::take_entry(const std::uint8_t* entry) {
  const std::uint32_t type = word(entry, 0) & 0xFFU;
  const std::uint32_t flags = word(entry, 0) >> 8;
  Slot* slot = free_slot(word(entry, 1));
  if (slot == nullptr || !known_type(type)) return false;
  const std::uint64_t offset = word(entry, 2) | std::uint64_t{word(entry, 3)} << 32;
  const std::uint64_t length = word(entry, 4) | std::uint64_t{word(entry, 5)} << 32;
  const std::uint64_t at = word(entry, 6);
  fill(slot->request, type, flags, offset, length);
  const auto t = slot->request.type;
  if (t == image::RequestType::in || t == image::RequestType::out ||
      t == image::RequestType::get_id) {
    if (at > memory_->arena_bytes || length > memory_->arena_bytes - at) return false;
    slot->one = {memory_->data + memory_->arena_offset + at, length};
    slot->request.iov = &slot->one;
    slot->request.iov_count = 1;
  }
  add(*slot);
  return true;
}

bool ChannelCore::take_entries(std::uint32_t count) {
  const std::uint8_t* entry = memory_->data + memory_->submissions;
  if (count > slots_.size()) return false;
  for (std::uint32_t i = 0; i < count; ++i, entry += kSubmissionBytes) {
    if (!take_entry(entry)) return false;
  }
  return true;
}

bool ChannelCore::kick() {
  image::Request* const first = std::exchange(batch_, nullptr);
  const std::uint64_t count = std::exchange(batch_size_, 0);
  batch_end_ = &batch_;
  if (first == nullptr) return true;
  const std::shared_ptr<image::Disk> disk = owner_->disk();
  if (disk == nullptr) {
    for (image::Request* r = first; r != nullptr; r = r->next) {
      slots_[static_cast<std::size_t>(reinterpret_cast<Slot*>(r) - slots_.data())].busy = false;
    }
    return false;
  }
  disk_ = disk.get();
  submitted_ += count;
  if (!std::exchange(held_, true)) {
    wrap_->Ref();
    hub_.hold();
  }
  disk_->submit(queue_, first);
  return true;
}

void ChannelCore::notified(Napi::Env env) {
  if (wrap_ == nullptr) return;
  napi_value self = nullptr;
  if (napi_get_reference_value(env, *wrap_, &self) != napi_ok ||
      !call_method(env, self, kOnCompletions, {})) {
    return;
  }
  if (held_ && announced_.load(std::memory_order_acquire) == submitted_) {
    held_ = false;
    hub_.unhold();
    wrap_->Unref();
  }
}

// ---- the queue's thread ----

void ChannelCore::completed(image::Request& request) {
  auto* slot = reinterpret_cast<Slot*>(&request);
  const auto index = static_cast<std::uint32_t>(slot - slots_.data());
  const auto result =
      request.status == image::Status::ok ? 0 : -static_cast<std::int32_t>(request.error.kind());
  std::uint8_t* const entry =
      memory_->data + memory_->completions + completed_ % slots_.size() * kCompletionBytes;
  std::memcpy(entry, &index, sizeof index);
  std::memcpy(entry + sizeof index, &result, sizeof result);
  slot->busy.store(false, std::memory_order_release);
  ++completed_;
  // JavaScript reads this word with Atomics.load.
  std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(memory_->data))
      .store(static_cast<std::uint32_t>(completed_), std::memory_order_release);
  disk_->defer(queue_, announcement_);
}

void ChannelCore::announce() {
  // Once announced, JavaScript may let go of the channel.
  const std::shared_ptr<Notifier> keep = shared_from_this();
  announced_.store(completed_, std::memory_order_release);
  hub_.post(*this);
}

// ---- the JavaScript class ----

namespace {

// Hands the parts of a new channel to its constructor, which JavaScript must not call by itself.
struct Making {
  std::shared_ptr<ChannelCore> core;
  Napi::Function on_completions;
};
thread_local Making* making = nullptr;

bool to_slot_and_type(const Napi::CallbackInfo& info, std::uint32_t& slot, std::uint32_t& type,
                      std::uint32_t& flags) {
  return napi_get_value_uint32(info.Env(), info[0], &slot) == napi_ok &&
         napi_get_value_uint32(info.Env(), info[1], &type) == napi_ok &&
         napi_get_value_uint32(info.Env(), info[2], &flags) == napi_ok && known_type(type);
}

bool memory_of(Napi::Env env, napi_value value, iovec& out) {
  napi_typedarray_type type{};
  void* data = nullptr;
  std::size_t length = 0;
  if (napi_get_typedarray_info(env, value, &type, &length, &data, nullptr, nullptr) != napi_ok ||
      type != napi_uint8_array) {
    return false;
  }
  out = {data, length};
  return true;
}

// A Uint8Array, or a list of them, becomes the request's scatter list.
bool set_buffers(Napi::Env env, const Napi::Value& value, ChannelCore::Slot& slot) {
  image::Request& r = slot.request;
  if (!value.IsArray()) {
    if (!memory_of(env, value, slot.one)) return false;
    r.iov = &slot.one;
    r.iov_count = 1;
    r.length = slot.one.iov_len;
    return true;
  }
  const auto list = value.As<Napi::Array>();
  slot.many.resize(list.Length());
  r.length = 0;
  for (std::uint32_t i = 0; i < list.Length(); ++i) {
    if (!memory_of(env, list.Get(i), slot.many[i])) return false;
    r.length += slot.many[i].iov_len;
  }
  r.iov = slot.many.data();
  r.iov_count = static_cast<std::uint32_t>(slot.many.size());
  return true;
}

}  // namespace

Napi::Function Channel::define(Napi::Env env) {
  return DefineClass(
      env, "Channel",
      {InstanceMethod<&Channel::add>("add"), InstanceMethod<&Channel::kick>("kick"),
       InstanceMethod<&Channel::error>("error"), InstanceMethod<&Channel::memory>("memory")});
}

Napi::Value Channel::make(Napi::Env env, std::shared_ptr<OpenDisk> disk, std::uint32_t queue,
                          std::uint32_t slots, std::uint64_t arena_bytes,
                          const Napi::Function& on_completions) {
  EnvState& state = EnvState::of(env);
  Making parts{std::make_shared<ChannelCore>(state.hub, std::move(disk), queue, slots, arena_bytes),
               on_completions};
  making = &parts;
  const Napi::Value channel = state.channel_class.New({});
  making = nullptr;
  return channel;
}

Channel::Channel(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  if (making == nullptr) {
    throw_type_error(info.Env(), "a Channel is made by a disk");
    return;
  }
  core_ = std::move(making->core);
  core_->wrap_ = this;
  // On the object itself, where the collector sees it: a reference of ours from here to a function
  // that reaches this object would keep both, and the disk, for ever.
  info.This().As<Napi::Object>().Set(kOnCompletions, making->on_completions);
}

Channel::~Channel() {
  if (core_ != nullptr) core_->wrap_ = nullptr;
}

// add(slot, type, flags, offset, buffer | buffers | length)
Napi::Value Channel::add(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  std::uint32_t index = 0, type = 0, flags = 0;
  double offset = 0;
  if (!to_slot_and_type(info, index, type, flags) ||
      napi_get_value_double(env, info[3], &offset) != napi_ok || !(offset >= 0)) {
    throw_type_error(env, "add(slot, type, flags, offset, data)");
    return env.Undefined();
  }
  ChannelCore::Slot* slot = core_->free_slot(index);
  if (slot == nullptr) {
    throw_type_error(env, "no such slot, or it is in use");
    return env.Undefined();
  }
  fill(slot->request, type, flags, static_cast<std::uint64_t>(offset), 0);
  double length = 0;
  const bool has_data = napi_get_value_double(env, info[4], &length) != napi_ok;
  if (has_data && !set_buffers(env, info[4], *slot)) {
    throw_type_error(env, "expected a Uint8Array, a list of them, or a length");
    return env.Undefined();
  }
  if (!has_data) slot->request.length = length >= 0 ? static_cast<std::uint64_t>(length) : 0;
  core_->add(*slot);
  return env.Undefined();
}

// kick(entries): takes that many submission entries, hands everything over. False: closed.
Napi::Value Channel::kick(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  std::uint32_t entries = 0;
  const bool ok =
      napi_get_value_uint32(env, info[0], &entries) == napi_ok && core_->take_entries(entries);
  const bool open = core_->kick();
  if (!ok) throw_type_error(env, "kick: a submission entry is malformed or its slot is in use");
  return Napi::Boolean::New(env, open);
}

// error(slot): why the slot's last request failed.
Napi::Value Channel::error(const Napi::CallbackInfo& info) {
  std::uint32_t index = 0;
  napi_get_value_uint32(info.Env(), info[0], &index);
  if (core_->free_slot(index) == nullptr) return info.Env().Undefined();
  return error_to_js(info.Env(), core_->request(index).error);
}

// memory(): { buffer, completions, submissions, arena, arenaBytes }
Napi::Value Channel::memory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto memory = core_->memory();
  if (memory->data == nullptr || std::exchange(memory->given_out, true)) {
    throw_type_error(env, "no memory for the channel, or it was taken already");
    return env.Undefined();
  }
  auto* shared = new std::shared_ptr<ChannelCore::Memory>(memory);
  const Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(
      env, memory->data, memory->bytes,
      [](Napi::Env, void*, std::shared_ptr<ChannelCore::Memory>* held) { delete held; }, shared);
  const Napi::Object out = Napi::Object::New(env);
  if (env.IsExceptionPending()) return env.Undefined();
  out.Set("buffer", buffer);
  out.Set("completions", static_cast<double>(memory->completions));
  out.Set("submissions", static_cast<double>(memory->submissions));
  out.Set("arena", static_cast<double>(memory->arena_offset));
  out.Set("arenaBytes", static_cast<double>(memory->arena_bytes));
  return out;
}

}  // namespace pqblk::node
