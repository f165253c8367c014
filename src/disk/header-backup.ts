// Room disk/: header backups: what a sealed disk cannot be opened without, in one file.
//
// The file holds header, session table and key area with a checksum over all of it; docs/keys.md has
// its layout. Nothing in it is secret that the disk itself does not show, and whoever could open the
// disk when it was made can open it with the backup for ever.
import { open } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { fromSystem, PqblkError } from '../errors.js';
import { equalConstantTime, viewOf } from '../keys/bytes.js';
import { sha3_256 } from '../keys/hash.js';
import {
  type AuditTrail,
  describeKeyArea,
  formatUuid,
  type Identity,
  type KeyAreaCopies,
  KeyAreaEditor,
  needsMending,
  type Observed,
  openKeyArea,
  type PinOptions,
  type Pins,
  readInput,
  requireReadable,
  type SlotDescription,
  sisterOf,
  toHex,
} from '../keys/index.js';
import { calling, native } from '../native.js';
import { type Disk, openDisk } from './disk.js';
import { checkDisk } from './info.js';
import { keyAreaOf } from './key-area-file.js';
import { lendKeys, openCopies } from './unlock.js';

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
/** Sectors that are read to see whether the data keys are the right ones. */
const TRIAL_READS = 16;
const SECTOR_BYTES = 4096;

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

export interface RestoreHeaderOptions extends PinOptions {
  /** Opens the key area of the backup. */
  readonly identity: Identity;
  readonly pins?: Pins | undefined;
  /** Replace a key area that has data keys which the backup lacks: their sectors are lost. */
  readonly force?: boolean | undefined;
  /** Called before anything is written; what it throws is thrown. */
  readonly approve?: ((slots: RestoredSlots) => void | Promise<void>) | undefined;
  readonly audit?: AuditTrail | undefined;
  /** For the audit log. */
  readonly approvedBy?: readonly string[] | undefined;
}

export interface RestoredSlots {
  /** Undefined when both copies on the disk are damaged. */
  readonly before: readonly SlotDescription[] | undefined;
  readonly after: readonly SlotDescription[];
  /** The key area on the disk, when it can be read. */
  readonly present: KeyAreaCopies | undefined;
}

export interface RestoredHeader extends Omit<RestoredSlots, 'present'> {
  readonly volumeUuid: string;
  /** The header was unreadable and came from the backup; a check found its tables true. */
  readonly header: boolean;
  /** Entries of the session table that came back. */
  readonly sessions: number;
  /** The key area is another one now. */
  readonly keyArea: boolean;
}

/**
 * Puts a backup back: the key area as it was, lost entries of the session table, and the header when
 * nobody can read the one on the disk. Kinds: those of opening the backup's key area and of the pin,
 * `wrong_key` (another volume), `policy` (newer data keys would be lost), `corrupt` (the tables moved
 * since: the disk is left marked corrupt, to be read only), `locked`.
 */
export async function restoreHeader(
  path: string,
  backup: HeaderBackup,
  options: RestoreHeaderOptions,
): Promise<RestoredHeader> {
  const { pins } = options;
  const release = await pins?.hold(backup.volumeUuid);
  try {
    return await restoreUnderPin(path, backup, options);
  } finally {
    await release?.();
  }
}

