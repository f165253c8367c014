// Room disk/: a header backup put back.
//
// What a restore must never do: take away the only copy of a data key. So the disk's own key area, where an
// authentic header has it, is compared with the backup's before a byte is written, whatever the pin of this
// host thinks of the one or the other; only --force ends a data key.
import { type ErrorKind, fromSystem, PqblkError } from '../errors.js';
import { equalConstantTime } from '../keys/bytes.js';
import {
  type AuditTrail,
  describeKeyArea,
  formatUuid,
  type Identity,
  isContested,
  isPlainlyFalse,
  type KeyAreaCopies,
  KeyAreaEditor,
  needsMending,
  type Observed,
  openKeyArea,
  type PinOptions,
  type Pins,
  type SlotDescription,
  sisterOf,
  toHex,
  type VolumeKeys,
} from '../keys/index.js';
import { calling, type LongWork, native } from '../native.js';
import type { HeaderBackup } from './header-backup.js';
import { type Checked, checkWith } from './info.js';
import { copiesIn, keyAreaOf } from './key-area-file.js';
import { lendKeys, openCopies } from './unlock.js';

const OPERATION = 'restore header';

export interface RestoreHeaderOptions extends PinOptions, LongWork {
  /** Opens the key area of the backup. */
  readonly identity: Identity;
  readonly pins?: Pins | undefined;
  /** Put back header and sessions only: the key area of the disk, which must open, stays as it is. */
  readonly keepKeyArea?: boolean | undefined;
  /**
   * Replace a key area that has data keys which the backup lacks, or may have: their sectors are lost. Believe
   * a header that does not refer to all that is in the file: what it does not refer to is lost.
   */
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
  /** Bytes. The header is of before the disk was grown: it has data up to there. 0: it has not. */
  readonly grownTo: number;
}

/**
 * Puts a backup back: the key area as it was, lost entries of the session table, and the header when
 * nobody can read the one on the disk. Where the header was gone, or a copy of the key area, the whole disk is
 * checked with the keys of the backup before they are written, with progress. Kinds: those of opening the
 * backup's key area and of the pin, `wrong_key` (another volume), `policy` (data keys would be lost),
 * `data_key_missing` (the backup does not have those of the disk; nothing was written but perhaps the header),
 * `corrupt` (the tables moved since: the disk is left marked corrupt, to be read only), `integrity`, `io_error`
 * (all is put back, and sectors are damaged, or cannot be read), `interrupted` (the same command goes on), `locked`.
 */
export async function restoreHeader(
  path: string,
  backup: HeaderBackup,
  options: RestoreHeaderOptions,
): Promise<RestoredHeader> {
  const { pins, identity, keepKeyArea } = options;
  const release = await pins?.hold(backup.volumeUuid);
  try {
    const expectedVolumeUuid = backup.volumeUuid;
    using keys = await openKeyArea(backup.keyArea, identity, { expectedVolumeUuid });
    const work = { path, backup, keys, ...(await lookAt(path, backup, keys)), options };
    return keepKeyArea ? await restoreTables(work) : await restoreAll(work);
  } finally {
    await release?.();
  }
}

interface Work {
  readonly path: string;
  readonly backup: HeaderBackup;
  /** The backup's. */
  readonly keys: VolumeKeys;
  /** On the disk. */
  readonly copies: KeyAreaCopies;
  /** The backup is without the data key that the disk was last written under: nothing would open it. */
  readonly lacksNewest: boolean;
  readonly options: RestoreHeaderOptions;
}

/** The key area on the disk, though its header be gone. Kind `wrong_key`: of another volume. */
async function lookAt(path: string, backup: HeaderBackup, keys: VolumeKeys) {
  const { volumeUuid: uuid, header, sessions } = backup;
  const found = await calling(() =>
    lendKeys(keys, (lent) => native().lookAtHeader({ path, uuid, header, sessions }, lent)),
  ).catch((error: unknown) => {
    throw notThisDisk(error);
  });
  return { copies: copiesIn({ ...found, uuid }), lacksNewest: found.lacksNewest };
}

