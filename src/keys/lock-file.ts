// Room keys/: one process at a time, by a file beside the thing that is locked.
//
// The file names host and process. A lock whose process died on this host is taken over; one of another
// host is respected, since nobody here can tell.
import { open, readFile, unlink } from 'node:fs/promises';
import { hostname } from 'node:os';
import { fromSystem, PqblkError } from '../errors.js';

/** Returns how to give it back. Kind `locked` with the holder, and those of the file system. */
export async function takeLock(of: string, operation: string): Promise<() => Promise<void>> {
  const path = `${of}.lock`;
  for (let attempt = 0; attempt < 2; attempt += 1) {
    try {
      const file = await open(path, 'wx', 0o600);
      await file.writeFile(`${hostname()} ${process.pid}\n`);
      await file.close();
      return async () => await unlink(path).catch(() => undefined);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') {
        throw fromSystem(error, { path: of, operation });
      }
    }
    const holder = (await readFile(path, 'utf8').catch(() => '')).trim();
    const [host, pid] = holder.split(' ');
    if (host !== hostname() || isAlive(Number(pid))) {
      throw new PqblkError('locked', `another process is at it (${holder || 'unknown'})`, {
        path: of,
        operation,
        hint: `if that process is gone, remove ${path}`,
      });
    }
    await unlink(path).catch(() => undefined);
  }
  throw new PqblkError('locked', 'another process is at it', { path: of, operation });
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
