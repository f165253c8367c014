// Room disk/: header backups: what a sealed disk cannot be opened without, in one file.
//
// The file holds header, session table and key area with a checksum over all of it; docs/keys.md has
// its layout. Nothing in it is secret that the disk itself does not show, and whoever could open the
// disk when it was made can open it with the backup for ever. Putting one back: header-restore.ts.
import { open } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { fromSystem, PqblkError } from '../errors.js';
import { equalConstantTime, viewOf } from '../keys/bytes.js';
import { sha3_256 } from '../keys/hash.js';
import { type KeyAreaCopies, needsMending, readInput, requireReadable } from '../keys/index.js';
import { calling, native } from '../native.js';
import { keyAreaOf } from './key-area-file.js';

const MAGIC = new TextEncoder().encode('PQBLKBAK');
const VERSION = 1;
const HEAD_BYTES = 64;
const CHECKSUM_BYTES = 32;
const KEY_AREA_BYTES = 65_536;
/** A header cluster of at most 2 MiB, a session table of at most 128 MiB. */
const BACKUP_BYTES_MAX = 2 ** 28;
/** How often, and how far apart, the copies of a key area are looked at until they agree. */
const SETTLE_LOOKS = 30;
const SETTLE_MS = 100;

const OFFSET = {
  magic: 0,
  version: 8, // u32, little-endian like all of these
  header: 12, // u32: bytes
  sessions: 16, // u32
  keyArea: 20, // u32, 65536
  created: 24, // u64, seconds since 1970
  uuid: 32, // 16 bytes; then 16 bytes zero
} as const;

export interface HeaderBackup {
  readonly volumeUuid: Uint8Array;
  /** Seconds since 1970. */
  readonly created: number;
  readonly header: Uint8Array;
  readonly sessions: Uint8Array;
  readonly keyArea: Uint8Array;
}

/**
 * Reads what a backup holds. A served disk can be backed up. Kind `key_area_damaged`: of two copies that
 * are not the same and whole, no key tells here which is the right one.
 */
export async function backUpHeader(path: string): Promise<HeaderBackup> {
  const { blob } = await settledCopies(path);
  const { uuid, header, sessions } = await calling(() => native().backUpHeader({ path }));
  const created = Math.floor(Date.now() / 1000);
  return { volumeUuid: Uint8Array.from(uuid), created, header, sessions, keyArea: blob };
}

/** A change of keys may be between its two copies: that is over in a moment. */
async function settledCopies(path: string): Promise<KeyAreaCopies> {
  for (let looks = 1; ; looks += 1) {
    const copies = await keyAreaOf(path).read();
    requireReadable(copies);
    if (!needsMending(copies)) return copies;
    if (looks === SETTLE_LOOKS) {
      throw new PqblkError('key_area_damaged', copies.findings.join('; '), {
        path,
        operation: 'back up header',
        hint: '`pqblk check --repair` makes both copies the one that counts; then back it up',
      });
    }
    await sleep(SETTLE_MS);
  }
}

export function encodeHeaderBackup(backup: HeaderBackup): Uint8Array {
  const { header, sessions, keyArea } = backup;
  const length = HEAD_BYTES + header.length + sessions.length + keyArea.length;
  const bytes = new Uint8Array(length + CHECKSUM_BYTES);
  const view = viewOf(bytes);
  bytes.set(MAGIC, OFFSET.magic);
  view.setUint32(OFFSET.version, VERSION, true);
  view.setUint32(OFFSET.header, header.length, true);
  view.setUint32(OFFSET.sessions, sessions.length, true);
  view.setUint32(OFFSET.keyArea, keyArea.length, true);
  view.setBigUint64(OFFSET.created, BigInt(backup.created), true);
  bytes.set(backup.volumeUuid, OFFSET.uuid);
  let at = HEAD_BYTES;
  for (const part of [header, sessions, keyArea]) {
    bytes.set(part, at);
    at += part.length;
  }
  bytes.set(sha3_256(bytes.subarray(0, length)), length);
  return bytes;
}

/** Kinds `corrupt` (its checksum does not hold, or it is no backup), `newer_version`. */
export function parseHeaderBackup(bytes: Uint8Array, path?: string): HeaderBackup {
  const corrupt = (message: string) =>
    new PqblkError('corrupt', message, { path, operation: 'read header backup' });
  if (bytes.length < HEAD_BYTES + CHECKSUM_BYTES) throw corrupt('too short for a header backup');
  if (!equalConstantTime(bytes.subarray(0, 8), MAGIC)) throw corrupt('not a header backup');
  const view = viewOf(bytes);
  const version = view.getUint32(OFFSET.version, true);
  if (version !== VERSION) {
    throw new PqblkError('newer_version', `header backup of version ${version}`, { path });
  }
  const body = bytes.subarray(0, bytes.length - CHECKSUM_BYTES);
  if (!equalConstantTime(sha3_256(body), bytes.subarray(body.length))) {
    throw corrupt('damaged: its checksum does not hold');
  }
  const lengths = [OFFSET.header, OFFSET.sessions, OFFSET.keyArea].map((at) =>
    view.getUint32(at, true),
  );
  const [header = 0, sessions = 0, keyArea = 0] = lengths;
  if (HEAD_BYTES + header + sessions + keyArea !== body.length || keyArea !== KEY_AREA_BYTES) {
    throw corrupt('the lengths in it contradict each other');
  }
  return {
    volumeUuid: bytes.slice(OFFSET.uuid, OFFSET.uuid + 16),
    created: Number(view.getBigUint64(OFFSET.created, true)),
    header: bytes.slice(HEAD_BYTES, HEAD_BYTES + header),
    sessions: bytes.slice(HEAD_BYTES + header, HEAD_BYTES + header + sessions),
    keyArea: bytes.slice(HEAD_BYTES + header + sessions, body.length),
  };
}

/** Writes a new file, mode 0600, durably. Kind `exists`. */
export async function writeHeaderBackup(path: string, backup: HeaderBackup): Promise<void> {
  try {
    const file = await open(path, 'wx', 0o600);
    try {
      await file.writeFile(encodeHeaderBackup(backup));
      await file.sync();
    } finally {
      await file.close();
    }
  } catch (error) {
    throw fromSystem(error, { path, operation: 'write header backup' });
  }
}

export async function readHeaderBackup(path: string): Promise<HeaderBackup> {
  const operation = 'read header backup';
  const limits = { operation, bytesMax: BACKUP_BYTES_MAX, tooLong: 'corrupt' } as const;
  return parseHeaderBackup(await readInput(path, limits), path);
}
