// The addon's entry: what src/native.ts sees.
//
// Room node/.
#include <napi.h>

#include "node/channel.h"
#include "node/disk_handle.h"
#include "node/env.h"
#include "node/file_lock.h"
#include "node/hand_keys.h"
#include "node/images.h"
#include "node/job.h"
#include "node/local_socket.h"
#include "node/sandbox.h"
#include "node/service_manager.h"

namespace pqblk::node {
namespace {

Napi::Object set_up(Napi::Env env, Napi::Object exports) {
  auto* state = new EnvState(env);
  env.SetInstanceData(state);
  state->disk_class = Napi::Persistent(DiskHandle::define(env));
  state->channel_class = Napi::Persistent(Channel::define(env));
  const Napi::Function token = JobToken::define(env);
  state->token_class = Napi::Persistent(token);

  exports.Set("version", PQBLK_VERSION);
  exports.Set("JobToken", token);
  exports.Set("openDisk", Napi::Function::New(env, open_disk, "openDisk"));
  exports.Set("createDisk", Napi::Function::New(env, create_disk, "createDisk"));
  exports.Set("diskInfo", Napi::Function::New(env, disk_info, "diskInfo"));
  exports.Set("checkDisk", Napi::Function::New(env, check_disk, "checkDisk"));
  exports.Set("replaceKeyArea", Napi::Function::New(env, replace_key_area, "replaceKeyArea"));
  exports.Set("backUpHeader", Napi::Function::New(env, back_up_header, "backUpHeader"));
  exports.Set("lookAtHeader", Napi::Function::New(env, look_at_header, "lookAtHeader"));
  exports.Set("restoreHeader", Napi::Function::New(env, restore_header, "restoreHeader"));
  exports.Set("clearCorrupt", Napi::Function::New(env, clear_corrupt, "clearCorrupt"));
  exports.Set("handKeys", Napi::Function::New(env, hand_keys, "handKeys"));
  exports.Set("keyAgent", Napi::Function::New(env, key_agent, "keyAgent"));
  exports.Set("lockFile", Napi::Function::New(env, lock_file, "lockFile"));
  exports.Set("listenLocal", Napi::Function::New(env, listen_local, "listenLocal"));
  exports.Set("connectLocal", Napi::Function::New(env, connect_local, "connectLocal"));
  exports.Set("peerOf", Napi::Function::New(env, peer_of, "peerOf"));
  exports.Set("engineInfo", Napi::Function::New(env, engine_info, "engineInfo"));
  exports.Set("freeSpace", Napi::Function::New(env, free_space, "freeSpace"));
  exports.Set("notifyServiceManager",
              Napi::Function::New(env, notify_service_manager, "notifyServiceManager"));
  exports.Set("noNewPrivileges", Napi::Function::New(env, no_new_privileges, "noNewPrivileges"));
  exports.Set("noCoreDumps", Napi::Function::New(env, no_core_dumps, "noCoreDumps"));
  exports.Set("noCoreFiles", Napi::Function::New(env, no_core_files, "noCoreFiles"));
  exports.Set("keysAreLocked", Napi::Function::New(env, keys_are_locked, "keysAreLocked"));
  exports.Set("refuseSystemCalls",
              Napi::Function::New(env, refuse_system_calls, "refuseSystemCalls"));
  exports.Set("inSystemDirectory",
              Napi::Function::New(env, in_system_directory, "inSystemDirectory"));
  return exports;
}

}  // namespace
}  // namespace pqblk::node

static Napi::Object init(Napi::Env env, Napi::Object exports) {
  return pqblk::node::set_up(env, exports);
}
NODE_API_MODULE(NODE_GYP_MODULE_NAME, init)
