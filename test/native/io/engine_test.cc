// What only engines with real threads and a real kernel show: posts and wake-ups across threads,
// stopping, registered buffers and files, errors of the kernel, refused engines.

#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <thread>

#include "base/aligned.h"
#include "base/units.h"
#include "io/queue_thread.h"
#include "io/stage.h"
#include "storage/file.h"

namespace pqblk::io::test {

namespace {

constexpr EngineType kEngines[] = {EngineType::uring, EngineType::aio, EngineType::threads};

std::unique_ptr<QueueThread> start(const QueueOptions& options) {
  Result<std::unique_ptr<QueueThread>> thread = QueueThread::start(options);
  REQUIRE_MESSAGE(bool(thread), thread.error().to_string());
  return std::move(*thread);
}

// Body(QueueThread&) for each real engine, without and with spinning before sleep.
template <class Body>
void each_queue(Body body) {
  for (const EngineType engine : kEngines) {
    for (const std::uint32_t spin_us : {0U, 50U}) {
      auto thread = start({.engine = engine, .depth = 32, .spin_us = spin_us});
      CAPTURE(thread->queue().engine());
      CAPTURE(spin_us);
      body(*thread);
    }
  }
}

}  // namespace

TEST_CASE("posts from many threads all arrive, each once, on the queue's thread") {
  each_queue([](QueueThread& thread) {
    Queue& queue = thread.queue();
    constexpr int kThreads = 4;
    constexpr int kPosts = 2000;
    int arrived = 0;  // not atomic: only the queue's thread touches it
    const auto arrive = [&]() -> Task<void> {
      co_await resume_on(queue);
      arrived += Executor::current() == &queue ? 1 : 0;
    };
    std::vector<std::thread> posters;
    for (int i = 0; i < kThreads; ++i) {
      posters.emplace_back([&] {
        for (int k = 0; k < kPosts; ++k) spawn(arrive());
      });
    }
    for (std::thread& poster : posters) poster.join();
    CHECK(thread.run_sync([&]() -> Task<int> { co_return arrived; }) == kThreads * kPosts);
  });
}

TEST_CASE("polls wait beside other work, use up no depth, and end with what happens") {
  each_queue([](QueueThread& thread) {
    Queue& queue = thread.queue();
    constexpr std::size_t kSockets = 100;  // more than the depth
    std::vector<std::array<int, 2>> pairs(kSockets);
    for (auto& pair : pairs) {
      REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair.data()) == 0);
    }
    std::atomic<std::size_t> ready{0}, writable{0};
    const auto wait_for = [&](int fd, short events, std::atomic<std::size_t>& count) -> Task<void> {
      co_await resume_on(queue);
      if (!co_await queue.poll(fd, events)) ++count;
    };
    const auto until = [](const std::atomic<std::size_t>& count, std::size_t wanted) {
      for (int i = 0; i < 10'000 && count != wanted; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      return count.load();
    };
    for (const auto& pair : pairs) spawn(wait_for(pair[0], POLLIN, ready));
    spawn(wait_for(pairs[0][0], POLLOUT, writable));
    CHECK(until(writable, 1) == 1);
    // The ring still works although more polls than its depth are waiting.
    const auto stage = make_real_stage({.engine = EngineType::threads});
    File& file = stage->make_file(4096, false);
    Bytes data(4096);
    const Error read = thread.run_sync(
        [&]() -> Task<Error> { co_return co_await queue.read(file, 0, data.data(), 4096); });
    CHECK_MESSAGE(read.ok(), read.to_string());
    CHECK(ready == 0);
    for (std::size_t i = 0; i < kSockets; ++i) {
      if (i % 3 == 0) REQUIRE(::write(pairs[i][1], "x", 1) == 1);
      if (i % 3 == 1) REQUIRE(::shutdown(pairs[i][0], SHUT_RDWR) == 0);
      if (i % 3 == 2) REQUIRE(::shutdown(pairs[i][1], SHUT_WR) == 0);
    }
    CHECK(until(ready, kSockets) == kSockets);
    for (const auto& pair : pairs) {
      ::close(pair[0]);
      ::close(pair[1]);
    }
  });
}

