// The conformance suite: what every engine must do, the simulator included.
//
// The oracle is an in-memory model and the file's content as read around the engine.

#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/aligned.h"
#include "base/units.h"
#include "io/queue.h"
#include "io/stage.h"

namespace pqblk::io::test {

namespace {

constexpr std::uint32_t kDepth = 16;

// Calls body(stage) once for each engine.
template <class Body>
void each_engine(Body body) {
  for (const StageType& type : stages()) {
    CAPTURE(type.name);
    const std::unique_ptr<Stage> stage = type.make(kDepth);
    body(*stage);
  }
}

#define CHECK_OK(expression)                            \
  do {                                                  \
    const Error check_ok = (expression);                \
    CHECK_MESSAGE(check_ok.ok(), check_ok.to_string()); \
  } while (false)

AlignedBuffer filled(std::uint64_t seed, std::size_t size) {
  AlignedBuffer buffer(size);
  const Bytes bytes = pattern(seed, size);
  std::memcpy(buffer.data(), bytes.data(), size);
  return buffer;
}

Bytes bytes_of(const AlignedBuffer& buffer) {
  return Bytes(buffer.data(), buffer.data() + buffer.size());
}

}  // namespace

TEST_CASE("what is written is on the file and is read back, 512 bytes to 8 MiB") {
  each_engine([](Stage& stage) {
    for (const bool direct : {false, true}) {
      CAPTURE(direct);
      File& file = stage.make_file(0, direct);
      for (std::size_t size = 512; size <= 8 * kMiB; size *= 2) {
        CAPTURE(size);
        const std::uint64_t offset = align_up<std::uint64_t>(size / 3, 4096);
        const AlignedBuffer out = filled(size, size);
        AlignedBuffer in(size);
        CHECK_OK(stage.run([&]() -> Task<Error> {
          if (Error e = co_await stage.queue().write(file, offset, out.data(), size)) co_return e;
          if (Error e = co_await stage.queue().fdatasync(file)) co_return e;
          co_return co_await stage.queue().read(file, offset, in.data(), size);
        }));
        CHECK(bytes_of(in) == bytes_of(out));
        CHECK(stage.peek(file, offset, size) == bytes_of(out));
      }
    }
  });
}

TEST_CASE("many more operations than the depth, at once, on random places") {
  each_engine([](Stage& stage) {
    constexpr std::size_t kBlocks = 40 * kDepth;
    for (const bool direct : {false, true}) {
      CAPTURE(direct);
      File& file = stage.make_file(kBlocks * 4096, direct);
      std::vector<AlignedBuffer> buffers;
      Bytes model(kBlocks * 4096);
      for (std::size_t i = 0; i < kBlocks; ++i) {
        buffers.push_back(filled(i + 1000, 4096));
        std::memcpy(&model[i * 4096], buffers[i].data(), 4096);
      }
      const auto write_one = [&](std::size_t i) -> Task<Error> {
        co_return co_await stage.queue().write(file, i * 4096, buffers[i].data(), 4096);
      };
      const auto read_one = [&](std::size_t i) -> Task<Error> {
        std::memset(buffers[i].data(), 0, 4096);
        co_return co_await stage.queue().read(file, i * 4096, buffers[i].data(), 4096);
      };
      CHECK_OK(stage.run([&]() -> Task<Error> {
        std::vector<Task<Error>> writes;
        for (std::size_t i = 0; i < kBlocks; ++i) writes.push_back(write_one((i * 397) % kBlocks));
        if (Error e = co_await all_of(stage.queue(), std::move(writes))) co_return e;
        std::vector<Task<Error>> reads;
        for (std::size_t i = 0; i < kBlocks; ++i) reads.push_back(read_one(i));
        co_return co_await all_of(stage.queue(), std::move(reads));
      }));
      CHECK(stage.peek(file, 0, model.size()) == model);
      for (std::size_t i = 0; i < kBlocks; ++i) {
        REQUIRE(std::memcmp(buffers[i].data(), &model[i * 4096], 4096) == 0);
      }
    }
  });
}

TEST_CASE("a random history of overlapping writes, holes and truncations matches a model") {
  each_engine([](Stage& stage) {
    const std::uint64_t seed = 20;
    constexpr std::size_t kSize = 1 << 20;
    Random random(seed);
    File& file = stage.make_file(kSize, false);
    Bytes model(kSize);
    for (int step = 0; step < 300; ++step) {
      CAPTURE(step);
      const std::size_t offset = random.below(kSize - 1);
      const std::size_t size = 1 + random.below(std::min<std::size_t>(kSize - offset, 70'000));
      const Bytes data = pattern(random.next(), size);
      const std::uint64_t choice = random.below(10);
      CHECK_OK(stage.run([&]() -> Task<Error> {
        Queue& queue = stage.queue();
        if (choice < 6) co_return co_await queue.write(file, offset, data.data(), size);
        if (choice == 6)
          co_return co_await queue.fallocate(file, FallocateMode::punch, offset, size);
        if (choice == 7)
          co_return co_await queue.fallocate(file, FallocateMode::zero, offset, size);
        if (choice == 8) {
          if (Error e = co_await queue.truncate(file, offset)) co_return e;
          co_return co_await queue.truncate(file, kSize);
        }
        Bytes in(size);
        if (Error e = co_await queue.read(file, offset, in.data(), size)) co_return e;
        const bool same = std::memcmp(in.data(), &model[offset], size) == 0;
        co_return same ? Error() : Error(Kind::integrity, "the read differs from the model");
      }));
      if (choice < 6) std::memcpy(&model[offset], data.data(), size);
      if (choice == 6 || choice == 7) std::memset(&model[offset], 0, size);
      if (choice == 8) std::memset(&model[offset], 0, kSize - offset);
    }
    CHECK(stage.size_of(file) == kSize);
    CHECK(stage.peek(file, 0, kSize) == model);
  });
}

TEST_CASE("buffer lists of any length, with empty entries, up to and beyond IOV_MAX") {
  each_engine([](Stage& stage) {
    for (const std::size_t count : {1U, 2U, 7U, 1024U, 1025U, 3000U}) {
      CAPTURE(count);
      File& file = stage.make_file(0, false);
      constexpr std::size_t kPiece = 37;
      Bytes out = pattern(count, count * kPiece);
      Bytes in(out.size());
      const auto list = [&](Bytes& bytes) {
        std::vector<iovec> iov;
        for (std::size_t i = 0; i < count; ++i) {
          if (i % 5 == 3) iov.push_back({nullptr, 0});
          iov.push_back({&bytes[i * kPiece], kPiece});
        }
        return iov;
      };
      std::vector<iovec> from = list(out);
      std::vector<iovec> to = list(in);
      CHECK_OK(stage.run([&]() -> Task<Error> {
        if (Error e = co_await stage.queue().writev(file, 11, from)) co_return e;
        co_return co_await stage.queue().readv(file, 11, to);
      }));
      CHECK(in == out);
      CHECK(stage.peek(file, 11, out.size()) == out);
      CHECK(stage.size_of(file) == 11 + out.size());
    }
  });
}

TEST_CASE("reads across and beyond the end of the file are filled with zeros") {
  each_engine([](Stage& stage) {
    for (const bool direct : {false, true}) {
      for (const std::size_t size : {0U, 512U, 4096U, 5000U, 12'288U}) {
        CAPTURE(direct);
        CAPTURE(size);
        File& file = stage.make_file(size, direct);
        const Bytes content = pattern(size + 1, size);
        if (size > 0) stage.poke(file, 0, content);
        for (const std::size_t offset : {0U, 4096U, 65'536U}) {
          CAPTURE(offset);
          AlignedBuffer in = filled(99, 16'384);
          CHECK_OK(stage.run([&]() -> Task<Error> {
            co_return co_await stage.queue().read(file, offset, in.data(), in.size());
          }));
          Bytes expected(in.size());
          for (std::size_t i = offset; i < size; ++i) expected[i - offset] = content[i];
          CHECK(bytes_of(in) == expected);
        }
      }
    }
  });
}

TEST_CASE("an empty transfer and an empty buffer list succeed") {
  each_engine([](Stage& stage) {
    File& file = stage.make_file(4096, false);
    CHECK_OK(stage.run([&]() -> Task<Error> {
      if (Error e = co_await stage.queue().read(file, 0, nullptr, 0)) co_return e;
      if (Error e = co_await stage.queue().writev(file, 0, {})) co_return e;
      co_return Error();
    }));
    CHECK(stage.size_of(file) == 4096);
  });
}

TEST_CASE("fallocate extends, punches without changing the size, and zeroes") {
  each_engine([](Stage& stage) {
    File& file = stage.make_file(0, false);
    const Bytes data = pattern(5, 64 * 1024);
    CHECK_OK(stage.run([&]() -> Task<Error> {
      Queue& queue = stage.queue();
      if (Error e = co_await queue.fallocate(file, FallocateMode::allocate, 0, 131'072))
        co_return e;
      if (Error e = co_await queue.write(file, 0, data.data(), data.size())) co_return e;
      if (Error e = co_await queue.fallocate(file, FallocateMode::punch, 4096, 8192)) co_return e;
      co_return co_await queue.fallocate(file, FallocateMode::zero, 20'000, 100);
    }));
    Bytes expected = data;
    expected.resize(131'072);
    std::memset(&expected[4096], 0, 8192);
    std::memset(&expected[20'000], 0, 100);
    CHECK(stage.size_of(file) == 131'072);
    CHECK(stage.peek(file, 0, expected.size()) == expected);
  });
}

TEST_CASE("sleeps end in the order of their times, not before them") {
  each_engine([](Stage& stage) {
    std::vector<int> order;
    Queue& queue = stage.queue();
    std::uint64_t begun = 0;
    std::uint64_t ended = 0;
    const auto sleeper = [&](int ms) -> Task<Error> {
      co_await queue.sleep(static_cast<std::uint64_t>(ms) * 1'000'000);
      order.push_back(ms);
      co_return Error();
    };
    CHECK_OK(stage.run([&]() -> Task<Error> {
      begun = queue.now_ns();
      std::vector<Task<Error>> sleepers;
      for (const int ms : {30, 10, 20, 1}) sleepers.push_back(sleeper(ms));
      Error e = co_await all_of(queue, std::move(sleepers));
      ended = queue.now_ns();
      co_return e;
    }));
    CHECK(order == std::vector<int>{1, 10, 20, 30});
    CHECK(ended - begun >= 30'000'000);
  });
}

TEST_CASE("a sleep can be cut short, once, and others go on") {
  each_engine([](Stage& stage) {
    constexpr std::uint64_t kHour = 3'600'000'000'000;
    Queue& queue = stage.queue();
    std::string order;
    std::uint64_t took = 0;
    Queue::Sleep longest = queue.sleep(kHour);
    const auto sleeper = [&](char name, Queue::Sleep& sleep) -> Task<Error> {
      co_await sleep;
      order += name;
      co_return Error();
    };
    Queue::Sleep middle = queue.sleep(20'000'000), shortest = queue.sleep(1'000'000);
    const auto cut = [&]() -> Task<Error> {
      queue.cut_short(longest);
      queue.cut_short(longest);  // it is awake
      ReadyNode awake;
      queue.cut_short(awake);
      co_return Error();
    };
    CHECK_OK(stage.run([&]() -> Task<Error> {
      const std::uint64_t begun = queue.now_ns();
      std::vector<Task<Error>> all;
      all.push_back(sleeper('l', longest));
      all.push_back(sleeper('m', middle));
      all.push_back(sleeper('s', shortest));
      all.push_back(cut());
      Error e = co_await all_of(queue, std::move(all));
      took = queue.now_ns() - begun;
      co_return e;
    }));
    CHECK(order == "lsm");
    CHECK(took >= 20'000'000);
    CHECK(took < kHour);
  });
}

TEST_CASE("yield lets others run, in turn") {
  each_engine([](Stage& stage) {
    std::string order;
    const auto talk = [&](char c) -> Task<Error> {
      for (int i = 0; i < 3; ++i) {
        order += c;
        co_await yield();
      }
      co_return Error();
    };
    CHECK_OK(stage.run([&]() -> Task<Error> {
      std::vector<Task<Error>> talkers;
      talkers.push_back(talk('a'));
      talkers.push_back(talk('b'));
      co_return co_await all_of(stage.queue(), std::move(talkers));
    }));
    CHECK(order == "ababab");
  });
}

TEST_CASE("an operation on a closed descriptor names what failed and where") {
  for (const StageType& type : stages()) {
    if (!type.real) continue;  // the simulator has no descriptors
    CAPTURE(type.name);
    const std::unique_ptr<Stage> stage = type.make(kDepth);
    for (const bool direct : {false, true}) {
      File file;
      file.path = "gone.img";
      file.direct = direct;
      Error seen;
      AlignedBuffer buffer(4096);
      CHECK_OK(stage->run([&]() -> Task<Error> {
        seen = co_await stage->queue().write(file, 8192, buffer.data(), 4096);
        co_return Error();
      }));
      CHECK(seen.os_errno() == EBADF);
      CHECK(seen.kind() == Kind::closed);
      CHECK(seen.operation() == "write");
      CHECK(seen.path() == "gone.img");
      CHECK(seen.offset() == 8192);
    }
  }
}

}  // namespace pqblk::io::test
