#include "hotpath/guest_load.h"

#include <semaphore>

#include "base/units.h"
#include "export/vhost_user.h"
#include "export/vhost_user_client.h"

namespace pqblk::test {
namespace {

constexpr std::uint32_t kBlock = 4 * kKiB;

class Guest {
 public:
  Guest(const LoadSpec& spec, exports::test::FrontEnd& driver) : spec_(spec), driver_(driver) {}

  Error run(image::Disk& disk) {
    poller_ = {[](image::Poller& p) { return static_cast<Guest*>(p.context)->turn(); }, this,
               nullptr};
    disk.on_queue(0, [&] { disk.add_poller(0, poller_); });
    over_.acquire();
    disk.on_queue(0, [&] {
      disk.remove_poller(0, poller_);
      over_.release();
    });
    over_.acquire();
    return std::move(error_);
  }

 private:
  bool turn() {
    if (finished_) return false;
    std::uint32_t added = 0;
    if (!started_) {
      started_ = true;
      for (std::uint32_t slot = 0; slot < spec_.depth; ++slot) added += add(slot);
    }
    while (const auto answer = driver_.poll(0)) {
      if (answer->status != 0) error_ = Error(Kind::io_error, "a request of the guest failed");
      --out_;
      ++done_;
      if (done_ == spec_.warm && spec_.begin) spec_.begin();
      if (done_ == spec_.warm + spec_.ops && spec_.end) spec_.end();
      if (done_ < spec_.warm + spec_.ops && !error_) added += add(answer->slot);
    }
    if (added != 0) driver_.kick(0);
    if (out_ == 0) {
      finished_ = true;
      over_.release();
    }
    return added != 0;
  }

  std::uint32_t add(std::uint32_t slot) {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    const std::uint64_t block = (state_ >> 32U) * spec_.blocks >> 32U;
    driver_.add(0, slot, 0, block * (kBlock / kVirtioSectorSize), kBlock);
    ++out_;
    return 1;
  }

  const LoadSpec& spec_;
  exports::test::FrontEnd& driver_;
  image::Poller poller_;
  std::uint64_t state_ = 0x9E3779B97F4A7C15U;
  std::uint64_t done_ = 0;
  std::uint32_t out_ = 0;
  bool started_ = false, finished_ = false;
  Error error_;
  std::binary_semaphore over_{0};
};

}  // namespace

Error run_guest_load(image::Disk& disk, const LoadSpec& spec, const std::string& socket) {
  exports::VhostUserOptions options;
  options.path = socket;
  auto server = exports::VhostUserServer::start(disk, std::move(options));
  if (!server) return server.take_error();
  Error error;
  {
    exports::test::FrontEnd driver({.depth = spec.depth, .slot_bytes = kBlock});
    if (const std::string why = driver.connect(socket); !why.empty()) {
      error = Error(Kind::io_error, why);
    } else {
      error = Guest(spec, driver).run(disk);
    }
  }
  (*server)->stop();
  return error;
}

}  // namespace pqblk::test
