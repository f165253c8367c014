#include "sim/device.h"

#include <algorithm>
#include <cassert>

namespace pqblk::sim {
namespace {

// Punches and zeroing are done in blocks of a file system.
constexpr std::uint32_t kFileSystemBlock = 4096;
constexpr std::uint32_t kEighths = 8;
constexpr std::uint64_t kEnd = ~std::uint64_t{0};

// The chance that a write survives; an enumeration asks for each write instead.
std::uint32_t any_density(Choices& choices) {
  return choices.exhaustive() ? kEighths : choices.choose(kEighths + 1, Why::crash);
}

}  // namespace

void Write::apply(Pages& pages, std::uint64_t from, std::uint64_t to) const {
  switch (type) {
    case Type::data:
      pages.write(from, bytes.data() + (from - offset), to - from);
      return;
    case Type::zero:
      pages.zero(from, to - from);
      return;
    case Type::zero_range:
      if (to > pages.size()) pages.resize(to);
      pages.zero(from, to - from);
      return;
    case Type::resize:
      pages.resize(offset);
      return;
    case Type::extend:
      if (offset > pages.size()) pages.resize(offset);
      return;
  }
}

Write Write::part(std::uint64_t from, std::uint64_t to) const {
  Write out = *this;
  out.offset = out.touched_from = from;
  out.length = to - from;
  out.touched_to = to;
  if (type == Type::data) {
    const auto* first = bytes.data() + (from - offset);
    out.bytes.assign(first, first + out.length);
  }
  return out;
}

std::string Write::text() const {
  static constexpr const char* kNames[] = {"data", "zero", "zero range", "resize", "extend"};
  return std::string(kNames[static_cast<int>(type)]) + " " + std::to_string(offset) + "+" +
         std::to_string(length) + (ended == 0 ? " in flight" : "");
}

void surviving_parts(const Write& write, std::uint32_t unit, std::uint32_t keep_eighths,
                     Choices& choices,
                     const std::function<void(std::uint64_t, std::uint64_t)>& visit) {
  const std::uint64_t from = write.offset;
  const std::uint64_t to = write.offset + write.length;
  if (write.type != Write::Type::data) unit = std::max(unit, kFileSystemBlock);
  const bool tearable = write.ranged() && from / unit != (to - 1) / unit;
  enum : std::uint32_t { kAll, kNone, kHead, kTail, kMask };
  std::uint32_t how = kAll;
  if (choices.exhaustive()) {
    how = choices.choose(tearable ? 4 : 2, Why::crash);
  } else if (tearable && choices.one_in(4, Why::crash)) {
    how = kHead + choices.choose(3, Why::crash);
  } else if (choices.choose(kEighths, Why::crash) >= keep_eighths) {
    how = kNone;
  }
  if (how == kNone) return;
  if (how == kAll) return visit(from, to);
  const std::uint64_t first = from / unit;
  const std::uint64_t units = (to - 1) / unit - first + 1;
  if (how == kMask) {
    std::uint64_t coins = 0;
    for (std::uint64_t i = 0; i < units; ++i, coins >>= 1) {
      if (i % 64 == 0) coins = choices.bits(Why::crash);
      if ((coins & 1) != 0) {
        visit(std::max(from, (first + i) * unit), std::min(to, (first + i + 1) * unit));
      }
    }
    return;
  }
  // An enumeration tears in the middle.
  const std::uint64_t cut =
      choices.exhaustive() ? units / 2
                           : 1 + choices.choose(static_cast<std::uint32_t>(units - 1), Why::crash);
  const std::uint64_t at = (first + cut) * unit;
  if (how == kHead) return visit(from, at);
  visit(at, to);
}

void Device::overwrite(std::uint64_t offset, const void* data, std::size_t length) {
  durable_.write(offset, data, length);
  cache_.write(offset, data, length);
}

void Device::set_size(std::uint64_t size) {
  durable_.resize(size);
  cache_.resize(size);
}

Device::WriteRef Device::begin(Write write) {
  write.begun = ++events_;
  write.touched_from = write.offset;
  write.touched_to = write.offset + write.length;
  if (write.type == Write::Type::resize) {
    write.touched_from = std::min(write.offset, cache_.size());
    write.touched_to = kEnd;
  }
  in_flight_.push_back(std::make_shared<Write>(std::move(write)));
  return in_flight_.back();
}

void Device::forget(const WriteRef& write) {
  const auto at = std::find(in_flight_.begin(), in_flight_.end(), write);
  assert(at != in_flight_.end());
  in_flight_.erase(at);
}

void Device::land(WriteRef write) {
  write->ended = ++events_;
  write->apply(cache_);
  if (!facts_.non_volatile || write->type != Write::Type::data) {
    unflushed_.push_back(std::move(write));
    return;
  }
  std::vector<WriteRef> unsettled;  // a block's write does not settle its own other half
  const std::uint64_t end = write->offset + write->length;
  for (std::uint64_t from = write->offset, to = 0; from < end; from = to) {
    to = std::min(end, (from / kFileSystemBlock + 1) * kFileSystemBlock);
    if (settled(from)) {
      write->apply(durable_, from, to);
    } else {
      unsettled.push_back(std::make_shared<Write>(write->part(from, to)));
    }
  }
  unflushed_.insert(unflushed_.end(), unsettled.begin(), unsettled.end());
}

bool Device::settled(std::uint64_t offset) const {
  const std::uint64_t from = offset / kFileSystemBlock * kFileSystemBlock;
  return durable_.holds(from) &&
         std::none_of(unflushed_.begin(), unflushed_.end(), [from](const WriteRef& write) {
           return write->touched_from < from + kFileSystemBlock && from < write->touched_to;
         });
}

void Device::land_in_part(const Write& write, Choices& choices) {
  const std::uint32_t keep = any_density(choices);
  surviving_parts(write, tear_unit(), keep, choices, [&](std::uint64_t from, std::uint64_t to) {
    land(std::make_shared<Write>(write.ranged() ? write.part(from, to) : write));
  });
}

void Device::complete(const WriteRef& write) {
  forget(write);
  land(write);
}

void Device::fail(const WriteRef& write, Choices& choices) {
  forget(write);
  land_in_part(*write, choices);
}

void Device::complete_sync(std::uint64_t token) {
  std::size_t kept = 0;
  for (WriteRef& write : unflushed_) {
    if (write->ended < token) {
      write->apply(durable_);
    } else {
      unflushed_[kept++] = std::move(write);
    }
  }
  unflushed_.resize(kept);
}

void Device::fail_sync(std::uint64_t token, Choices& choices) {
  const std::uint32_t keep = any_density(choices);
  std::size_t kept = 0;
  for (WriteRef& write : unflushed_) {
    if (write->ended < token) {
      surviving_parts(
          *write, tear_unit(), keep, choices,
          [&](std::uint64_t from, std::uint64_t to) { write->apply(durable_, from, to); });
    } else {
      unflushed_[kept++] = std::move(write);
    }
  }
  unflushed_.resize(kept);
}

// Completion order, then issue order; overlapping writes that were in flight together may swap.
std::vector<Device::WriteRef> Device::possible_order(Choices& choices) const {
  std::vector<WriteRef> order = unflushed_;
  order.insert(order.end(), in_flight_.begin(), in_flight_.end());
  for (std::size_t j = 1; j < order.size(); ++j) {
    for (std::size_t i = 0; i < j; ++i) {
      if (!order[i]->overlaps(*order[j]) || !order[i]->concurrent(*order[j])) continue;
      const bool free = std::none_of(
          order.begin() + static_cast<std::ptrdiff_t>(i),
          order.begin() + static_cast<std::ptrdiff_t>(j), [&](const WriteRef& between) {
            return between->overlaps(*order[j]) && !between->concurrent(*order[j]);
          });
      if (!free || choices.choose(2, Why::crash) == 0) continue;
      std::rotate(order.begin() + static_cast<std::ptrdiff_t>(i),
                  order.begin() + static_cast<std::ptrdiff_t>(j),
                  order.begin() + static_cast<std::ptrdiff_t>(j) + 1);
      break;
    }
  }
  return order;
}

Device Device::power_loss(Choices& choices) const {
  Device next(facts_);
  next.durable_ = durable_;
  // One density for a crash: "all but one" and "only one" must both be likely.
  static constexpr std::uint32_t kDensities[] = {4, 7, 1, 8, 0};
  const std::uint32_t keep =
      choices.exhaustive() ? kEighths : kDensities[choices.choose(5, Why::crash)];
  for (const WriteRef& write : possible_order(choices)) {
    surviving_parts(*write, tear_unit(), keep, choices, [&](std::uint64_t from, std::uint64_t to) {
      write->apply(next.durable_, from, to);
    });
  }
  next.cache_ = next.durable_;
  return next;
}

Device Device::killed(Choices& choices) const {
  Device next = *this;
  next.in_flight_.clear();
  for (const WriteRef& write : in_flight_) next.land_in_part(*write, choices);
  return next;
}

std::uint64_t Device::hash() const {
  std::uint64_t sum = mix64(durable_.hash() + 3 * cache_.hash());
  for (const WriteRef& w : unflushed_) {
    sum = mix64(sum + mix64(w->offset + mix64(w->length + static_cast<std::uint64_t>(w->type))));
    sum += hash_bytes(w->bytes.data(), w->bytes.size());
  }
  return sum;
}

}  // namespace pqblk::sim