async function restoreUnderPin(
  path: string,
  backup: HeaderBackup,
  options: RestoreHeaderOptions,
): Promise<RestoredHeader> {
  const { identity, pins, audit, approvedBy = [] } = options;
  const expectedVolumeUuid = backup.volumeUuid;
  using editor = await KeyAreaEditor.open(backup.keyArea, identity, { expectedVolumeUuid });
  await pins?.check(editor.observed, options);
  const after = editor.slots;
  const copies = await presentCopies(path);
  const before = copies && describeKeyArea(copies.blob).slots;
  await options.approve?.({ before, after, present: copies });
  const outdated = copies && (await isOutdated(copies, editor.observed, identity, pins));
  if (copies && !options.force && !outdated) {
    await requireNoKeyLost(path, copies, editor, identity);
  }
  requireLogged(editor, audit);
  const line = await audit?.prepare({
    operation: 'header-restore',
    volumeUuid: expectedVolumeUuid,
    generation: audit ? editor.nextGeneration : editor.observed.generation,
    known: editor.audit,
    unlockedBy: toHex(identity.fingerprint),
    approvedBy,
    before: before ?? [],
    after,
  });
  try {
    const { blob, observed } = line
      ? await editor.seal(line)
      : { blob: backup.keyArea, observed: editor.observed };
    await line?.append();
    const restored = await writeBack(path, backup, blob, identity).catch(async (error: unknown) => {
      await line?.failed(error);
      throw error;
    });
    await pins?.record(observed, options);
    if (restored.header) await trustTables(path, identity);
    if (!copies) await requireThatItOpens(path, identity); // nobody could compare the epochs
    return { volumeUuid: formatUuid(expectedVolumeUuid), ...restored, before, after };
  } finally {
    await line?.close();
  }
}

async function writeBack(
  path: string,
  { volumeUuid: uuid, header, sessions, keyArea }: HeaderBackup,
  blob: Uint8Array,
  identity: Identity,
): Promise<{ header: boolean; sessions: number; keyArea: boolean }> {
  using keys = await openKeyArea(keyArea, identity, { expectedVolumeUuid: uuid });
  const restored = await calling(() =>
    lendKeys(keys, (lent) => native().restoreHeader({ path, uuid, header, sessions }, lent)),
  );
  const place = keyAreaOf(path);
  const present = await place.read();
  const changes = present.copies.some((copy) => !equalConstantTime(copy.blob, blob));
  const last = present.order[0] ?? 0; // the newest one goes when its successor is durable
  for (const index of changes || needsMending(present) ? [sisterOf(last), last] : []) {
    await place.write(index, blob, (await place.read()).state);
  }
  return { ...restored, keyArea: changes };
}

function requireLogged(editor: KeyAreaEditor, audit: AuditTrail | undefined): void {
  if (audit || editor.audit.lines === 0) return;
  throw new PqblkError('policy', `this disk keeps an audit log of ${editor.audit.lines} lines`, {
    operation: 'restore header',
    hint: 'name it with --audit',
  });
}

/** Undefined when both copies on the disk are damaged, or its header is. */
async function presentCopies(path: string): Promise<KeyAreaCopies | undefined> {
  const copies = await keyAreaOf(path).read().catch(unlessUnreadable);
  return copies && copies.blob.length > 0 ? copies : undefined;
}

/** Whether it was the pin that refused a key area. */
export const isPinsWord = ({ kind }: PqblkError) => kind === 'vmk_changed' || kind === 'rollback';

/**
 * Whether the pin of this host refuses what is on the disk, and knows the backup: then old copies were put
 * there, and the backup is the disk's key area. Nothing that was allowed for the backup is allowed here.
 */
export async function isOutdated(
  copies: KeyAreaCopies,
  backup: Observed,
  identity: Identity,
  pins: Pins | undefined,
): Promise<boolean> {
  const refusedByPin = (error: unknown) => {
    if (error instanceof PqblkError && isPinsWord(error)) return true;
    throw error;
  };
  if (!(await pins?.get(backup.volumeUuid))) return false;
  const known = await pins?.check(backup).catch((error: unknown) => !refusedByPin(error));
  if (known === false) return false;
  try {
    (await openCopies(copies, identity, { pins })).opened[Symbol.dispose]();
    return false;
  } catch (error) {
    if (error instanceof PqblkError && NOT_OPENED.has(error.kind)) return false;
    return refusedByPin(error);
  }
}

/**
 * Data is under the data keys of the disk; the backup must have them all. Their numbers do not tell: a
 * rotation that was given up leaves its number to the next one, and copies of a disk count each for itself.
 */
