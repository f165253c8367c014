#include "export/vhost_user_session.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace pqblk::exports {
namespace {

using vu::Type;

constexpr std::uint64_t kProtocolFeatures = vu::kProtocolMultiQueue | vu::kProtocolLogShmFd |
                                            vu::kProtocolReplyAck | vu::kProtocolBackendChannel |
                                            vu::kProtocolConfig | vu::kProtocolInflight |
                                            vu::kProtocolResetDevice | vu::kProtocolMemSlots;
constexpr std::uint64_t kRingFeatures =
    kFeatureIndirect | kFeatureEventIdx | kFeatureVersion1 | kFeaturePacked;

// Behind the rings' parts of an in-flight region: what the front-end relies on and does not say
// again to the server that comes after a crash.
struct InflightDevice {
  char mark[7];
  char cache;
  std::uint8_t unused[56];
};
static_assert(sizeof(InflightDevice) == 64);
constexpr char kInflightMark[] = {'p', 'q', 'b', 'l', 'k', '-', '1'};
constexpr char kWriteBack = 'b', kWriteThrough = 't';

Error misuse(std::string what) { return Error(Kind::invalid_argument, std::move(what)); }

}  // namespace

VhostSession::VhostSession(VhostDevice device, UniqueFd socket)
    : device_(std::move(device)),
      blk_(device_.disk, static_cast<std::uint16_t>(device_.queues), &device_.log),
      socket_(std::move(socket)),
      offered_(blk_.features() | kRingFeatures | vu::kFeatureLogAll | vu::kFeatureProtocol),
      rings_(device_.queues) {
  const std::uint32_t disk_queues = device_.disk.facts().queues;
  for (std::uint32_t i = 0; i < device_.queues; ++i) {
    rings_[i].vring =
        std::make_unique<Vring>(device_.disk, blk_, i % disk_queues, device_.counters[i]);
  }
  blk_.choose_writeback(device_.writeback.load(std::memory_order_relaxed));
}

VhostSession::~VhostSession() { end(false); }

void VhostSession::say(const std::string& what) const { device_.log.say("vhost-user: " + what); }

// In order: a front-end that is there gets the answers of all that is done.
void VhostSession::end(bool orderly) {
  for (Ring& ring : rings_) halt(ring, orderly);
  memory_.clear();
}

// ---- messages ----

// False: the connection ends.
bool VhostSession::serve() {
  replied_ = lost_ = false;
  // A reply is built in the message itself.
  const std::uint32_t type = message_.header.type;
  const bool wants_ack = (message_.header.flags & vu::kNeedReply) != 0 &&
                         (protocol_features_ & vu::kProtocolReplyAck) != 0;
  const Error error = handle();
  message_.fds.clear();
  if (error) say("message " + std::to_string(type) + ": " + error.to_string());
  if (lost_) return false;
  if (replied_) return true;
  if (!wants_ack) return !error;  // it cannot learn otherwise that this went wrong
  return !answer(error ? 1 : 0) && !lost_;
}

Error VhostSession::answer(std::uint64_t value) {
  message_.set(value);
  replied_ = true;
  lost_ = !socket_.reply(message_);
  return {};
}

Error VhostSession::handle() {
  switch (message_.type()) {
    case Type::get_features:
      return answer(offered_);
    case Type::get_protocol_features:
      return answer(kProtocolFeatures);
    case Type::get_queue_num:
      return answer(device_.queues);
    case Type::get_max_mem_slots:
      return answer(kMemorySlotsMax);
    case Type::set_features: {
      const auto features = payload<std::uint64_t>();
      return features ? set_features(*features) : features.error();
    }
    case Type::set_protocol_features: {
      const auto features = payload<std::uint64_t>();
      if (!features) return features.error();
      if ((*features & ~kProtocolFeatures) != 0) return misuse("protocol features not offered");
      protocol_features_ = *features;
      return {};
    }
    case Type::set_owner:
      return {};
    case Type::reset_owner:  // "disable all rings" is what is left of its meaning
      for (std::uint32_t i = 0; i < device_.queues; ++i) {
        rings_[i].enabled = false;
        halt(rings_[i], true);
      }
      return {};
    case Type::reset_device:
      return reset_device();
    case Type::get_config:
      return answer_config();
    case Type::set_config:
      return set_config();
    case Type::set_backend_fd:
      return set_channel();
    default:
      return handle_memory();
  }
}

Error VhostSession::set_features(std::uint64_t features) {
  if ((features & ~offered_) != 0) return misuse("features that were not offered");
  const bool ring_format = ((features ^ features_) & (kRingFeatures | blk_.features())) != 0;
  for (const Ring& ring : rings_) {
    if (ring.vring->running() && ring_format) return misuse("features change while a ring runs");
  }
  features_ = features;
  blk_.negotiated(features);
  renew_logs();
  return {};
}