/** Neither header nor session table nor log is there. */
function notThisDisk(error: unknown): unknown {
  if (!(error instanceof PqblkError) || error.operation !== 'find volume') return error;
  const { kind, message, path, cause } = error;
  const hint =
    'nothing in this file shows that it is the disk of the backup: look whether it is the right one; of ' +
    'a newer backup the header may know better where things are. Nothing was written';
  return new PqblkError(kind, message, { path, operation: OPERATION, hint, cause });
}

/** The header, then what only a check of the whole disk tells, then the session table. */
async function putTablesBack(work: Work, keys: VolumeKeys, compared: boolean) {
  const { path, backup, options } = work;
  const { volumeUuid: uuid, header, sessions } = backup;
  const put = async (withSessions: boolean) =>
    await calling(() =>
      lendKeys(keys, (lent) =>
        native().restoreHeader({ path, uuid, header, sessions, withSessions }, lent),
      ),
    );
  const { sessionsLost, byLogAlone, ...restored } = await put(false);
  const lost = sessionsLost || restored.sessions > 0;
  const told = compared || options.force;
  const found =
    restored.header || lost || !told
      ? await requireSound(work, keys, { header: restored.header, lost, compared, byLogAlone })
      : undefined;
  await put(true);
  return { restored, found };
}

/** All but the key area. */
async function restoreTables(work: Work): Promise<RestoredHeader> {
  const { backup, copies, options } = work;
  const { identity, pins, approve } = options;
  const { opened: area, index } = await openCopies(copies, identity, options);
  using opened = area;
  const { slots } = describeKeyArea(copies.copies[index].blob);
  await approve?.({ before: slots, after: slots, present: copies });
  const { restored, found } = await putTablesBack(work, opened, true);
  await pins?.record(opened, options);
  const { grownTo } = await finish(work, restored.header, found);
  const volumeUuid = formatUuid(backup.volumeUuid);
  return { volumeUuid, ...restored, keyArea: false, grownTo, before: slots, after: slots };
}

