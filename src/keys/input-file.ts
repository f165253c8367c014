// Room keys/: reading files that somebody names on a command line: policies, lists, keys, passphrases.
//
// What is named may be a pipe that nobody writes into, a device without end, a directory. Opening never
// waits, so the process hears signals; reading waits for pipes alone, and whoever handles signals can
// ask whether somebody is waited for.
import { closeSync, constants, fstatSync, openSync, read as readCallback } from 'node:fs';
import { setTimeout } from 'node:timers/promises';
import { promisify } from 'node:util';
import { type ErrorKind, fromSystem, PqblkError } from '../errors.js';
import { monotonicMs } from './monotonic.js';
import { waitingFor } from './waiting.js';

const POLL_MS = 10;
/** For the first byte of a named pipe: its writer may be on the way. */
const PIPE_PATIENCE_MS = 2000;
const CHUNK_BYTES = 65_536;

const read = promisify(readCallback);

/**
 * Opens what may be read like a file, a regular file or a pipe; the caller closes it. Kinds
 * `invalid_argument` (a directory, a device, a socket) and those of the file system.
 */
export function openInput(path: string, operation: string): number {
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENXIO') {
      throw fromSystem(error, { path, operation });
    }
    throw new PqblkError('invalid_argument', 'is a socket, not a file', { path, operation });
  }
  const stats = fstatSync(fd);
  if (stats.isFile() || stats.isFIFO()) return fd;
  closeSync(fd);
  const what = stats.isDirectory() ? 'a directory' : 'a device';
  throw new PqblkError('invalid_argument', `is ${what}, not a file`, { path, operation });
}

/**
 * Reads some bytes into `buffer` from `at` on, waiting where a pipe has none yet; 0: the end. For the
 * first byte it waits `patienceMs` though nobody writes into the pipe.
 */
export async function readSome(
  fd: number,
  buffer: Uint8Array,
  at: number,
  patienceMs = 0,
): Promise<number> {
  const deadline = monotonicMs() + patienceMs;
  for (;;) {
    const bytes = await waitingFor(read(fd, buffer, at, buffer.length - at, null)).then(
      ({ bytesRead }) => bytesRead,
      (error: NodeJS.ErrnoException) => {
        if (error.code !== 'EAGAIN') throw error;
        return undefined;
      },
    );
    if (bytes !== undefined && bytes > 0) return bytes;
    if (bytes === 0 && (at > 0 || monotonicMs() >= deadline)) return 0;
    await waitingFor(setTimeout(POLL_MS));
  }
}

/** How long to wait for somebody to write into what `fd` is. */
export const patienceFor = (fd: number): number => (fstatSync(fd).isFIFO() ? PIPE_PATIENCE_MS : 0);

/** What an input may be. */
export interface InputLimits {
  readonly operation: string;
  readonly bytesMax: number;
  /** Of longer ones. Default `invalid_argument`. */
  readonly tooLong?: ErrorKind | undefined;
}

/** The bytes of a file or a pipe. Kinds: those of openInput, and `tooLong`. */
export async function readInput(
  path: string,
  { operation, bytesMax, tooLong = 'invalid_argument' }: InputLimits,
): Promise<Buffer> {
  const fd = openInput(path, operation);
  const chunks: Buffer[] = [];
  let length = 0;
  try {
    const patience = patienceFor(fd);
    for (;;) {
      const chunk = Buffer.allocUnsafeSlow(CHUNK_BYTES);
      const bytes = await readSome(fd, chunk, 0, length === 0 ? patience : 0);
      if (bytes === 0 && length === 0 && patience > 0) {
        throw new PqblkError('invalid_argument', 'nothing came out of this pipe', {
          path,
          operation,
        });
      }
      if (bytes === 0) break;
      chunks.push(chunk.subarray(0, bytes));
      length += bytes;
      if (length > bytesMax) {
        throw new PqblkError(tooLong, `longer than ${bytesMax} bytes`, { path, operation });
      }
    }
  } catch (error) {
    throw fromSystem(error, { path, operation });
  } finally {
    closeSync(fd);
  }
  return Buffer.concat(chunks, length);
}

/** The same, as text. */
export async function readInputText(path: string, limits: InputLimits): Promise<string> {
  return (await readInput(path, limits)).toString('utf8');
}
