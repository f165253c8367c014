// Unix sockets in Linux's abstract namespace, and who is at the other end of one.
//
// Room node/. Such a socket needs no directory, has no mode, and ends with its process; whoever is
// in the same network namespace may connect, so both ends ask peerOf() before they believe
// anything. Node has its own, but how it pads a name to the length of the address depends on its
// version.
#pragma once

#include <napi.h>

namespace pqblk::node {

// listenLocal(name): a listening descriptor, the caller's to close, or the negative errno.
Napi::Value listen_local(const Napi::CallbackInfo& info);

// connectLocal(name): a connected descriptor, the caller's to close, or the negative errno; never
// waits: -EAGAIN when the other end has too many who do.
Napi::Value connect_local(const Napi::CallbackInfo& info);

// peerOf(descriptor): {pid, uid} of who connected, or who listened, as seen from this process's
// namespaces; undefined when the descriptor is no Unix socket.
Napi::Value peer_of(const Napi::CallbackInfo& info);

}  // namespace pqblk::node
