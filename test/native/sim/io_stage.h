// The simulator as one of the engines of the I/O conformance suite.
//
// Room test/sim. Short transfers and interruptions are injected throughout: the shared operation
// state machine must hide them.
#pragma once

#include "io/stage.h"

namespace pqblk::sim {

io::test::StageType simulator_stage();

}  // namespace pqblk::sim
