#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "base/aligned.h"
#include "pqblk.h"
#include "soak/transport.h"

namespace pqblk::soak {
namespace {

class CTransport final : public Transport {
 public:
  CTransport(std::vector<std::string> words, std::uint32_t places)
      : words_(std::move(words)), errors_(places, pqblk_error PQBLK_ERROR_INIT) {
    for (std::uint32_t i = 0; i < places; ++i) memory_.emplace_back(kRequestMax);
  }
  ~CTransport() override { disconnect(); }

  std::string connect() override {
    disconnect();
    pqblk_error error = PQBLK_ERROR_INIT;
    pqblk_open_options options = PQBLK_OPEN_OPTIONS_INIT;
    options.path = words_.at(1).c_str();
    options.format = number(2);
    options.queues = number(3);
    options.cache = number(4);
    options.engine = number(5);
    if (says("non-volatile")) options.flags = PQBLK_OPEN_ASSUME_NON_VOLATILE;
    if (says("backed")) options.gate = [](void*, const char*) { return 1; };
    options.l2_cache_bytes = bytes("l2CacheBytes");
    options.entry_cache_bytes = bytes("entryCacheBytes");
    options.pending_bytes = bytes("pendingDataBytes");
    pqblk_keys* keys = nullptr;
    if (words_.at(6) != "-" &&
        pqblk_keys_from_agent(words_.at(6).c_str(), options.path, &keys, &error) != PQBLK_OK) {
      return error.message;
    }
    options.keys = keys;
    const int opened = pqblk_open(&options, &disk_, &error);
    pqblk_keys_free(keys);
    if (opened != PQBLK_OK) return error.message;
    for (std::uint32_t q = 0; q < options.queues; ++q) {
      pqblk_queue* queue = nullptr;
      if (pqblk_queue_new(disk_, q, static_cast<std::uint32_t>(memory_.size()), &queue, &error) !=
          PQBLK_OK) {
        return error.message;
      }
      queues_.push_back(queue);
    }
    return "";
  }

  std::string disconnect() override {
    for (pqblk_queue* queue : queues_) pqblk_queue_free(queue);
    queues_.clear();
    pqblk_error error = PQBLK_ERROR_INIT;
    const bool failed = disk_ != nullptr && pqblk_close(disk_, &error) != PQBLK_OK;
    disk_ = nullptr;
    return failed ? error.message : "";
  }

  std::uint8_t* data(std::uint32_t place) override { return memory_[place].data(); }

  void submit(std::uint32_t place, const Request& r) override {
    static constexpr std::uint32_t kType[] = {PQBLK_READ, PQBLK_WRITE, PQBLK_FLUSH, PQBLK_DISCARD,
                                              PQBLK_WRITE_ZEROES};
    iovec memory{data(place), r.bytes};
    pqblk_request request = PQBLK_REQUEST_INIT;
    request.type = kType[static_cast<int>(r.op)];
    request.flags =
        static_cast<std::uint32_t>((r.fua ? PQBLK_FUA : 0) | (r.unmap ? PQBLK_UNMAP : 0));
    request.offset = r.offset;
    request.cookie = place;
    request.error = &errors_[place];
    if (r.op == Op::read || r.op == Op::write) {
      request.iov = &memory;
      request.iov_count = 1;
    } else if (r.op != Op::flush) {
      request.length = r.bytes;
    }
    if (pqblk_submit(queues_[place % queues_.size()], &request, 1) != 1) std::abort();
  }

  bool wait(std::vector<Done>& done, int ms) override {
    if (disk_ == nullptr) return false;
    std::vector<pollfd> fds;
    for (pqblk_queue* queue : queues_) fds.push_back({pqblk_queue_fd(queue), POLLIN, 0});
    ::poll(fds.data(), fds.size(), ms);
    for (pqblk_queue* queue : queues_) {
      pqblk_completion found[16] = {PQBLK_COMPLETION_INIT};
      for (int n = 16; n == 16;) {
        n = pqblk_poll(queue, found, 16);
        for (int i = 0; i < n; ++i) {
          const int error = pqblk_kind_errno(found[i].kind);
          done.push_back({static_cast<std::uint32_t>(found[i].cookie), error});
        }
      }
    }
    return true;
  }

 private:
  std::uint32_t number(std::size_t i) const {
    return static_cast<std::uint32_t>(std::stoul(words_.at(i)));
  }
  bool says(const std::string& word) const {
    return std::find(words_.begin(), words_.end(), word) != words_.end();
  }
  // Of the word NAME=BYTES; 0: it is not said.
  std::uint64_t bytes(const std::string& name) const {
    for (const std::string& word : words_) {
      if (word.rfind(name + "=", 0) == 0) return std::stoull(word.substr(name.size() + 1));
    }
    return 0;
  }
  const std::vector<std::string> words_;
  std::vector<AlignedBuffer> memory_;
  std::vector<pqblk_error> errors_;
  pqblk_disk* disk_ = nullptr;
  std::vector<pqblk_queue*> queues_;
};

}  // namespace

std::unique_ptr<Transport> make_c(const std::vector<std::string>& words, std::uint32_t places) {
  return std::make_unique<CTransport>(words, places);
}

}  // namespace pqblk::soak
