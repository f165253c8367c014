#include "sim/toy_store.h"

#include <cassert>
#include <cstring>

#include "base/sync.h"

namespace pqblk::sim {
namespace {

using image::GuestBuffers;
using image::QueueContext;

constexpr std::uint64_t kTrailer = 512;
constexpr std::uint64_t kSlotBytes = kSectorSize + kTrailer;

struct Trailer {
  std::uint64_t sequence;
  std::uint64_t checksum;  // of sequence and data
};

std::uint64_t checksum_of(const std::uint8_t* data, std::uint64_t sequence) {
  return mix64(hash_bytes(data, kSectorSize) + sequence);
}

struct SlotState {
  std::uint32_t current = 0;
  std::uint64_t sequence = 0;  // of the current slot; 0: never written
  std::uint64_t stamp = 0;     // when the current slot was completed
};

class ToyStore final : public image::Backend {
 public:
  ToyStore(const io::File& file, std::uint64_t sectors, const ToyFault& fault,
           const std::function<void(std::uint64_t)>& on_write)
      : file_(file), fault_(fault), on_write_(on_write), slots_(sectors) {}

  Task<Error> recover(QueueContext& q) {
    if (fault_ != ToyFault::open_without_sync) {
      if (Error e = co_await q.io.fdatasync(file_)) co_return e;
    }
    auto slot = q.buffer(kSlotBytes);
    for (std::uint64_t s = 0; s < slots_.size(); ++s) {
      for (std::uint32_t i = 0; i < 2; ++i) {
        if (Error e = co_await q.io.read(file_, place(s, i), slot.data(), kSlotBytes)) co_return e;
        const std::uint64_t sequence = valid_sequence(slot.data());
        if (sequence > slots_[s].sequence) slots_[s] = {i, sequence, 0};
        highest_ = std::max(highest_, sequence);
      }
    }
    co_return Error();
  }

  image::Geometry geometry() const override {
    return {.size = slots_.size() * kSectorSize,
            .request_align = kSectorSize,
            .cluster_size = 4 * kSectorSize,
            .max_transfer = kMiB};
  }
  std::string_view format() const override { return "toy"; }

  Task<Error> read(QueueContext& q, GuestOffset at, GuestBuffers data) override {
    auto slot = q.buffer(kSlotBytes);
    for (std::uint64_t i = 0; i < data.size / kSectorSize; ++i) {
      const std::uint64_t s = at.bytes / kSectorSize + i;
      const GuestBuffers out = data.part(i * kSectorSize, kSectorSize);
      for (;;) {
        const SlotState before = slots_[s];
        if (before.sequence == 0) {
          out.zero();
          break;
        }
        if (Error e = co_await q.io.read(file_, place(s, before.current), slot.data(), kSlotBytes))
          co_return e;
        if (valid_sequence(slot.data()) == before.sequence) {
          out.copy_in(slot.data());
          break;
        }
        if (slots_[s].sequence == before.sequence) {
          co_return Error(Kind::integrity, "slot does not hold what it held");
        }
      }
    }
    co_return Error();
  }

  Task<Error> write(QueueContext& q, GuestOffset at, GuestBuffers data, bool fua) override {
    for (std::uint64_t i = 0; i < data.size / kSectorSize; ++i) {
      const GuestBuffers part = data.part(i * kSectorSize, kSectorSize);
      if (Error e = co_await write_sector(q, at.bytes / kSectorSize + i, &part)) co_return e;
    }
    if (fua && fault_ != ToyFault::fua_without_sync) co_return co_await sync(q);
    co_return Error();
  }

  Task<Error> flush(QueueContext& q) override {
    if (fault_ == ToyFault::flush_does_nothing) co_return Error();
    co_return co_await sync(q);
  }

  Task<Error> discard(QueueContext& q, GuestOffset at, std::uint64_t length) override {
    return write_zeroes(q, at, length, 0);
  }

  Task<Error> write_zeroes(QueueContext& q, GuestOffset at, std::uint64_t length,
                           std::uint32_t) override {
    for (std::uint64_t i = 0; i < length / kSectorSize; ++i) {
      if (Error e = co_await write_sector(q, at.bytes / kSectorSize + i, nullptr)) co_return e;
    }
    co_return Error();
  }

  Task<Result<image::Extent>> extent(QueueContext&, GuestOffset, std::uint64_t length) override {
    co_return image::Extent{.length = length};
  }
  Task<Error> resize(QueueContext&, std::uint64_t) override {
    co_return Error(Kind::unsupported, "a toy does not grow");
  }
  Task<Error> close(QueueContext& q) override {
    while (background_ > 0) co_await yield();
    co_return co_await sync(q);
  }
  image::BackendStats stats() const override { return {}; }

 private:
  std::uint64_t place(std::uint64_t sector, std::uint32_t slot) const {
    return (sector * 2 + slot) * kSlotBytes;
  }

