// Room disk/: a header backup put back.
//
// What a restore must never do: take away the only copy of a data key. So the disk's own key area, where an
// authentic header has it, is compared with the backup's before a byte is written, whatever the pin of this
// host thinks of the one or the other; only --force ends a data key.
import { fromSystem, PqblkError } from '../errors.js';
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
import { calling, type LongWork, native, throwIfAborted } from '../native.js';
import type { HeaderBackup } from './header-backup.js';
import { type CheckResult, checkDisk } from './info.js';
import { copiesIn, keyAreaOf } from './key-area-file.js';
import { lendKeys, openCopies } from './unlock.js';

const OPERATION = 'restore header';

export interface RestoreHeaderOptions extends PinOptions, LongWork {
  /** Opens the key area of the backup. */
  readonly identity: Identity;
  readonly pins?: Pins | undefined;
  /** Put back header and sessions only: the key area of the disk, which must open, stays as it is. */
  readonly keepKeyArea?: boolean | undefined;
  /** Replace a key area that has data keys which the backup lacks, or may have: their sectors are lost. */
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
 * nobody can read the one on the disk. Where the header was gone, or both copies of the key area, a check of the
 * whole disk follows, with progress. Kinds: those of opening the backup's key area and of the pin,
 * `wrong_key` (another volume), `policy` (data keys would be lost), `corrupt` (the tables moved
 * since: the disk is left marked corrupt, to be read only), `locked`.
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
    const work = { path, backup, keys, copies: await lookAt(path, backup, keys), options };
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
  readonly options: RestoreHeaderOptions;
}

/** The key area on the disk, though its header be gone. Kind `wrong_key`: of another volume. */
async function lookAt(path: string, backup: HeaderBackup, keys: VolumeKeys) {
  const { volumeUuid: uuid, header, sessions } = backup;
  const found = await calling(() =>
    lendKeys(keys, (lent) => native().lookAtHeader({ path, uuid, header, sessions }, lent)),
  );
  return copiesIn({ ...found, uuid });
}

async function putTablesBack({ path, backup, keys }: Work) {
  const { volumeUuid: uuid, header, sessions } = backup;
  return await calling(() =>
    lendKeys(keys, (lent) => native().restoreHeader({ path, uuid, header, sessions }, lent)),
  );
}

/** All but the key area. */
async function restoreTables(work: Work): Promise<RestoredHeader> {
  const { backup, copies, options } = work;
  const { identity, pins, approve } = options;
  using opened = (await openCopies(copies, identity, options)).opened;
  const { slots } = describeKeyArea(copies.blob);
  await approve?.({ before: slots, after: slots, present: copies });
  const restored = await putTablesBack(work);
  await pins?.record(opened, options);
  const { header } = restored;
  if (header) await requireSound(work, { header, compared: true });
  const volumeUuid = formatUuid(backup.volumeUuid);
  return { volumeUuid, ...restored, keyArea: false, before: slots, after: slots };
}

