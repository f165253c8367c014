// The vhost-user-blk server of an open disk, as JavaScript sees it.
//
// Room node/: translates; what a server does is export/vhost_user.h's business.
#pragma once

#include <napi.h>

#include <memory>

#include "node/env.h"

namespace pqblk::node {

// disk.serveVhostUser(options) -> Promise<server>; a server has serving(), stats(),
// takeReports() and close(), and calls its property onReports, if it is a function, when there are
// reports to take. It keeps the event loop alive until it is closed.
Napi::Value serve_vhost_user(const Napi::CallbackInfo& info, const std::shared_ptr<OpenDisk>& open);

}  // namespace pqblk::node
