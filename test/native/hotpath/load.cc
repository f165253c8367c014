#include "hotpath/load.h"

#include <cstdlib>
#include <memory>
#include <semaphore>
#include <utility>
#include <vector>

#include "base/units.h"

namespace pqblk::test {
namespace {

using image::Request;

constexpr std::uint64_t kBlock = 4 * kKiB;

struct FreeMemory {
  void operator()(std::uint8_t* p) const { std::free(p); }
};

class Load {
 public:
  Load(image::Disk& disk, const LoadSpec& spec) : disk_(disk), spec_(spec), slots_(spec.depth) {
    memory_.reset(
        static_cast<std::uint8_t*>(std::aligned_alloc(kBlock, kBlock * (spec.depth + 1))));
    if (memory_ == nullptr) std::abort();
    for (std::uint64_t i = 0; i < kBlock * spec.depth; ++i) {
      memory_.get()[i] = static_cast<std::uint8_t>(next() >> 56U);
    }
  }

  Error run() {
    disk_.on_queue(0, [this] { start_all(); });
    over_.acquire();
    return std::move(error_);
  }

 private:
  struct Slot {
    Request request;
    iovec buffer{};
    Load* load = nullptr;
  };

  std::uint64_t next() {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return state_;
  }

  void start_all() {
    in_flight_ = 1;  // this call
    if (spec_.warm == 0 && spec_.begin) spec_.begin();
    for (std::uint32_t i = 0; i < spec_.depth; ++i) {
      Slot& slot = slots_[i];
      slot.load = this;
      slot.buffer = {memory_.get() + i * kBlock, kBlock};
      slot.request.type = spec_.type;
      slot.request.length = kBlock;
      slot.request.iov = &slot.buffer;
      slot.request.iov_count = 1;
      slot.request.context = &slot;
      slot.request.complete = [](Request& done) {
        static_cast<Slot*>(done.context)->load->completed(done);
      };
      ++in_flight_;
      launch(slot.request);
    }
    ended();
  }

  void launch(Request& request) {
    request.offset = (next() >> 32U) * spec_.blocks >> 32U << 12U;
    disk_.start(0, request);
  }

  void completed(Request& request) {
    if (request.status != image::Status::ok && !error_) error_ = request.error;
    ++done_;
    if (done_ == spec_.warm && spec_.begin) spec_.begin();
    if (done_ == spec_.warm + spec_.ops && spec_.end) spec_.end();
    if (done_ < spec_.warm + spec_.ops && !error_) return launch(request);
    ended();
  }

  void ended() {
    if (--in_flight_ == 0) over_.release();
  }

  image::Disk& disk_;
  const LoadSpec& spec_;
  std::vector<Slot> slots_;
  std::unique_ptr<std::uint8_t[], FreeMemory> memory_;
  std::uint64_t state_ = 0x9E3779B97F4A7C15U;
  std::uint64_t done_ = 0;
  std::uint32_t in_flight_ = 0;
  Error error_;
  std::binary_semaphore over_{0};
};

}  // namespace

Error run_load(image::Disk& disk, const LoadSpec& spec) { return Load(disk, spec).run(); }

}  // namespace pqblk::test
