#include "node/hand_keys.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <utility>

#include "export/key_agent.h"
#include "node/convert.h"
#include "node/job.h"
#include "sealed/key_bundle.h"

namespace pqblk::node {
namespace {

// Is the reading end of this pipe open in this very process? Then it is the runtime's own, which
// takes the bytes for something else, or nobody's.
bool reads_itself(int fd, const struct stat& pipe) {
  const std::unique_ptr<DIR, int (*)(DIR*)> open(::opendir("/proc/self/fd"), &::closedir);
  if (!open) return false;
  while (const dirent* entry = ::readdir(open.get())) {
    const int other = std::atoi(entry->d_name);
    struct stat status {};
    if (other == fd || ::fstat(other, &status) != 0) continue;
    if (status.st_dev != pipe.st_dev || status.st_ino != pipe.st_ino) continue;
    if ((::fcntl(other, F_GETFL) & O_ACCMODE) != O_WRONLY) return true;
  }
  return false;
}

// Where the clear bytes of keys may go.
Error check_target(int fd) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) return Error::from_errno(errno, "hand over keys");
  const auto refuse = [](const char* why) {
    return Error(Kind::permission, why).at("hand over keys");
  };
  if (::isatty(fd) == 1) return refuse("keys are never written to a terminal");
  // Whoever may open a file or a named pipe reads what is in it; root does in any case.
  if (S_ISREG(status.st_mode) || S_ISFIFO(status.st_mode)) {
    if ((status.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
      return refuse("others have access to this file; expected mode 0600");
    }
    if (status.st_uid != ::geteuid() && status.st_uid != 0) {
      return refuse("this file or pipe belongs to another user");
    }
  }
  // Descriptors without a type are the runtime's: events, rings.
  if ((status.st_mode & S_IFMT) == 0) return refuse("this descriptor takes no keys");
  if (S_ISFIFO(status.st_mode) && reads_itself(fd, status)) {
    return refuse("both ends of this pipe are in this process: nobody else reads it");
  }
  return {};
}

Error write_fully(int fd, std::span<const std::uint8_t> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error::from_errno(errno, "hand over keys");
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
  return {};
}

Error hand_over(int fd, const sealed::KeyBundle& bundle) {
  if (Error e = check_target(fd)) return e;
  const auto memory = sealed::BundleMemory::make();
  if (!memory) return memory.error();
  const auto size = sealed::write_bundle(bundle.uuid, bundle.keys, memory->bytes());
  if (!size) return size.error();
  return write_fully(fd, memory->bytes().first(*size));
}

}  // namespace

Napi::Value hand_keys(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  const auto bundle = std::make_shared<sealed::KeyBundle>();
  std::uint32_t fd = 0;
  options.read("fd", fd);
  options.read("uuid", bundle->uuid);
  read_keys(env, info[1], bundle->keys);
  if (env.IsExceptionPending()) return env.Undefined();
  return start_job(
      env, env.Undefined(), [fd, bundle] { return hand_over(static_cast<int>(fd), *bundle); },
      [](Napi::Env e) { return e.Undefined(); });
}

Napi::Value key_agent(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Options options(env, info[0]);
  exports::KeyAgentOptions how;
  options.read("path", how.path);
  options.read("uuid", how.uuid);
  options.read("count", how.count);
  options.read("timeoutMs", how.timeout_ms);
  read_keys(env, info[1], how.keys);
  if (env.IsExceptionPending()) return env.Undefined();
  auto made = exports::KeyAgent::listen(std::move(how));
  if (!made) {
    Napi::Error(env, error_to_js(env, made.error())).ThrowAsJavaScriptException();
    return env.Undefined();
  }
  const std::shared_ptr<exports::KeyAgent> agent = std::move(*made);
  const Napi::Object handle = Napi::Object::New(env);
  handle.Set("serve", Napi::Function::New(env, [agent](const Napi::CallbackInfo& call) {
               return start_job(
                   call.Env(), call[0],
                   [agent](TokenCore& core) {
                     return agent->serve([&] { return core.report(agent->released(), 0); });
                   },
                   [](Napi::Env e) { return e.Undefined(); });
             }));
  return handle;
}

}  // namespace pqblk::node