TEST_CASE("more completions than there is room for come while somebody only yields") {
  for (const EngineType engine : kEngines) {
    auto thread = start({.engine = engine, .depth = 1});
    CAPTURE(thread->queue().engine());
    constexpr int kPolls = 64;
    const int fd = ::eventfd(1, EFD_CLOEXEC);  // ready at once, and for each of them
    REQUIRE(fd >= 0);
    int ready = 0;
    const auto wait_for = [&](Queue& queue) -> Task<void> {
      if (!co_await queue.poll(fd, POLLIN)) ++ready;
    };
    const int seen = thread->run_sync([&]() -> Task<int> {
      Queue& queue = thread->queue();
      for (int i = 0; i < kPolls; ++i) spawn(wait_for(queue));
      const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (ready < kPolls && std::chrono::steady_clock::now() < end) co_await yield();
      const int while_yielding = ready;
      while (ready < kPolls) co_await queue.sleep(1'000'000);
      co_return while_yielding;
    });
    CHECK(seen == kPolls);
    ::close(fd);
  }
}

TEST_CASE("a coroutine goes to and fro between two sleeping queues") {
  each_queue([](QueueThread& first) {
    auto second = start({.engine = EngineType::automatic});
    constexpr int kHops = 2000;
    const int hops = first.run_sync([&]() -> Task<int> {
      int made = 0;
      while (made < kHops) {
        co_await resume_on(second->queue());
        co_await resume_on(first.queue());
        ++made;
      }
      co_return made;
    });
    CHECK(hops == kHops);
  });
}

TEST_CASE("no wake-up is lost between a producer and the poll hook") {
  for (const EngineType engine : kEngines) {
    Result<std::unique_ptr<Queue>> made = make_queue({.engine = engine});
    REQUIRE(bool(made));
    Queue& queue = **made;
    std::atomic<int> published{0};
    std::atomic<int> consumed{0};
    queue.poll_hook = [&] {
      const int seen = published.load(std::memory_order_acquire);
      if (seen == consumed.load(std::memory_order_relaxed)) return false;
      consumed.store(seen, std::memory_order_release);
      return true;
    };
    auto thread = QueueThread::start(std::move(*made), 1);
    REQUIRE(bool(thread));
    bool lost = false;
    for (int i = 1; i <= 5000 && !lost; ++i) {
      published.store(i, std::memory_order_release);
      queue.wake();
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (consumed.load(std::memory_order_acquire) != i && !lost) {
        std::this_thread::yield();
        lost = std::chrono::steady_clock::now() > deadline;
      }
      if (i % 3 == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(i % 50));  // fall asleep
    }
    CHECK(!lost);
    (*thread)->stop();
  }
}

TEST_CASE("before_wait submits what was gathered, before the queue sleeps") {
  for (const EngineType engine : kEngines) {
    Result<std::unique_ptr<Queue>> made = make_queue({.engine = engine});
    REQUIRE(bool(made));
    Queue& queue = **made;
    Op gathered;
    bool waiting = false;
    bool completed = false;
    gathered.completed = [](Op& op) { *static_cast<bool*>(op.single.iov_base) = true; };
    gathered.single.iov_base = &completed;
    queue.before_wait = [&] {
      if (std::exchange(waiting, false)) queue.submit(gathered);
    };
    auto thread = QueueThread::start(std::move(*made), 1);
    REQUIRE(bool(thread));
    CHECK((*thread)->run_sync([&]() -> Task<bool> {
      waiting = true;
      for (int i = 0; i < 1000 && !completed; ++i) co_await queue.sleep(1'000'000);
      co_return completed;
    }));
    (*thread)->stop();
  }
}

TEST_CASE("stop waits for the operations in flight, also those beyond the depth") {
  each_queue([](QueueThread& thread) {
    const std::string path = scratch_directory() + "/pqblk-stop-" + std::to_string(::getpid());
    Result<File> file = storage::open_file(
        path, {.direct = storage::Direct::optional, .create = true, .overwrite = true});
    REQUIRE(bool(file));
    AlignedBuffer buffer(64 * 1024);
    std::atomic<int> done{0};
    constexpr int kOps = 200;
    const auto write_one = [&](int i) -> Task<void> {
      co_await resume_on(thread.queue());
      const Error e = co_await thread.queue().write(
          *file, static_cast<std::uint64_t>(i) * buffer.size(), buffer.data(), buffer.size());
      if (e.ok()) ++done;
    };
    for (int i = 0; i < kOps; ++i) spawn(write_one(i));
    thread.stop();
    CHECK(done == kOps);
    thread.stop();  // harmless
    ::unlink(path.c_str());
    storage::close_file(*file);
  });
}

TEST_CASE("a stop before run ends the run at once") {
  for (const EngineType engine : kEngines) {
    Result<std::unique_ptr<Queue>> queue = make_queue({.engine = engine});
    REQUIRE(bool(queue));
    (*queue)->stop();
    (*queue)->run();  // would hang otherwise
    CHECK((*queue)->facts().operations == 0);
  }
}