async function restoreAll(work: Work): Promise<RestoredHeader> {
  const { backup, copies, options } = work;
  const { identity, pins, audit, approvedBy = [] } = options;
  const { volumeUuid } = backup;
  using editor = await KeyAreaEditor.open(backup.keyArea, identity, {
    expectedVolumeUuid: volumeUuid,
  });
  const present = copies.blob.length > 0 ? copies : undefined;
  await pins?.check(editor.observed, options).catch((error: unknown) => {
    throw present ? namingTheWayOut(error) : error;
  });
  const after = editor.slots;
  const before = present && describeKeyArea(present.blob).slots;
  await options.approve?.({ before, after, present });
  const compared = options.force ? false : await requireNothingLost(work, editor);
  if (work.lacksNewest) throw newestLost(work);
  const replaced = await auditHeadOnDisk(work);
  requireLogged(Math.max(editor.audit.lines, replaced?.lines ?? 0), audit);
  const line = await audit?.prepare({
    operation: 'header-restore',
    volumeUuid,
    generation: audit ? editor.nextGeneration : editor.observed.generation,
    known: editor.audit,
    replaced,
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
    const { found, ...restored } = await writeBack(work, blob, compared).catch(
      async (error: unknown) => {
        await line?.failed(error);
        throw error;
      },
    );
    await pins?.record(observed, options);
    const { grownTo } = await finish(work, restored.header, found);
    return { volumeUuid: formatUuid(volumeUuid), ...restored, grownTo, before, after };
  } finally {
    await line?.close();
  }
}

async function writeBack(work: Work, blob: Uint8Array, compared: boolean) {
  const { copies, keys } = work;
  const { restored, found } = await putTablesBack(work, keys, compared);
  const place = keyAreaOf(work.path);
  const changes = copies.copies.some((copy) => !equalConstantTime(copy.blob, blob));
  const last = copies.order[0] ?? 0; // the newest one goes when its successor is durable
  let { state } = copies; // that was compared: `locked` when somebody changed it since
  for (const index of changes || needsMending(copies) ? [sisterOf(last), last] : []) {
    await place.write(index, blob, state);
    ({ state } = await place.read());
  }
  return { ...restored, keyArea: changes, found };
}

/** The pin refuses the backup's key area, and not its header. */
function namingTheWayOut(error: unknown): unknown {
  if (!(error instanceof PqblkError) || !isPinsWord(error)) return error;
  const { kind, message, path, operation, hint, cause } = error;
  return new PqblkError(kind, message, {
    ...{ path, operation, cause },
    hint: `${hint ?? ''}; --keep-key-area puts back all but the key area`,
  });
}

/**
 * Which lines came about, as the disk's own key area says. Undefined when it does not open with this key, or
 * the pin refuses it: what the operator allows is meant for the backup.
 */
async function auditHeadOnDisk({ copies, options: { identity, pins } }: Work) {
  try {
    using own = (await openCopies(copies, identity, { pins })).opened;
    return { ...own.audit, generation: own.generation };
  } catch (error) {
    if (error instanceof PqblkError && isRefusal(error)) return undefined;
    throw error;
  }
}

/** Whether an error is about a key area, and not about what was asked to open it. */
const isRefusal = (error: PqblkError) =>
  isPinsWord(error) || isContested(error) || isPlainlyFalse(error);

function requireLogged(lines: number, audit: AuditTrail | undefined): void {
  if (audit || lines === 0) return;
  throw new PqblkError('policy', `this disk keeps an audit log of ${lines} lines`, {
    operation: OPERATION,
    hint: 'name it with --audit',
  });
}

/** Whether it was the pin that refused a key area. */
export const isPinsWord = ({ kind }: PqblkError) => kind === 'vmk_changed' || kind === 'rollback';

/**
 * Whether the pin of this host refuses what is on the disk, and knows the backup: either old copies were put
 * there, or keys were changed on another host. Nothing that was allowed for the backup is allowed here.
 */
export async function isOutdated(
  copies: KeyAreaCopies,
  backup: Observed,
  identity: Identity,
  pins: Pins | undefined,
): Promise<boolean> {
  if (!(await pins?.get(backup.volumeUuid))) return false;
  const refusal = async (asked: Promise<unknown> | undefined) => {
    try {
      await asked;
      return undefined;
    } catch (error) {
      if (error instanceof PqblkError) return error;
      throw error;
    }
  };
  const open = async () => (await openCopies(copies, identity, { pins })).opened[Symbol.dispose]();
  const [ofBackup, ofDisk] = [await refusal(pins?.check(backup)), await refusal(open())];
  for (const error of [ofBackup, ofDisk]) {
    if (error && !isRefusal(error)) throw error;
  }
  return ofBackup === undefined && ofDisk !== undefined && isPinsWord(ofDisk);
}

/**
 * Data is under the data keys of the disk; the backup must have them all. Their numbers do not tell: a
 * rotation that was given up leaves its number to the next one, and copies of a disk count each for itself.
 * Nor does the pin: it takes old copies that were put back for what they are, but keys that were changed on
 * another host as well. False: of a copy that is damaged, or plainly false, nobody knows what it had.
 */
async function requireNothingLost(work: Work, kept: KeyAreaEditor): Promise<boolean> {
  const { copies, options } = work;
  let opens = 0;
  for (const index of copies.order) {
    try {
      using present = await openKeyArea(copies.copies[index].blob, options.identity, {
        expectedVolumeUuid: copies.volumeUuid,
      });
      const lost = [...present.dataKeys].find(([epoch, key]) => !kept.hasDataKey(epoch, key));
      if (lost) throw await keyLost(work, lost[0], kept.observed);
      opens += 1;
    } catch (error) {
      if (!(error instanceof PqblkError)) throw error;
      if (isContested(error)) throw keysUnknown(work, error);
      if (!isPlainlyFalse(error)) throw error;
    }
  }
  return opens === copies.copies.length;
}

const KEEP = '--keep-key-area puts back all but the key area';
const waysOut = ({ lacksNewest }: Work) => (lacksNewest ? KEEP : `${KEEP}, --force all of it`);

async function keyLost(work: Work, epoch: number, backup: Observed): Promise<PqblkError> {
  const { path, copies, options } = work;
  const { identity, pins } = options;
  const why = (await isOutdated(copies, backup, identity, pins))
    ? 'the pin of this host knows the backup, and not what is on the disk: old copies may have been put ' +
      'there, or the keys changed on another host'
    : 'make a backup after each rotation';
  return new PqblkError(
    'policy',
    `the backup does not have the disk's data key of epoch ${epoch}: what is under it would be lost`,
    { path, operation: OPERATION, hint: `${why}; ${waysOut(work)}` },
  );
}

/** With or without --force: what it would leave opens to nobody. */
function newestLost({ path, copies }: Work): PqblkError {
  const message = 'the backup does not have the data key that the disk was last written under';
  const hint = copies.blob.length > 0 ? `${NEWER}; ${KEEP}` : NEWER;
  return new PqblkError('data_key_missing', message, { path, operation: OPERATION, hint });
}

function keysUnknown(work: Work, cause: PqblkError): PqblkError {
  const { path } = work;
  return new PqblkError(
    'policy',
    `the disk's own key area does not open with this key (${cause.message}), so that nobody can tell ` +
      'whether the backup has its data keys',
    { path, operation: OPERATION, hint: `name a key that opens both; ${waysOut(work)}`, cause },
  );
}

/** Before the check. */
interface Known {
  /** It was put back, and is marked. */
  readonly header: boolean;
  /** Sessions are the backup's. */
  readonly lost: boolean;
  /** The key area of the disk with that of the backup. */
  readonly compared: boolean;
  /** Where the header has the session table may be anything: nothing is written there unlooked. */
  readonly byLogAlone: boolean;
}

/** Of so many sectors one may be damaged; where more do not open, the header or the keys are others. */
const DAMAGED_AT_MOST = 1 / 16;

/**
 * What could not be compared, a check of the whole disk tells: whether the tables are where the backup's header
 * has them, and whether sectors open with these keys. Before a key area is written.
 */
async function requireSound(
  work: Work,
  keys: VolumeKeys,
  known: Known,
): Promise<Checked | undefined> {
  const { path, options } = work;
  const { header, compared } = known;
  const found = await checked(work, keys, known);
  if (!found || options.force) return found;
  const { sectorsBad: bad, corruptions, leaks } = found;
  const sectors = sectorsOf(found);
  const unread = found.sectorsUnreadable > 0;
  const refuse = (kind: ErrorKind, message: string, hint: string) =>
    new PqblkError(kind, message, { path, operation: OPERATION, hint });
  if (bad > 0 && !compared) {
    throw refuse('data_key_missing', `${sectors} of the backup`, OLDER_KEYS);
  }
  const others = bad > found.sectorsVerified * DAMAGED_AT_MOST;
  // Tables that are as old as the header can be whole, and know nothing of what came after them.
  if (header && (corruptions > 0 || leaks > 0 || others)) {
    const what =
      `${corruptions} errors, ${leaks} clusters that it does not refer to, ${sectors}` +
      (unread ? `, ${unreadIn(found)}` : '');
    throw refuse('corrupt', `${OLDER_HEADER}: ${what}`, READ_ONLY);
  }
  if (unread) {
    throw refuse('io_error', unreadIn(found), header ? `the disk is read-only; ${UNREAD}` : UNREAD);
  }
  return found;
}

const unreadIn = ({ sectorsUnreadable, sectorsVerified }: Checked) =>
  `${sectorsUnreadable} of ${sectorsUnreadable + sectorsVerified} sectors cannot be read`;

const sectorsOf = ({ sectorsBad, sectorsVerified }: Checked) =>
  `${sectorsBad} of ${sectorsVerified} sectors do not open with the data keys`;

const OLDER_HEADER =
  'the header of the backup is older than the tables of the disk, which have moved since';
const READ_ONLY =
  'restore a newer backup; the disk is marked corrupt, and read-only. Should `pqblk export` find all of it ' +
  'there (a process that was killed leaves clusters behind as well), --force believes this header';
const NO_WORD =
  'the disk is read-only: header and session table are gone, and no word makes up for a whole check; ' +
  'restore a newer backup';
const UNREAD =
  'nobody knows whether what is there fits the backup: move the disk to a sound medium, where these sectors ' +
  'are damaged ones, and run the same command again, or restore a newer backup. Should there be no other way, ' +
  '--force puts this one back';
const WORD = 'the disk is read-only; --force believes this header all the same';
const NEWER = 'the backup is older than the disk: restore a newer one';
const OLDER_KEYS = `${NEWER}. Should there be none, or should these sectors be damaged, --force puts this one back`;
const OLDER_KEY_AREA =
  'the key area of the disk, or the session table of the backup, is older than what was written last: ' +
  'restore a newer backup, without --keep-key-area';

/** Takes the mark off a header that was believed. Kinds `integrity`, `io_error`, `corrupt`: what it leaves is damaged. */
async function finish(
  { path }: Work,
  header: boolean,
  found: Checked | undefined,
): Promise<{ grownTo: number }> {
  if (header) await calling(() => native().clearCorrupt({ path }));
  if (!found) return { grownTo: 0 };
  const but = (kind: ErrorKind, message: string, hint: string) =>
    new PqblkError(kind, message, {
      ...{ path, operation: OPERATION },
      hint: `all is put back; ${hint}`,
    });
  if (found.corruptions > 0) {
    throw but(
      'corrupt',
      `${found.corruptions} errors in the structure`,
      '`pqblk check --repair` before anything is written',
    );
  }
  if (found.sectorsUnreadable > 0) {
    throw but('io_error', unreadIn(found), 'restore or discard these sectors: the medium fails');
  }
  if (found.sectorsBad > 0) {
    throw but('integrity', sectorsOf(found), 'restore or discard these sectors: they are damaged');
  }
  return { grownTo: found.grownTo };
}

async function checked(
  { path, backup, options }: Work,
  keys: VolumeKeys,
  { header, lost, byLogAlone }: Known,
): Promise<Checked | undefined> {
  const backupSessions = lost ? backup.sessions : undefined;
  try {
    return await checkWith(path, { uuid: backup.volumeUuid, keys, backupSessions }, options);
  } catch (error) {
    const { kind, message } = fromSystem(error);
    if (kind === 'canceled') {
      throw new PqblkError('interrupted', 'stopped while the disk was checked', {
        ...{ path, operation: OPERATION, cause: error },
        hint: header ? 'the disk is read-only until the same command has gone through' : undefined,
      });
    }
    const missing = kind === 'wrong_key';
    // Somebody's word instead: of a block that cannot be read.
    if (options.force && !missing && !byLogAlone) return undefined;
    const older = kind === 'corrupt' || kind === 'integrity';
    const hint = byLogAlone ? NO_WORD : older ? `${OLDER_HEADER}; ${READ_ONLY}` : WORD;
    const newer = options.keepKeyArea ? OLDER_KEY_AREA : NEWER;
    throw new PqblkError(
      missing ? 'data_key_missing' : kind,
      `with this backup the disk does not open: ${message}`,
      {
        path,
        operation: OPERATION,
        cause: error,
        hint: missing ? newer : header ? hint : undefined,
      },
    );
  }
}
