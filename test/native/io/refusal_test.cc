// Engines that the process may not use: a real seccomp filter in a child process, as a container
// runtime sets one.

#include <doctest/doctest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <functional>
#include <string>

#include "io/queue_thread.h"
#include "io/stage.h"

namespace pqblk::io::test {

namespace {

bool refuse_call(long number, int err) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(err)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{sizeof filter / sizeof filter[0], filter};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// Runs `body` in a child and returns the text it gave back.
std::string in_child(const std::function<std::string()>& body) {
  int ends[2] = {-1, -1};
  REQUIRE(::pipe(ends) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const std::string text = body();
    const bool sent =
        ::write(ends[1], text.data(), text.size()) == static_cast<ssize_t>(text.size());
    ::_exit(sent ? 0 : 1);
  }
  ::close(ends[1]);
  std::string text;
  char chunk[512];
  for (ssize_t n = 0; (n = ::read(ends[0], chunk, sizeof chunk)) > 0;) {
    text.append(chunk, static_cast<std::size_t>(n));
  }
  ::close(ends[0]);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK_MESSAGE((WIFEXITED(status) && WEXITSTATUS(status) == 0), "the child failed");
  return text;
}

std::string describe(EngineType engine) {
  std::string cause;
  Result<std::unique_ptr<QueueThread>> thread = QueueThread::start({.engine = engine}, 0, &cause);
  if (!thread) {
    return std::string(kind_name(thread.error().kind())) + ": " + thread.error().message();
  }
  // The engine that was chosen must work.
  File file;
  file.path = scratch_directory();
  const Error e = (*thread)->run_sync([&]() -> Task<Error> {
    char byte = 0;
    co_return co_await (*thread)->queue().read(file, 0, &byte, 1);
  });
  if (e.os_errno() != EBADF) return "the engine did not run: " + e.to_string();
  return std::string((*thread)->queue().engine()) + "; " + cause;
}

}  // namespace

TEST_CASE("io_uring refused by seccomp: automatic falls back and names the cause") {
  const std::string text = in_child([] {
    return refuse_call(SYS_io_uring_setup, EPERM) ? describe(EngineType::automatic) : "no filter";
  });
  CHECK(text == "threads; a seccomp filter refuses io_uring_setup (EPERM)");
}

TEST_CASE("io_uring hidden by seccomp: an explicit choice is an error, never a fallback") {
  const std::string text = in_child([] {
    return refuse_call(SYS_io_uring_setup, ENOSYS) ? describe(EngineType::uring) : "no filter";
  });
  CHECK(text == "unsupported: a seccomp filter hides io_uring_setup (ENOSYS)");
}

TEST_CASE("AIO refused by seccomp is an error that says so") {
  const std::string text = in_child(
      [] { return refuse_call(SYS_io_setup, EPERM) ? describe(EngineType::aio) : "no filter"; });
  CHECK(text == "unsupported: a seccomp filter refuses io_setup (EPERM)");
}

TEST_CASE("without a filter the automatic choice is io_uring where the kernel allows it") {
  const std::string text = in_child([] { return describe(EngineType::automatic); });
  if (!text.starts_with("io_uring")) MESSAGE("this machine refuses io_uring: ", text);
  const bool named = text == "io_uring; " || text.starts_with("threads; ");
  CHECK_MESSAGE(named, text);
}

}  // namespace pqblk::io::test
