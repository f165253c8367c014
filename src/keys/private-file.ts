// Room keys/: files that only their owner may read, replaced atomically and durably.
//
// The key store and its pins are kept this way. This file knows permissions and durability, nothing
// of what is stored. Directories are 0700, files 0600; looser ones are refused rather than
// repaired, because whoever loosened them may already have read them.
import { constants, type Stats } from 'node:fs';
import { type FileHandle, link, lstat, mkdir, open, rename, unlink } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { fromSystem, PqblkError } from '../errors.js';
import { toHex } from './bytes.js';
import { randomBytes, Secret } from './secret.js';

const OTHERS = 0o077;
const DIRECTORY_MODE = 0o700;
const FILE_MODE = 0o600;

/** Temporary files end like this; listings ignore them. */
export const TEMPORARY_SUFFIX = '.tmp';

function requirePrivate(path: string, stats: Stats, mode: number): void {
  const octal = (bits: number) => `0${(bits & 0o777).toString(8)}`;
  if ((stats.mode & OTHERS) !== 0) {
    throw new PqblkError(
      'permission',
      `permissions ${octal(stats.mode)} let others in; expected ${octal(mode)} or stricter`,
      { path, operation: 'check permissions', hint: `chmod ${octal(mode)} ${path}` },
    );
  }
  const user = process.geteuid?.() ?? 0;
  if (user !== 0 && stats.uid !== user && stats.uid !== 0) {
    throw new PqblkError('permission', `owned by user ${stats.uid}, not by user ${user}`, {
      path,
      operation: 'check permissions',
    });
  }
}

/** Makes the directory (0700, with parents) or checks it. Kinds `permission`, `io_error`, … */
export async function ensurePrivateDirectory(path: string): Promise<void> {
  try {
    await mkdir(path, { recursive: true, mode: DIRECTORY_MODE });
  } catch (error) {
    throw fromSystem(error, { path, operation: 'create directory' });
  }
  await requirePrivateDirectory(path);
}

/** False when it does not exist; kind `permission` when it is not private or not a directory. */
export async function requirePrivateDirectory(path: string): Promise<boolean> {
  const stats = await lstatOrNothing(path);
  if (!stats) return false;
  if (!stats.isDirectory()) {
    throw new PqblkError('permission', 'not a directory', { path, operation: 'open directory' });
  }
  requirePrivate(path, stats, DIRECTORY_MODE);
  return true;
}

async function lstatOrNothing(path: string): Promise<Stats | undefined> {
  try {
    return await lstat(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw fromSystem(error, { path, operation: 'stat' });
  }
}

/** The text of a private file without secrets; otherwise as readSecretFile. */
export async function readPrivateFile(path: string, bytesMax: number): Promise<string> {
  using content = await readSecretFile(path, bytesMax);
  return content.use((bytes) => new TextDecoder().decode(bytes));
}

/** The content of a private file of at most `bytesMax` bytes. Symbolic links are not followed. */
export async function readSecretFile(path: string, bytesMax: number): Promise<Secret> {
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  let file: FileHandle | undefined;
  try {
    file = await open(path, flags);
    const stats = await file.stat();
    if (!stats.isFile()) {
      throw new PqblkError('permission', 'not a regular file', { path, operation: 'read' });
    }
    requirePrivate(path, stats, FILE_MODE);
    if (stats.size > bytesMax) {
      throw new PqblkError('bad_key', `${stats.size} bytes, at most ${bytesMax} expected`, {
        path,
        operation: 'read',
      });
    }
    return await readAll(file, stats.size);
  } catch (error) {
    throw fromSystem(error, { path, operation: 'read' });
  } finally {
    await file?.close();
  }
}

/** Into memory that is not moved, and nowhere else. Whoever made the file longer meanwhile is not heard. */
async function readAll(file: FileHandle, size: number): Promise<Secret> {
  const bytes = new Uint8Array(new ArrayBuffer(size));
  let length = 0;
  while (length < size) {
    const { bytesRead } = await file.read(bytes, length, size - length);
    if (bytesRead === 0) break;
    length += bytesRead;
  }
  using whole = new Secret(bytes);
  return whole.use((all) => Secret.copyOf(all.subarray(0, length)));
}

/**
 * Writes a private file so that a crash leaves the old one or the new one, whole: temporary file,
 * fsync, rename (or link, which fails with kind `exists` where a file is), fsync of the directory.
 */
export async function writePrivateFile(
  path: string,
  text: string,
  mode: 'create' | 'replace',
): Promise<void> {
  const directory = dirname(path);
  const random = toHex(randomBytes(8));
  const temporary = join(directory, `.${basename(path)}.${random}${TEMPORARY_SUFFIX}`);
  try {
    await writeDurably(temporary, text);
    if (mode === 'replace') {
      await rename(temporary, path);
    } else {
      await link(temporary, path);
      await unlink(temporary);
    }
    await syncDirectory(directory);
  } catch (error) {
    await unlink(temporary).catch(() => undefined); // it may be renamed or never made
    throw fromSystem(error, { path, operation: 'write' });
  }
}

async function writeDurably(path: string, text: string): Promise<void> {
  const file = await open(path, 'wx', FILE_MODE);
  try {
    await file.writeFile(text);
    await file.sync();
  } finally {
    await file.close();
  }
}

/** Removes a file durably. Kind `not_found` when it is not there. */
export async function removePrivateFile(path: string): Promise<void> {
  try {
    await unlink(path);
    await syncDirectory(dirname(path));
  } catch (error) {
    throw fromSystem(error, { path, operation: 'delete' });
  }
}

async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
}