async function restoreAll(work: Work): Promise<RestoredHeader> {
  const { backup, copies, options } = work;
  const { identity, pins, audit, approvedBy = [] } = options;
  const { volumeUuid } = backup;
  using editor = await KeyAreaEditor.open(backup.keyArea, identity, {
    expectedVolumeUuid: volumeUuid,
  });
  await pins?.check(editor.observed, options);
  const after = editor.slots;
  const present = copies.blob.length > 0 ? copies : undefined;
  const before = present && describeKeyArea(present.blob).slots;
  await options.approve?.({ before, after, present });
  if (present && !options.force) await requireNothingLost(work, editor);
  requireLogged(editor, audit);
  const line = await audit?.prepare({
    operation: 'header-restore',
    volumeUuid,
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
    const restored = await writeBack(work, blob).catch(async (error: unknown) => {
      await line?.failed(error);
      throw error;
    });
    await pins?.record(observed, options);
    const { header } = restored;
    if (header || !present) await requireSound(work, { header, compared: present !== undefined });
    return { volumeUuid: formatUuid(volumeUuid), ...restored, before, after };
  } finally {
    await line?.close();
  }
}

async function writeBack(work: Work, blob: Uint8Array) {
  const restored = await putTablesBack(work);
  const { copies } = work;
  const place = keyAreaOf(work.path);
  const changes = copies.copies.some((copy) => !equalConstantTime(copy.blob, blob));
  const last = copies.order[0] ?? 0; // the newest one goes when its successor is durable
  let { state } = copies; // that was compared: `locked` when somebody changed it since
  for (const index of changes || needsMending(copies) ? [sisterOf(last), last] : []) {
    await place.write(index, blob, state);
    ({ state } = await place.read());
  }
  return { ...restored, keyArea: changes };
}

function requireLogged(editor: KeyAreaEditor, audit: AuditTrail | undefined): void {
  if (audit || editor.audit.lines === 0) return;
  throw new PqblkError('policy', `this disk keeps an audit log of ${editor.audit.lines} lines`, {
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
    if (error && !isPinsWord(error) && !isContested(error) && !isPlainlyFalse(error)) throw error;
  }
  return ofBackup === undefined && ofDisk !== undefined && isPinsWord(ofDisk);
}

/**
 * Data is under the data keys of the disk; the backup must have them all. Their numbers do not tell: a
 * rotation that was given up leaves its number to the next one, and copies of a disk count each for itself.
 * Nor does the pin: it takes old copies that were put back for what they are, but keys that were changed on
 * another host as well. A copy that is plainly false has nothing to lose; each other one must open.
 */
async function requireNothingLost(work: Work, kept: KeyAreaEditor): Promise<void> {
  const { copies, options } = work;
  let opens = 0;
  let refusal: PqblkError | undefined;
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
      refusal ??= error;
    }
  }
  if (opens === 0 && refusal) throw keysUnknown(work, refusal);
}

const WAYS_OUT = '--keep-key-area puts back all but the key area, --force all of it';

async function keyLost(
  { path, copies, options: { identity, pins } }: Work,
  epoch: number,
  backup: Observed,
): Promise<PqblkError> {
  const why = (await isOutdated(copies, backup, identity, pins))
    ? 'the pin of this host knows the backup, and not what is on the disk: old copies may have been put ' +
      'there, or the keys changed on another host'
    : 'make a backup after each rotation';
  return new PqblkError(
    'policy',
    `the backup does not have the disk's data key of epoch ${epoch}: what is under it would be lost`,
    { path, operation: OPERATION, hint: `${why}; ${WAYS_OUT}` },
  );
}

function keysUnknown({ path }: Work, cause: PqblkError): PqblkError {
  return new PqblkError(
    'policy',
    `the disk's own key area does not open with this key (${cause.message}), so that nobody can tell ` +
      'whether the backup has its data keys',
    { path, operation: OPERATION, hint: `name a key that opens both; ${WAYS_OUT}`, cause },
  );
}

/**
 * What could not be compared before it was written, a check of the whole disk tells: whether the tables are
 * where the backup's header has them, and whether sectors open with the backup's data keys.
 */
async function requireSound(work: Work, found: { header: boolean; compared: boolean }) {
  const { path, options } = work;
  const { sectorsBad, sectorsVerified, corruptions } = await checked(work);
  if (found.header && (corruptions > 0 || (sectorsBad > 0 && found.compared))) {
    throw new PqblkError(
      'corrupt',
      'the header of the backup is older than the tables of the disk, which have moved since',
      {
        path,
        operation: OPERATION,
        hint: 'the disk is marked corrupt: `pqblk export` may still read what is there',
      },
    );
  }
  if (sectorsBad > 0) {
    throw new PqblkError(
      'data_key_missing',
      `${sectorsBad} of ${sectorsVerified} sectors do not open with the data keys of the backup`,
      { path, operation: OPERATION, hint: OLDER },
    );
  }
  throwIfAborted(options.signal);
  if (found.header) await calling(() => native().clearCorrupt({ path }));
}

const OLDER = 'the backup is older than the data key of the disk: restore a newer one';

async function checked({ path, options }: Work): Promise<CheckResult> {
  const { identity, onProgress, signal } = options;
  try {
    return await checkDisk(path, { format: 'sealed', identity, onProgress, signal });
  } catch (error) {
    const { kind, message } = fromSystem(error);
    const hint =
      kind === 'canceled' ? 'what was in it is put back: `pqblk check --repair` goes on' : OLDER;
    throw new PqblkError(kind, `with this backup the disk does not open: ${message}`, {
      ...{ path, operation: OPERATION, hint, cause: error },
    });
  }
}
