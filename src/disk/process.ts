// Room disk/: what a process that serves owes to whoever started it, and what it gives up.
//
// Everything here holds for the whole process, and cannot be taken back. The native side is
// native/node/sandbox.h and service_manager.h.
import { native } from '../native.js';

/** Tells the service manager that started this process, as sd_notify(3). False without one. */
export function notifyServiceManager(state: string): boolean {
  return native().notifyServiceManager(state);
}

/** From here on nothing that this process starts gains rights. */
export function noNewPrivileges(): boolean {
  return native().noNewPrivileges();
}

/** No core file from here on, and nobody but root traces or looks into this process. */
export function noCoreDumps(): boolean {
  return native().noCoreDumps();
}

/** No core file from here on, and none for a program that collects them; whoever may trace still may. */
export function noCoreFiles(): boolean {
  return native().noCoreFiles();
}

/** False once the engine has keys that may reach swap, because `RLIMIT_MEMLOCK` leaves no room for them. */
export function keysAreLocked(): boolean {
  return native().keysAreLocked();
}

/**
 * From here on, in every thread, system calls that serving never needs fail with EPERM: starting
 * programs, looking into other processes, mounting, other identities, and the like. Returns why it
 * was not possible, else undefined. Implies `noNewPrivileges`.
 */
export function refuseSystemCalls(): string | undefined {
  return native().refuseSystemCalls();
}
