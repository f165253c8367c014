#include "node/file_lock.h"

#include <sys/file.h>

#include <cerrno>

namespace pqblk::node {

Napi::Value lock_file(const Napi::CallbackInfo& info) {
  const int descriptor = info[0].IsNumber() ? info[0].As<Napi::Number>().Int32Value() : -1;
  const int result = ::flock(descriptor, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
  return Napi::Number::New(info.Env(), result);
}

}  // namespace pqblk::node