TEST_CASE("one turn hands many operations over with few system calls") {
  auto stage = make_real_stage({.engine = EngineType::uring, .depth = 64});
  Queue& queue = stage->queue();
  File& file = stage->make_file(64 * 4096, false);
  stage->poke(file, 0, pattern(1, 64 * 4096));  // now in the page cache: reads complete at once
  AlignedBuffer buffer(64 * 4096);
  struct CountedOp : Op {
    int* completions = nullptr;
  };
  std::vector<CountedOp> ops(64);
  int completions = 0;
  std::uint64_t entries = 0;
  const Error e = stage->run([&]() -> Task<Error> {
    co_await yield();  // what the start of this coroutine has cost is behind
    const std::uint64_t before = queue.facts().kernel_entries;
    for (std::size_t i = 0; i < ops.size(); ++i) {
      ops[i].type = OpType::read;
      ops[i].file = &file;
      ops[i].offset = i * 4096;
      ops[i].single = {buffer.data() + i * 4096, 4096};
      ops[i].completions = &completions;
      ops[i].completed = [](Op& op) { ++*static_cast<CountedOp&>(op).completions; };
      queue.submit(ops[i]);
    }
    while (completions < 64) co_await yield();
    entries = queue.facts().kernel_entries - before;
    co_return Error();
  });
  CHECK_MESSAGE(e.ok(), e.to_string());
  CHECK(stage->peek(file, 0, buffer.size()) == Bytes(buffer.data(), buffer.data() + buffer.size()));
  CHECK(entries <= 4);
}

// ---- registered buffers and files ----