Error VhostSession::answer_config() {
  const auto asked = payload<vu::Config>();
  const bool sane = asked && asked->size <= vu::kConfigMax && asked->offset <= vu::kConfigMax &&
                    message_.header.size == sizeof(vu::Config) + asked->size;
  if (sane) {
    told_ = true;
    blk_.read_config(asked->offset, {message_.payload.data() + sizeof(vu::Config), asked->size});
  } else {
    message_.header.size = 0;  // which is how this request learns of an error
  }
  replied_ = true;
  lost_ = !socket_.reply(message_);
  return sane ? Error() : misuse("a part of the configuration that is not there");
}

Error VhostSession::set_config() {
  const auto given = payload<vu::Config>();
  if (!given || given->size > vu::kConfigMax ||
      message_.header.size != sizeof(vu::Config) + given->size) {
    return misuse("a part of the configuration that is not there");
  }
  const auto bytes = message_.bytes().subspan(sizeof(vu::Config), given->size);
  if (Error e = blk_.write_config(given->offset, bytes)) return e;
  told_ = true;
  keep_writeback();
  return {};
}

// For the sessions to come, of this server and of one after a crash.
void VhostSession::keep_writeback() {
  const bool on = blk_.chosen_writeback();
  device_.writeback.store(on, std::memory_order_relaxed);
  if (inflight_.device == nullptr) return;
  std::atomic_ref<char>(static_cast<InflightDevice*>(inflight_.device)->cache)
      .store(on ? kWriteBack : kWriteThrough, std::memory_order_release);
}

Error VhostSession::set_channel() {
  if (message_.fds.size() != 1 || !is_stream_socket(message_.fds[0].get())) {
    return misuse("a back-end's channel comes as one Unix socket");
  }
  const std::lock_guard guard(channel_lock_);
  channel_.emplace(std::move(message_.fds[0]));
  return {};
}

void VhostSession::config_changed() {
  const std::lock_guard guard(channel_lock_);
  // Half a message is the end of a channel; whoever does not read learns of it no more.
  if (channel_ && !channel_->notify(vu::Notice::config_changed)) channel_.reset();
}

Error VhostSession::reset_device() {
  for (Ring& ring : rings_) {
    halt(ring, true);
    ring.vring->set_call({});
    ring.vring->set_error({});
    std::unique_ptr<Vring> same = std::move(ring.vring);
    ring = Ring();
    ring.vring = std::move(same);
  }
  inflight_ = {};
  features_ = 0;
  blk_.negotiated(std::nullopt);  // what was chosen stays: QEMU remembers it over a reset
  return {};
}

// ---- dirty log ----

std::shared_ptr<DirtyLog> VhostSession::active_log() const {
  return (features_ & vu::kFeatureLogAll) != 0 ? log_ : nullptr;
}

std::optional<std::uint64_t> VhostSession::log_address(const Ring& ring) const {
  if (!ring.address || (ring.address->flags & vu::kVringLog) == 0) return std::nullopt;
  return ring.address->log;
}

void VhostSession::renew_logs() {
  for (Ring& ring : rings_) {
    if (ring.vring->running()) ring.vring->set_log(active_log(), log_address(ring));
  }
}

Error VhostSession::set_log_base() {
  const auto where = payload<vu::Log>();
  if (!where) return where.error();
  if (message_.fds.size() != 1) return misuse("a dirty log comes with one descriptor");
  auto log = DirtyLog::map(message_.fds[0].get(), where->offset, where->size);
  if (!log) return log.take_error();
  log_ = std::move(*log);
  renew_logs();  // nobody uses the old one after this
  return answer(0);
}

// ---- requests in flight ----

Error VhostSession::get_inflight() {
  const auto asked = payload<vu::Inflight>();
  if (!asked) return asked.error();
  if (asked->queues == 0 || asked->queues > device_.queues || asked->ring_size == 0 ||
      asked->ring_size > kRingSizeMax) {
    return misuse("a region for " + std::to_string(asked->queues) + " rings of " +
                  std::to_string(asked->ring_size));
  }
  vu::Inflight shape = *asked;
  shape.offset = 0;
  const std::uint64_t rings = InflightRegion::bytes(asked->ring_size) * asked->queues;
  shape.size = rings + sizeof(InflightDevice);
  auto memory = make_sealed_memory("pqblk-inflight", shape.size);
  if (!memory) return memory.take_error();
  // Who has not asked here what the cache is like has asked a server before this one, or told it.
  if (!told_) blk_.choose_writeback(false);
  InflightDevice device{};
  std::memcpy(device.mark, kInflightMark, sizeof kInflightMark);
  device.cache = blk_.chosen_writeback() ? kWriteBack : kWriteThrough;
  const auto at = static_cast<off_t>(rings);
  if (::pwrite(memory->get(), &device, sizeof device, at) != sizeof device) {
    return Error::from_errno(errno, "write the in-flight region");
  }
  message_.set(shape);
  replied_ = true;
  lost_ = !socket_.reply(message_, memory->get());
  return {};
}

