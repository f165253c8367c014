// What a process that serves owes to whoever started it.
//
// Room node/.
#pragma once

#include <napi.h>

namespace pqblk::node {

// notifyServiceManager(state: string): boolean, as sd_notify(3): a datagram to $NOTIFY_SOCKET;
// false when there is none.
Napi::Value notify_service_manager(const Napi::CallbackInfo& info);

}  // namespace pqblk::node
