// Functions on image files that are not open as disks: create, look, check, replace the key area.
//
// Room node/. Each answers with a promise and does its work on a libuv worker.
#pragma once

#include <napi.h>

namespace pqblk::node {

// createDisk(options, keys?, token?) -> Promise<void>
Napi::Value create_disk(const Napi::CallbackInfo& info);
// diskInfo({ path, format? }) -> Promise<object>
Napi::Value disk_info(const Napi::CallbackInfo& info);
// checkDisk({ path, format, repair?, uuid? }, keys?, token?) -> Promise<object>
Napi::Value check_disk(const Napi::CallbackInfo& info);
// replaceKeyArea({ path, keyArea?, expectedGeneration?, level? }) -> Promise<void>
Napi::Value replace_key_area(const Napi::CallbackInfo& info);
// backUpHeader({ path }) -> Promise<{ uuid, header, sessions }>
Napi::Value back_up_header(const Napi::CallbackInfo& info);
// lookAtHeader({ path, uuid, header, sessions }, keys)
//   -> Promise<{ readable, keyAreaCopies, keyAreaState }>
Napi::Value look_at_header(const Napi::CallbackInfo& info);
// restoreHeader({ path, uuid, header, sessions }, keys) -> Promise<{ header, sessions }>
Napi::Value restore_header(const Napi::CallbackInfo& info);
// clearCorrupt({ path }) -> Promise<void>
Napi::Value clear_corrupt(const Napi::CallbackInfo& info);
// engineInfo() -> Promise<{ engine, fallbackCause? }>: what this machine allows
Napi::Value engine_info(const Napi::CallbackInfo& info);
// freeSpace({ path }) -> Promise<number>: bytes left in a directory
Napi::Value free_space(const Napi::CallbackInfo& info);
// inSystemDirectory({ path }) -> boolean
Napi::Value in_system_directory(const Napi::CallbackInfo& info);

}  // namespace pqblk::node
