// Room keys/: one process at a time, by a lock on a file beside the thing that is locked.
//
// The kernel keeps the lock and ends it with its holder, so nothing is left to be judged or taken over,
// and the file stays: whoever removed it could remove another holder's. What is in it is for people.
import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { hostname } from 'node:os';
import { setTimeout } from 'node:timers/promises';
import { fromSystem, PqblkError } from '../errors.js';
import { native } from '../native.js';
import { monotonicMs } from './monotonic.js';

const POLL_MS = 20;
/** flock(2): somebody else has it. */
const EWOULDBLOCK = 11;
const HOLDER_BYTES_MAX = 512;

/**
 * Returns how to give it back. `patienceMs`: how long to wait for it. Kind `locked` with the holder, and
 * those of the file system.
 */
export async function takeLock(
  of: string,
  operation: string,
  patienceMs = 0,
): Promise<() => Promise<void>> {
  const path = `${of}.lock`;
  const fail = (error: unknown) => fromSystem(error, { path: of, operation });
  const { O_RDWR, O_CREAT, O_NOFOLLOW, O_NONBLOCK } = constants;
  const flags = O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK;
  const file = await open(path, flags, 0o600).catch((error) => Promise.reject(fail(error)));
  try {
    await waitFor(file, monotonicMs() + patienceMs, { path: of, operation });
    await note(file, `${hostname()} ${process.pid}\n`);
  } catch (error) {
    await file.close();
    throw fail(error);
  }
  return async () => {
    await note(file, '').catch(() => {});
    await file.close();
  };
}

async function waitFor(
  file: FileHandle,
  deadline: number,
  details: { path: string; operation: string },
): Promise<void> {
  for (;;) {
    const errno = native().lockFile(file.fd);
    if (errno === 0) return;
    if (errno !== EWOULDBLOCK) {
      throw new PqblkError('io_error', `the file cannot be locked (errno ${errno})`, details);
    }
    if (monotonicMs() >= deadline) {
      const holder = await holderIn(file);
      throw new PqblkError('locked', `another process is at it (${holder || 'unknown'})`, details);
    }
    await setTimeout(POLL_MS);
  }
}

async function note(file: FileHandle, holder: string): Promise<void> {
  await file.truncate(0);
  await file.write(holder, 0);
}

async function holderIn(file: FileHandle): Promise<string> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(HOLDER_BYTES_MAX), 0, undefined, 0);
  return buffer.toString('utf8', 0, bytesRead).trim();
}
