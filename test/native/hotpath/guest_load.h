// The load of load.h as a guest's: 4 KiB reads through a vhost-user ring, driver and device on the
// same thread.
//
// Room test/hotpath. The driver is asked once a turn of the queue's thread, before the device looks
// at the ring, so that nothing depends on how two threads meet.
#pragma once

#include <string>

#include "hotpath/load.h"

namespace pqblk::test {

// `socket`: a path to make. The first error. Blocking; never on a queue's thread.
Error run_guest_load(image::Disk& disk, const LoadSpec& spec, const std::string& socket);

}  // namespace pqblk::test
