// The part of a session that is about rings: their setup, their descriptors, start and stop.
#include <fcntl.h>

#include <cerrno>
#include <utility>

#include "export/vhost_user_session.h"

namespace pqblk::exports {
namespace {

using vu::Type;

Error misuse(std::string what) { return Error(Kind::invalid_argument, std::move(what)); }

}  // namespace

Result<std::uint32_t> VhostSession::ring_index(std::uint64_t index) const {
  if (index >= device_.queues) {
    return misuse("ring " + std::to_string(index) + " of " + std::to_string(device_.queues));
  }
  return static_cast<std::uint32_t>(index);
}

Error VhostSession::handle_vring() {
  const Type type = message_.type();
  switch (type) {
    case Type::set_vring_kick:
    case Type::set_vring_call:
    case Type::set_vring_err:
      return set_event(type);
    case Type::set_vring_addr: {
      const auto address = payload<vu::VringAddress>();
      return address ? set_address(*address) : address.error();
    }
    case Type::set_vring_num:
    case Type::set_vring_base:
    case Type::get_vring_base:
    case Type::set_vring_enable:
      break;
    default:
      return Error(Kind::unsupported, "a request that is not known here");
  }
  const auto state = payload<vu::VringState>();
  if (!state) return state.error();
  const auto index = ring_index(state->index);
  if (!index) return index.error();
  Ring& ring = rings_[*index];
  if (type == Type::get_vring_base) return get_base(*index);
  if (type == Type::set_vring_enable) {
    ring.enabled = state->number != 0;
    return refresh(*index);
  }
  if (ring.vring->running()) return misuse("the ring runs");
  if (type == Type::set_vring_base) {
    ring.base = state->number;
    return {};
  }
  if (state->number == 0 || state->number > kRingSizeMax) {
    return misuse("a ring of " + std::to_string(state->number) + " descriptors; up to " +
                  std::to_string(kRingSizeMax) + " are possible");
  }
  ring.size = state->number;
  return {};
}

Error VhostSession::set_address(const vu::VringAddress& address) {
  const auto index = ring_index(address.index);
  if (!index) return index.error();
  Ring& ring = rings_[*index];
  const bool runs = ring.vring->running();
  const bool moved = !ring.address || ring.address->descriptors != address.descriptors ||
                     ring.address->used != address.used ||
                     ring.address->available != address.available;
  if (runs && moved) halt(ring, true);
  ring.address = address;
  if (runs && !moved) {  // as migration begins and ends
    ring.vring->set_log(active_log(), log_address(ring));
    return {};
  }
  return refresh(*index);
}

Error VhostSession::set_event(Type type) {
  const auto value = payload<std::uint64_t>();
  if (!value) return value.error();
  const auto index = ring_index(*value & vu::kIndexMask);
  if (!index) return index.error();
  const bool none = (*value & vu::kNoFd) != 0;
  if (message_.fds.size() != (none ? 0 : 1)) return misuse("an event comes with one descriptor");
  UniqueFd fd = none ? UniqueFd() : std::move(message_.fds[0]);
  if (fd && !take_event_fd(fd.get())) return misuse("the descriptor of an event is not an eventfd");
  if (type == Type::set_vring_kick) return set_kick(*index, std::move(fd));
  Vring& vring = *rings_[*index].vring;
  if (type == Type::set_vring_call) vring.set_call(std::move(fd));
  if (type == Type::set_vring_err) vring.set_error(std::move(fd));
  return {};
}

Error VhostSession::set_kick(std::uint32_t index, UniqueFd fd) {
  Ring& ring = rings_[index];
  halt(ring, true);  // it listens to the old one
  ring.kick = std::move(fd);
  ring.kick_set = true;
  return refresh(index);
}

Error VhostSession::get_base(std::uint32_t index) {
  Ring& ring = rings_[index];
  halt(ring, true);
  ring.kick.reset();
  ring.kick_set = false;
  message_.set(vu::VringState{index, ring.base});
  replied_ = true;
  lost_ = !socket_.reply(message_);
  return {};
}

void VhostSession::halt(Ring& ring, bool orderly) {
  if (ring.vring->running()) ring.base = ring.vring->stop(orderly);
}

std::optional<std::uint64_t> VhostSession::inflight_offset(std::uint32_t index) const {
  const vu::Inflight& shape = inflight_.shape;
  if (inflight_.mapping.data() == nullptr || index >= shape.queues) return std::nullopt;
  return shape.offset + InflightRegion::bytes(shape.ring_size) * index;
}

Result<RingSetup> VhostSession::setup_of(std::uint32_t index) {
  const Ring& ring = rings_[index];
  const vu::VringAddress& a = *ring.address;
  RingSetup setup;
  setup.size = ring.size;
  setup.features = features_;
  setup.base = ring.base;
  setup.descriptors = memory_.at_user(a.descriptors, RingSetup::descriptor_bytes(ring.size));
  setup.driver = memory_.at_user(a.available, RingSetup::driver_bytes(features_, ring.size));
  setup.device = memory_.at_user(a.used, RingSetup::device_bytes(features_, ring.size));
  setup.device_log_address = log_address(ring);
  if (const auto offset = inflight_offset(index)) {
    if (ring.size > inflight_.shape.ring_size) {
      return misuse("the in-flight region is for rings of " +
                    std::to_string(inflight_.shape.ring_size));
    }
    setup.inflight.data = inflight_.mapping.data() + *offset;
  }
  return setup;
}

// Makes the ring run or not run, as what is known of it demands.
Error VhostSession::refresh(std::uint32_t index) {
  Ring& ring = rings_[index];
  const bool enabled = ring.enabled || (features_ & vu::kFeatureProtocol) == 0;
  const bool wanted = ring.kick_set && ring.size != 0 && ring.address && enabled;
  if (!wanted) {
    halt(ring, true);
    return {};
  }
  if (ring.vring->running()) return {};
  auto setup = setup_of(index);
  if (!setup) return setup.take_error();
  return ring.vring->start(memory_, *setup, active_log(), ring.kick.get(),
                           [this, index](const char* why) {
                             say("ring " + std::to_string(index) + " is stopped for good: " + why);
                           });
}

}  // namespace pqblk::exports