TEST_CASE("registered buffers and files are used, and data moves through them") {
  auto stage = make_real_stage({.engine = EngineType::uring});
  Queue& queue = stage->queue();
  File& file = stage->make_file(0, true);
  AlignedBuffer arena(1 << 20);
  AlignedBuffer outside(8192);
  const iovec range{arena.data(), arena.size()};
  queue.register_buffers({&range, 1});
  queue.register_file(file);
  REQUIRE(queue.facts().buffers_registered);
  REQUIRE(queue.facts().files_registered == 1);
  const Bytes out = pattern(3, 8192);
  std::memcpy(arena.data() + 4096, out.data(), out.size());
  const Error e = stage->run([&]() -> Task<Error> {
    if (Error x = co_await queue.write(file, 0, arena.data() + 4096, 8192)) co_return x;
    if (Error x = co_await queue.read(file, 0, arena.data() + 65'536, 8192)) co_return x;
    co_return co_await queue.read(file, 0, outside.data(), 8192);
  });
  CHECK_MESSAGE(e.ok(), e.to_string());
  CHECK(std::memcmp(arena.data() + 65'536, out.data(), out.size()) == 0);
  CHECK(std::memcmp(outside.data(), out.data(), out.size()) == 0);
  CHECK(stage->peek(file, 0, out.size()) == out);
  CHECK(queue.facts().fixed_buffer_ops == 2);  // not the one outside the arena
  CHECK(queue.facts().fixed_file_ops == 3);

  queue.unregister_file(file);
  queue.register_buffers({});
  CHECK(queue.facts().files_registered == 0);
  CHECK(!queue.facts().buffers_registered);
  CHECK(stage
            ->run([&]() -> Task<Error> {
              co_return co_await queue.read(file, 0, arena.data(), 4096);
            })
            .ok());
  CHECK(queue.facts().fixed_buffer_ops == 2);
  CHECK(queue.facts().fixed_file_ops == 3);
}

TEST_CASE("a transfer that only begins or ends in a registered buffer does not go through it") {
  auto stage = make_real_stage({.engine = EngineType::uring});
  File& file = stage->make_file(16'384, false);
  AlignedBuffer memory(16'384);
  const iovec middle{memory.data() + 4096, 8192};
  stage->queue().register_buffers({&middle, 1});
  const Error e = stage->run([&]() -> Task<Error> {
    for (const std::size_t at : {0U, 1U, 8192U, 12'287U}) {
      if (Error x = co_await stage->queue().write(file, at, memory.data() + at, 4097)) co_return x;
    }
    co_return Error();
  });
  CHECK_MESSAGE(e.ok(), e.to_string());
  CHECK(stage->queue().facts().fixed_buffer_ops == 0);
}

TEST_CASE("a descriptor number that is used again does not reach the old registered file") {
  auto stage = make_real_stage({.engine = EngineType::uring});
  const std::string base = scratch_directory() + "/pqblk-reuse-" + std::to_string(::getpid());
  const storage::OpenOptions options{.create = true, .overwrite = true};
  Result<File> old_file = storage::open_file(base + "a", options);
  REQUIRE(bool(old_file));
  const int fd = old_file->fd;
  stage->queue().register_file(*old_file);
  storage::close_file(*old_file);  // a mistake: it is still registered
  Result<File> new_file = storage::open_file(base + "b", options);
  REQUIRE(bool(new_file));
  REQUIRE(new_file->fd == fd);
  const Error e = stage->run(
      [&]() -> Task<Error> { co_return co_await stage->queue().write(*new_file, 0, "new", 3); });
  CHECK_MESSAGE(e.ok(), e.to_string());
  CHECK(stage->size_of({.path = base + "a"}) == 0);
  CHECK(stage->size_of({.path = base + "b"}) == 3);
  storage::close_file(*new_file);
  ::unlink((base + "a").c_str());
  ::unlink((base + "b").c_str());
}

TEST_CASE("an unregistered and closed file is unlocked at once, while the ring lives on") {
  auto stage = make_real_stage({.engine = EngineType::uring});
  const std::string path = scratch_directory() + "/pqblk-unlock-" + std::to_string(::getpid());
  Result<File> file = storage::open_file(path, {.create = true, .overwrite = true});
  REQUIRE(bool(file));
  stage->queue().register_file(*file);
  CHECK(stage->run([&]() -> Task<Error> { co_return co_await stage->queue().fdatasync(*file); })
            .ok());
  stage->queue().unregister_file(*file);
  storage::close_file(*file);
  Result<File> again = storage::open_file(path, {.lock_wait_ms = 0});
  CHECK_MESSAGE(bool(again), again.error().to_string());
  if (again) storage::close_file(*again);
  ::unlink(path.c_str());
}

// ---- errors of the kernel ----

TEST_CASE("a write beyond the file size limit is short, goes on, and then fails as EFBIG") {
  rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &limit) == 0);
  for (const EngineType engine : kEngines) {
    auto stage = make_real_stage({.engine = engine});
    File& file = stage->make_file(0, false);
    const Bytes data = pattern(8, 100'000);
    struct sigaction ignore {};
    struct sigaction old {};
    ignore.sa_handler = SIG_IGN;
    ::sigaction(SIGXFSZ, &ignore, &old);
    const rlimit tight{65'536, limit.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &tight) == 0);
    const Error e = stage->run([&]() -> Task<Error> {
      co_return co_await stage->queue().write(file, 0, data.data(), data.size());
    });
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
    ::sigaction(SIGXFSZ, &old, nullptr);
    CAPTURE(stage->queue().engine());
    CHECK(e.os_errno() == EFBIG);
    CHECK(e.kind() == Kind::no_space);
    CHECK(stage->size_of(file) == 65'536);
    CHECK(stage->queue().facts().resubmitted >= 1);
  }
}

TEST_CASE("a full file system is no_space, and what was written before is there") {
  const std::string directory = scratch_directory() + "/pqblk-full-" + std::to_string(::getpid());
  REQUIRE(::mkdir(directory.c_str(), 0700) == 0);
  if (::mount("tmpfs", directory.c_str(), "tmpfs", 0, "size=4m") != 0) {
    ::rmdir(directory.c_str());
    MESSAGE("SKIPPED: mounting a small tmpfs needs CAP_SYS_ADMIN: ", std::strerror(errno));
    return;
  }
  for (const EngineType engine : kEngines) {
    const std::string path = directory + "/f";
    auto stage = make_real_stage({.engine = engine});
    Result<File> file = storage::open_file(path, {.create = true, .overwrite = true});
    REQUIRE(bool(file));
    CHECK(file->in_memory);
    const Bytes data = pattern(9, 1 << 20);
    std::uint64_t fitted = 0;
    for (const std::size_t size : {std::size_t{4096}, data.size()}) {  // plain call, engine
      Error e;
      for (fitted = 0; fitted < 64 * kMiB; fitted += size) {
        e = stage->run([&]() -> Task<Error> {
          co_return co_await stage->queue().write(*file, fitted, data.data(), size);
        });
        if (e) break;
      }
      CHECK(e.kind() == Kind::no_space);
      CHECK(e.offset() == fitted);
      const Bytes first = stage->peek(*file, 0, size);
      CHECK(std::memcmp(first.data(), data.data(), size) == 0);
      REQUIRE(::ftruncate(file->fd, 0) == 0);
    }
    storage::close_file(*file);
    ::unlink(path.c_str());
  }
  ::umount(directory.c_str());
  ::rmdir(directory.c_str());
}

TEST_CASE("a misaligned direct transfer is refused as invalid_argument") {
  for (const EngineType engine : kEngines) {
    auto stage = make_real_stage({.engine = engine});
    File& file = stage->make_file(65'536, true);
    if (file.offset_align == 1) {
      MESSAGE("SKIPPED: the scratch directory is in memory and aligns nothing");
      return;
    }
    AlignedBuffer buffer(8192);
    const Error e = stage->run([&]() -> Task<Error> {
      co_return co_await stage->queue().write(file, 100, buffer.data() + 1, 4096);
    });
    CAPTURE(stage->queue().engine());
    CHECK(e.kind() == Kind::invalid_argument);
    CHECK(e.offset() == 100);
  }
}

TEST_CASE("a queue has a file in memory open for itself, until it is told otherwise or ends") {
  const std::string path = "/dev/shm/pqblk-own-" + std::to_string(::getpid());
  Result<File> file = storage::open_file(path, {.create = true, .overwrite = true});
  if (!file || !file->in_memory) {
    std::printf("SKIP: /dev/shm is no file system in memory\n");
    return;
  }
  const auto times_open = [&path] {
    std::size_t n = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code gone;
      if (std::filesystem::read_symlink(entry.path(), gone) == path) ++n;
    }
    return n;
  };
  auto stage = make_real_stage({});
  Queue& queue = stage->queue();
  CHECK(times_open() == 1);
  queue.register_file(*file);
  queue.register_file(*file);
  CHECK(times_open() == 2);
  // Whatever becomes of the number that was handed over, data goes to the file.
  const int kept = ::dup(file->fd), elsewhere = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  REQUIRE(::dup2(elsewhere, file->fd) == file->fd);
  ::close(elsewhere);
  const Bytes out = pattern(7, 4096);
  Bytes in(out.size());
  const Error e = stage->run([&]() -> Task<Error> {
    if (Error x = co_await queue.write(*file, 4096, out.data(), out.size())) co_return x;
    co_return co_await queue.read(*file, 4096, in.data(), in.size());
  });
  CHECK_MESSAGE(e.ok(), e.to_string());
  CHECK(in == out);
  REQUIRE(::dup2(kept, file->fd) == file->fd);
  ::close(kept);
  CHECK(stage->peek(*file, 4096, out.size()) == out);

  queue.unregister_file(*file);
  CHECK(times_open() == 1);
  queue.register_file(*file);
  CHECK(times_open() == 2);
  stage.reset();
  CHECK(times_open() == 1);
  storage::close_file(*file);
  ::unlink(path.c_str());
}

TEST_CASE("absurd depths are refused") {
  for (const std::uint32_t depth : {0U, 1'000'000U}) {
    Result<std::unique_ptr<Queue>> queue = make_queue({.depth = depth});
    REQUIRE(!queue);
    CHECK(queue.error().kind() == Kind::invalid_argument);
  }
}

TEST_CASE("a kernel thread may do the submissions") {
  Result<std::unique_ptr<QueueThread>> thread =
      QueueThread::start({.engine = EngineType::uring, .depth = 8, .sqpoll = true});
  if (!thread) {
    MESSAGE("SKIPPED: ", thread.error().to_string());
    return;
  }
  const std::string path = scratch_directory() + "/pqblk-sqpoll-" + std::to_string(::getpid());
  Result<File> file = storage::open_file(path, {.create = true, .overwrite = true});
  REQUIRE(bool(file));
  Queue& queue = (*thread)->queue();
  queue.register_file(*file);
  const Bytes out = pattern(4, 64 * 4096);
  Bytes in(out.size());
  const auto move_one = [&](std::size_t i) -> Task<Error> {
    if (Error e = co_await queue.write(*file, i * 4096, &out[i * 4096], 4096)) co_return e;
    co_return co_await queue.read(*file, i * 4096, &in[i * 4096], 4096);
  };
  const Error e = (*thread)->run_sync([&]() -> Task<Error> {
    std::vector<Task<Error>> tasks;
    for (std::size_t i = 0; i < 64; ++i) tasks.push_back(move_one(i));
    co_return co_await all_of(queue, std::move(tasks));
  });
  CHECK_MESSAGE(e.ok(), e.to_string());
  CHECK(in == out);
  queue.unregister_file(*file);
  (*thread)->stop();
  storage::close_file(*file);
  ::unlink(path.c_str());
}

}  // namespace pqblk::io::test
