// The NBD server of an open disk, as JavaScript sees it.
//
// Room node/: translates; what a server does is export/nbd_server.h's business.
#pragma once

#include <napi.h>

#include <memory>

#include "node/env.h"

namespace pqblk::node {

// disk.serveNbd(options) -> Promise<server>; a server has port, stats(), takeReports() and close(),
// and calls its property onReports, if it is a function, when there are reports to take. It keeps
// the event loop alive until it is closed.
Napi::Value serve_nbd(const Napi::CallbackInfo& info, const std::shared_ptr<OpenDisk>& open);

}  // namespace pqblk::node