  std::uint64_t valid_sequence(const std::uint8_t* slot) const {
    Trailer trailer;
    std::memcpy(&trailer, slot + kSectorSize, sizeof trailer);
    if (trailer.sequence == 0) return 0;
    if (fault_ == ToyFault::no_checksum) return trailer.sequence;
    return trailer.checksum == checksum_of(slot, trailer.sequence) ? trailer.sequence : 0;
  }

  Task<Error> write_sector(QueueContext& q, std::uint64_t s, const GuestBuffers* data) {
    if (slots_[s].stamp >= durable_ && slots_[s].sequence != 0 &&
        fault_ != ToyFault::overwrite_only_copy) {
      if (Error e = co_await sync(q)) co_return e;
    }
    auto slot = q.buffer(kSlotBytes);
    std::memset(slot.data(), 0, kSlotBytes);
    if (data != nullptr) data->copy_out(slot.data());
    const Trailer trailer{++highest_, checksum_of(slot.data(), highest_)};
    std::memcpy(slot.data() + kSectorSize, &trailer, sizeof trailer);
    if (on_write_) on_write_(trailer.sequence);
    const std::uint32_t target = slots_[s].sequence == 0 ? 0 : 1 - slots_[s].current;
    if (fault_ == ToyFault::early_acknowledgement) {
      ++background_;
      spawn(write_later(q, std::move(slot), s, target));
      slots_[s] = {target, trailer.sequence, stamp_++};
      co_return Error();
    }
    if (Error e = co_await q.io.write(file_, place(s, target), slot.data(), kSlotBytes)) {
      co_return e;
    }
    slots_[s] = {target, trailer.sequence, stamp_++};
    co_return Error();
  }

  Task<void> write_later(QueueContext& q, QueueContext::Buffer slot, std::uint64_t s,
                         std::uint32_t target) {
    static_cast<void>(co_await q.io.write(file_, place(s, target), slot.data(), kSlotBytes));
    --background_;
  }

  // What was complete before the call is durable after it.
  Task<Error> sync(QueueContext& q) {
    if (fault_ == ToyFault::flush_joins_issued_sync && syncing_ > 0) {
      const std::uint64_t wanted = syncs_ + 1;
      while (syncs_ < wanted && syncing_ > 0) co_await yield();
      co_return Error();
    }
    if (sync_failed_ && fault_ != ToyFault::forgets_failed_sync) {
      co_return Error(Kind::io_error, "an fdatasync failed before");
    }
    const std::uint64_t upto = stamp_;
    ++syncing_;
    Error error = co_await q.io.fdatasync(file_);
    --syncing_;
    ++syncs_;
    if (error) sync_failed_ = true;
    if (!error && (!sync_failed_ || fault_ == ToyFault::forgets_failed_sync)) {
      durable_ = std::max(durable_, upto);
    }
    if (!error && sync_failed_ && fault_ != ToyFault::forgets_failed_sync) {
      co_return Error(Kind::io_error, "another fdatasync failed meanwhile");
    }
    co_return error;
  }

  const io::File& file_;
  const ToyFault& fault_;
  const std::function<void(std::uint64_t)>& on_write_;
  std::vector<SlotState> slots_;
  std::uint64_t highest_ = 0;
  std::uint64_t stamp_ = 1;    // the next completion's
  std::uint64_t durable_ = 1;  // completions before this one are durable
  std::uint64_t syncs_ = 0;
  std::uint32_t syncing_ = 0;
  bool sync_failed_ = false;  // for good: nobody knows what the kernel dropped
  std::uint32_t background_ = 0;
};

}  // namespace

const char* toy_fault_name(ToyFault fault) {
  static constexpr const char* kNames[] = {"none",
                                           "overwrite_only_copy",
                                           "flush_does_nothing",
                                           "flush_joins_issued_sync",
                                           "early_acknowledgement",
                                           "open_without_sync",
                                           "no_checksum",
                                           "fua_without_sync",
                                           "forgets_failed_sync"};
  static_assert(std::size(kNames) == kToyFaults);
  return kNames[static_cast<std::size_t>(fault)];
}

Subject toy_subject(std::uint64_t sectors, const ToyFault& fault,
                    std::function<void(std::uint64_t)> on_write) {
  Subject subject;
  subject.name = "toy";
  subject.sectors = sectors;
  subject.sectors_per_cluster = 4;
  subject.create = [sectors](io::Queue& q, const io::File& file) -> Task<Error> {
    if (Error e = co_await q.truncate(file, sectors * 2 * kSlotBytes)) co_return e;
    co_return co_await q.fdatasync(file);
  };
  subject.open = [sectors, &fault, on_write](
                     QueueContext& service,
                     const io::File& file) -> Task<Result<std::unique_ptr<image::Backend>>> {
    auto store = std::make_unique<ToyStore>(file, sectors, fault, on_write);
    if (Error e = co_await store->recover(service)) co_return e;
    co_return std::unique_ptr<image::Backend>(std::move(store));
  };
  return subject;
}

}  // namespace pqblk::sim
