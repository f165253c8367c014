// What every thread of room io/ does first. Private to it.
#pragma once

#include <pthread.h>
#include <signal.h>

namespace pqblk::io {

// Names the calling thread (at most 15 characters) and leaves signals to the embedding process: a
// handler running here would delay every request. Faults stay deliverable, for their reports.
inline void set_up_thread(const char* name) {
  sigset_t set;
  sigfillset(&set);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) {
    sigdelset(&set, fault);
  }
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  pthread_setname_np(pthread_self(), name);
}

}  // namespace pqblk::io
