// The real engines as stages, and helpers of the suite; see stage.h.

#include "io/stage.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "io/queue_thread.h"
#include "sim/io_stage.h"
#include "storage/file.h"

namespace pqblk::io::test {

namespace {

[[noreturn]] void give_up(const std::string& why) {
  std::fprintf(stderr, "test stage: %s\n", why.c_str());
  std::abort();
}

class RealStage final : public Stage {
 public:
  explicit RealStage(const QueueOptions& options) {
    Result<std::unique_ptr<QueueThread>> started = QueueThread::start(options);
    if (!started) give_up(started.error().to_string());
    thread_ = std::move(*started);
  }
  ~RealStage() override {
    thread_->stop();
    for (File& file : files_) {
      ::unlink(file.path.c_str());
      storage::close_file(file);
    }
  }

  Queue& queue() override { return thread_->queue(); }

  File& make_file(std::uint64_t size, bool direct) override {
    static int made = 0;
    const std::string path = scratch_directory() + "/pqblk-io-" + std::to_string(::getpid()) + "-" +
                             std::to_string(made++);
    Result<File> file = storage::open_file(
        path,
        {.direct = direct ? storage::Direct::required : storage::Direct::off, .create = true});
    if (!file) give_up(file.error().to_string());
    if (::ftruncate(file->fd, static_cast<off_t>(size)) != 0) give_up("ftruncate");
    file->size = size;
    return files_.emplace_back(std::move(*file));
  }

  Error run(const std::function<Task<Error>()>& body) override { return thread_->run_sync(body); }

  // Through a description of its own, without O_DIRECT.
  Bytes peek(const File& file, std::uint64_t offset, std::size_t size) override {
    Bytes bytes(size);
    std::FILE* in = std::fopen(file.path.c_str(), "rb");
    if (in == nullptr || ::fseeko(in, static_cast<off_t>(offset), SEEK_SET) != 0) give_up("peek");
    const std::size_t got = std::fread(bytes.data(), 1, size, in);
    std::memset(bytes.data() + got, 0, size - got);
    std::fclose(in);
    return bytes;
  }

  void poke(File& file, std::uint64_t offset, std::span<const std::uint8_t> data) override {
    std::FILE* out = std::fopen(file.path.c_str(), "r+b");
    if (out == nullptr || ::fseeko(out, static_cast<off_t>(offset), SEEK_SET) != 0 ||
        std::fwrite(data.data(), 1, data.size(), out) != data.size() || std::fclose(out) != 0) {
      give_up("poke");
    }
  }

  std::uint64_t size_of(const File& file) override {
    struct stat status {};
    if (::stat(file.path.c_str(), &status) != 0) give_up("stat");
    return static_cast<std::uint64_t>(status.st_size);
  }

 private:
  std::unique_ptr<QueueThread> thread_;
  std::deque<File> files_;
};

StageType real(std::string name, EngineType engine) {
  return {std::move(name), true, [engine](std::uint32_t depth) {
            return make_real_stage({.engine = engine, .depth = depth});
          }};
}

}  // namespace

std::unique_ptr<Stage> make_real_stage(const QueueOptions& options) {
  return std::make_unique<RealStage>(options);
}

const std::vector<StageType>& stages() {
  static const std::vector<StageType> all = {
      real("io_uring", EngineType::uring), real("aio", EngineType::aio),
      real("threads", EngineType::threads), sim::simulator_stage()};
  return all;
}

std::string scratch_directory() {
  const char* directory = std::getenv("TMPDIR");
  return directory != nullptr && *directory != '\0' ? directory : "/tmp";
}

std::uint64_t Random::next() {
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return state_ * 0x2545F4914F6CDD1DULL;
}

Bytes pattern(std::uint64_t seed, std::size_t size) {
  Random random(seed);
  Bytes bytes(size);
  for (std::size_t at = 0; at < size; at += sizeof(std::uint64_t)) {
    const std::uint64_t word = random.next();
    std::memcpy(bytes.data() + at, &word, std::min(sizeof word, size - at));
  }
  return bytes;
}

Task<Error> all_of(Queue& queue, std::vector<Task<Error>> tasks) {
  std::size_t left = tasks.size();
  Error first;
  for (Task<Error>& task : tasks) {
    spawn([](Task<Error> inner, std::size_t& count, Error& out) -> Task<void> {
      Error e = co_await std::move(inner);
      if (e && !out) out = std::move(e);
      --count;
    }(std::move(task), left, first));
  }
  constexpr std::uint64_t kPollNs = 100'000;
  while (left > 0) co_await queue.sleep(kPollNs);
  co_return first;
}

}  // namespace pqblk::io::test
