// Handing the keys of a volume to another process: over a descriptor, or as an agent on a socket.
//
// Room node/. The bytes are sealed/key_bundle.h, the agent is export/key_agent.h.
#pragma once

#include <napi.h>

namespace pqblk::node {

// handKeys({ fd, uuid }, keys) -> Promise<void>. Never to a terminal, nor to a file that others may
// read (Kind::permission). The descriptor stays open.
Napi::Value hand_keys(const Napi::CallbackInfo& info);
// keyAgent({ path, uuid, count?, timeoutMs? }, keys) -> { serve(token?) -> Promise<void> }: listens
// when it returns; serve() is to be called once, and settles when the agent has ended.
Napi::Value key_agent(const Napi::CallbackInfo& info);

}  // namespace pqblk::node
