// What a process that serves, or handles keys, gives up: rights it will never need, and traces of
// itself. And whether it could keep its keys from swap.
//
// Room node/. All of it holds for the whole process, for good.
#pragma once

#include <napi.h>

namespace pqblk::node {

// noNewPrivileges(): boolean. From here on no program that this thread, or one it makes, starts
// gains rights.
Napi::Value no_new_privileges(const Napi::CallbackInfo& info);
// noCoreDumps(): boolean. No core file, and nobody but root looks into this process or traces it.
Napi::Value no_core_dumps(const Napi::CallbackInfo& info);
// noCoreFiles(): boolean. No core file, and none for a program that collects them; all else stays.
Napi::Value no_core_files(const Napi::CallbackInfo& info);
// keysAreLocked(): boolean. False once keys of this process did not fit in locked memory.
Napi::Value keys_are_locked(const Napi::CallbackInfo& info);
// refuseSystemCalls(): undefined, or why it was not possible. From here on, in every thread, the
// system calls of the table in sandbox.cc fail with EPERM: starting programs, looking into other
// processes, mounting, modules, other identities and namespaces. Implies noNewPrivileges().
Napi::Value refuse_system_calls(const Napi::CallbackInfo& info);

}  // namespace pqblk::node