async function requireNoKeyLost(
  path: string,
  copies: KeyAreaCopies,
  kept: KeyAreaEditor,
  identity: Identity,
): Promise<void> {
  if (!equalConstantTime(copies.volumeUuid, kept.observed.volumeUuid)) {
    throw new PqblkError('wrong_key', 'the backup is of another volume', {
      path,
      operation: 'restore header',
    });
  }
  const refuse = (message: string, hint: string, cause?: unknown) =>
    new PqblkError('policy', message, { path, operation: 'restore header', hint, cause });
  let closed: PqblkError | undefined;
  let opened = 0;
  // Each copy that opens: one of a former master key opens as well, and may be the newer one.
  for (const index of copies.order) {
    try {
      const { blob } = copies.copies[index];
      using present = await openKeyArea(blob, identity, { expectedVolumeUuid: copies.volumeUuid });
      opened += 1;
      const lost = [...present.dataKeys].find(([epoch, key]) => !kept.hasDataKey(epoch, key));
      if (lost) {
        throw refuse(
          `the backup does not have the disk's data key of epoch ${lost[0]}: what is under it would be lost`,
          'make a backup after each rotation; --force restores this one all the same',
        );
      }
    } catch (error) {
      if (!(error instanceof PqblkError && NOT_OPENED.has(error.kind))) throw error;
      closed = error;
    }
  }
  if (opened > 0) return;
  throw refuse(
    `the disk's own key area does not open with this key (${closed?.message}), so that nobody can ` +
      'tell whether the backup has its data keys',
    'name a key that opens both; --force restores the backup all the same',
    closed,
  );
}

/** What says that a key area does not open with a key, rather than that the key cannot be used. */
const NOT_OPENED: ReadonlySet<string> = new Set([
  ...['key_area_damaged', 'wrong_key', 'no_slot', 'slot_revoked', 'uuid_mismatch', 'newer_version'],
]);

/** A header that does not parse is what a backup is for. */
function unlessUnreadable(error: unknown): undefined {
  const kinds = ['unsupported', 'corrupt', 'invalid_argument', 'integrity'];
  if (error instanceof PqblkError && kinds.includes(error.kind)) return undefined;
  throw error;
}

async function requireThatItOpens(path: string, identity: Identity): Promise<void> {
  try {
    await using disk = await openDisk(path, { format: 'sealed', identity, readOnly: true });
    await requireThatItReads(disk);
  } catch (error) {
    const { kind, message } = fromSystem(error);
    throw new PqblkError(kind, `with this backup the disk does not open: ${message}`, {
      path,
      operation: 'restore header',
      hint: 'the backup is older than the data key of the disk: restore a newer one',
      cause: error,
    });
  }
}

/** A data key of the right number and the wrong bytes is found by what it does not open. */
async function requireThatItReads(disk: Disk): Promise<void> {
  const sector = new Uint8Array(SECTOR_BYTES);
  let bad = 0;
  for await (const { offset, length, kind } of disk.extents()) {
    const end = Math.min(offset + length, disk.size - SECTOR_BYTES + 1);
    const step = Math.max(1, Math.floor(length / SECTOR_BYTES / TRIAL_READS)) * SECTOR_BYTES;
    for (let at = offset; kind === 'data' && at < end && bad < TRIAL_READS; at += step) {
      try {
        await disk.read(sector, at - (at % SECTOR_BYTES));
        return;
      } catch (error) {
        if (!(error instanceof PqblkError && error.kind === 'integrity')) throw error;
        bad += 1;
      }
    }
    if (bad === TRIAL_READS) break;
  }
  if (bad === 0) return; // nothing was written yet
  throw new PqblkError('data_key_missing', `none of ${bad} sectors opens with the data keys in it`);
}

/** The header of a backup may point to tables that have moved: a check of the whole disk tells. */
async function trustTables(path: string, identity: Identity): Promise<void> {
  const { corruptions, sectorsBad } = await checkDisk(path, { format: 'sealed', identity });
  if (corruptions > 0 || sectorsBad > 0) {
    throw new PqblkError(
      'corrupt',
      'the header of the backup is older than the tables of the disk, which have moved since',
      {
        path,
        operation: 'restore header',
        hint: 'the disk is marked corrupt: `pqblk export` may still read what is there',
      },
    );
  }
  await calling(() => native().clearCorrupt({ path }));
}