Error VhostSession::set_inflight() {
  const auto shape = payload<vu::Inflight>();
  if (!shape) return shape.error();
  for (const Ring& ring : rings_) {
    if (ring.vring->running()) return misuse("the in-flight region changes while a ring runs");
  }
  if (message_.fds.size() != 1) return misuse("an in-flight region comes with one descriptor");
  const std::uint64_t bytes = InflightRegion::bytes(shape->ring_size) * shape->queues;
  if (shape->ring_size > kRingSizeMax || shape->queues > device_.queues || shape->size < bytes ||
      shape->offset % 64 != 0 || shape->offset > kLogBytesMax) {
    return misuse("an in-flight region of another shape than was given out");
  }
  if (bytes == 0) {
    inflight_ = {};
    return {};
  }
  const bool has_device = shape->size >= bytes + sizeof(InflightDevice);
  const std::uint64_t used = bytes + (has_device ? sizeof(InflightDevice) : 0);
  auto mapping = SharedMapping::map(message_.fds[0].get(), shape->offset + used);
  if (!mapping) return mapping.take_error();
  inflight_.mapping = std::move(*mapping);
  inflight_.shape = *shape;
  inflight_.device = nullptr;
  bool writeback = false;  // of a region that does not say it
  if (has_device) {
    auto* device =
        reinterpret_cast<InflightDevice*>(inflight_.mapping.data() + shape->offset + bytes);
    inflight_.device = device;
    const bool ours = std::memcmp(device->mark, kInflightMark, sizeof kInflightMark) == 0;
    writeback = ours && std::atomic_ref<char>(device->cache).load() == kWriteBack;
    told_ = told_ || ours;  // by the server before this one, which wrote it there
  }
  // Where this server and the region disagree, some front-end relies on every write.
  blk_.choose_writeback(writeback && device_.writeback.load(std::memory_order_relaxed));
  return {};
}

// ---- memory ----

Error VhostSession::handle_memory() {
  switch (message_.type()) {
    case Type::set_mem_table:
      return set_mem_table();
    case Type::add_mem_reg:
      return add_region();
    case Type::rem_mem_reg:
      return remove_region();
    case Type::set_log_base:
      return set_log_base();
    case Type::set_log_fd:
      return {};  // would be signalled when the log grows; it is looked at anyway
    case Type::get_inflight_fd:
      return get_inflight();
    case Type::set_inflight_fd:
      return set_inflight();
    default:
      return handle_vring();
  }
}

// Nothing may hold an address of the memory while its table changes.
template <class Change>
Error VhostSession::with_rings_stopped(Change change) {
  for (Ring& ring : rings_) halt(ring, true);
  Error error = change();
  for (std::uint32_t i = 0; i < device_.queues; ++i) {
    // A ring whose memory went stays stopped, and starts when its memory comes back.
    if (Error e = refresh(i)) say("ring " + std::to_string(i) + " is stopped: " + e.to_string());
  }
  return error;
}

Error VhostSession::set_mem_table() {
  const auto table = payload<vu::MemoryTable>();
  if (!table) return table.error();
  if (table->regions > vu::kTableRegionsMax || table->regions != message_.fds.size() ||
      message_.header.size < sizeof(vu::MemoryTable) + table->regions * sizeof(vu::MemoryRegion)) {
    return misuse("a memory table of " + std::to_string(table->regions) + " regions with " +
                  std::to_string(message_.fds.size()) + " descriptors");
  }
  return with_rings_stopped([&]() -> Error {
    memory_.clear();
    for (std::uint32_t i = 0; i < table->regions; ++i) {
      vu::MemoryRegion r;
      std::memcpy(&r, message_.payload.data() + sizeof(vu::MemoryTable) + i * sizeof r, sizeof r);
      const MemorySlot slot{r.guest, r.user, r.size, r.file_offset};
      if (Error e = memory_.add(slot, message_.fds[i].get())) {
        memory_.clear();
        return e;
      }
    }
    return {};
  });
}

Error VhostSession::add_region() {
  const auto single = payload<vu::SingleRegion>();
  if (!single) return single.error();
  if (message_.fds.size() != 1) return misuse("a memory region comes with one descriptor");
  const vu::MemoryRegion& r = single->region;
  return with_rings_stopped([&] {
    return memory_.add({r.guest, r.user, r.size, r.file_offset}, message_.fds[0].get());
  });
}

Error VhostSession::remove_region() {
  const auto single = payload<vu::SingleRegion>();
  if (!single) return single.error();
  const vu::MemoryRegion& r = single->region;
  return with_rings_stopped([&] { return memory_.remove({r.guest, r.user, r.size, 0}); });
}

}  // namespace pqblk::exports
