// Room disk/: what a disk's file says of itself without a key, and checking it.
import { open } from 'node:fs/promises';
import { PqblkError } from '../errors.js';
import {
  describeKeyArea,
  formatUuid,
  type KeyAreaDescription,
  mendCopies,
  requireUncontested,
  type VolumeKeys,
} from '../keys/index.js';
import {
  calling,
  type LongWork,
  longCall,
  type NativeKeys,
  type NativeToken,
  native,
} from '../native.js';
import { copiesIn, keyAreaOf, type RawKeyArea } from './key-area-file.js';
import type { DiskFormat, KeyOptions } from './types.js';
import { lendKeys, type UnlockedVolume, withUnlocked } from './unlock.js';

const HEADER_MAC_BYTES = 512;

export interface Qcow2Info {
  readonly version: number;
  readonly refcountBits: number;
  readonly compression: string;
  readonly extendedL2: boolean;
  readonly lazyRefcounts: boolean;
  readonly dirty: boolean;
  readonly corrupt: boolean;
  readonly backingName?: string;
  readonly backingFormat?: string;
  readonly snapshots: number;
}

export interface SealedInfo {
  readonly formatVersion: number;
  readonly suite: string;
  readonly uuid: string;
  /** Closed cleanly: the log is empty. */
  readonly clean: boolean;
  readonly logBytes: number;
  readonly sessions: number;
  readonly backingPolicy: 'none' | 'sealed' | 'unauthenticated';
  readonly backingName?: string;
  readonly backingFormat?: string;
  /** 0 when both copies are damaged. */
  readonly keyAreaGeneration: number;
  /** Of copy A and B. */
  readonly keyAreaCopyDamaged: readonly [boolean, boolean];
  /** Both are whole and not the same: a change of keys was cut short, and wants to be run again. */
  readonly keyAreaCopiesDiffer: boolean;
  /** What is wrong with the copies, for people; `pqblk check --repair` mends it. */
  readonly keyAreaFindings: readonly string[];
  /** Slots and epochs; undefined when both copies are damaged. Not authenticated without a key. */
  readonly keyArea: KeyAreaDescription | undefined;
}

export interface DiskInfo {
  readonly path: string;
  readonly format: DiskFormat;
  readonly size: number;
  readonly fileSize: number;
  /** What the file takes on its file system. */
  readonly allocatedBytes: number;
  readonly clusterSize: number;
  readonly durabilityClass: string;
  readonly lockHolder?: { readonly pid: number; readonly command: string };
  readonly qcow2?: Qcow2Info;
  readonly sealed?: SealedInfo;
}

type FromCopies =
  | 'keyAreaGeneration'
  | 'keyAreaCopyDamaged'
  | 'keyAreaCopiesDiffer'
  | 'keyAreaFindings'
  | 'keyArea';
type RawSealed = Omit<SealedInfo, 'uuid' | FromCopies> & RawKeyArea;

/**
 * Describes a file. Without `format` its first bytes decide: good enough to describe it, never to
 * open it as a disk. Takes no lock, so a running owner may be changing it.
 */
export async function diskInfo(path: string, format?: DiskFormat): Promise<DiskInfo> {
  const raw = await calling(() => native().diskInfo(format ? { path, format } : { path }));
  const { sealed, ...info } = raw as unknown as Omit<DiskInfo, 'sealed'> & { sealed?: RawSealed };
  if (sealed === undefined) return info;
  const { keyAreaCopies, keyAreaState, ...rest } = sealed;
  const copies = copiesIn(sealed);
  const keyArea = copies.blob.length > 0 ? describeKeyArea(copies.blob) : undefined;
  return {
    ...info,
    sealed: {
      ...rest,
      uuid: formatUuid(sealed.uuid),
      keyAreaGeneration: keyArea?.generation ?? 0,
      keyAreaCopyDamaged: copies.damaged,
      keyAreaCopiesDiffer: copies.differ,
      keyAreaFindings: copies.findings,
      keyArea,
    },
  };
}

export interface EngineInfo {
  /** What a disk that is opened now would use: `io_uring` or `threads`. */
  readonly engine: string;
  /** Why it is not io_uring. */
  readonly fallbackCause?: string;
}

/** The I/O engine that this machine allows. */
export async function engineInfo(): Promise<EngineInfo> {
  return (await calling(() => native().engineInfo())) as EngineInfo;
}

export interface CheckDiskOptions extends KeyOptions, LongWork {
  format: DiskFormat;
  /** Mends leaks and reference counts; guest data is never touched. */
  repair?: boolean;
  /**
   * Asked, and called again to do it, when a repair on somebody's word (`confirmVmk`) is to end a copy of the key
   * area that may be true: replaces both copies by a successor of the other one. Undefined: they become that one.
   */
  overrule?: ((how: { dryRun: boolean }) => Promise<void>) | undefined;
}

export interface CheckResult {
  readonly clean: boolean;
  /** Left after repair. */
  readonly corruptions: number;
  readonly leaks: number;
  readonly corruptionsFixed: number;
  readonly leaksFixed: number;
  readonly totalClusters: number;
  readonly allocatedClusters: number;
  readonly compressedClusters: number;
  readonly imageEnd: number;
  /** Sealed: tags that were computed, and those that do not hold. */
  readonly sectorsVerified: number;
  readonly sectorsBad: number;
  /** Sealed: those that the medium does not give out; what is in them is not known. */
  readonly sectorsUnreadable: number;
  /** Sealed: its header was put back, and no check has believed it yet: the disk is read-only. */
  readonly headerPutBack: boolean;
  /** Sealed, bytes: the header is of before the disk was grown, which has data up to there. 0: it has none. */
  readonly grownTo: number;
  /** The first findings, for people. */
  readonly messages: readonly string[];
  /** Numbers of 4096-byte sectors, the first ones. */
  readonly badSectors: readonly number[];
  readonly unreadableSectors: readonly number[];
}

/** What the engine alone tells. */
export type Checked = Omit<CheckResult, 'headerPutBack'>;

/** Checks structure, reference counts and, for a sealed disk, every tag. Findings are no errors. */
export async function checkDisk(path: string, options: CheckDiskOptions): Promise<CheckResult> {
  const { format, repair = false } = options;
  if (format !== 'sealed') {
    const call = (token: NativeToken) =>
      native().checkDisk({ path, format, repair }, undefined, token);
    return { ...(await longCheck(options, call)), headerPutBack: false };
  }
  return await withUnlocked(path, options, async (volume) => {
    // On somebody's word, and below only if every sector opens.
    const overrules = volume.keyArea.refused?.contested && volume.keyArea.refused.confirmed;
    if (repair && !overrules) requireUncontested(volume.keyArea);
    const overrule = repair && overrules ? options.overrule : undefined;
    await overrule?.({ dryRun: true });
    const marked = (await diskInfo(path, format)).qcow2?.corrupt === true;
    const checked = await headOf(path); // a check takes long, and each has the lock for itself
    const check = async (how: LongWork & { repair?: boolean }) =>
      await checkSealed(path, volume, how).catch((error: unknown) => {
        throw marked ? aboutMark(error) : error;
      });
    if (marked && repair) requireBelievable(path, await check({ ...options, repair: false }));
    const result = await check(options);
    const believed = marked && repair && isSound(result);
    if (believed) await calling(() => native().clearCorrupt({ path, checked }));
    const told = withMark(result, marked && !believed);
    const mend =
      overrule ??
      (async () => await mendCopies(keyAreaOf(path), volume.keyArea.copies, volume.keyArea.index));
    return await withKeyArea(told, volume, repair && (() => mend({ dryRun: false })));
  });
}

/** The part of the header that its MAC covers. */
async function headOf(path: string): Promise<Uint8Array> {
  const file = await open(path);
  try {
    const head = Buffer.alloc(HEADER_MAC_BYTES);
    const { bytesRead } = await file.read(head, 0, head.length, 0);
    return head.subarray(0, bytesRead);
  } finally {
    await file.close();
  }
}

async function checkSealed(
  path: string,
  volume: UnlockedVolume,
  options: LongWork & { repair?: boolean },
): Promise<Checked> {
  const result = await checkWithLent(path, volume.uuid, (fn) => volume.lendKeys(fn), options);
  await volume.record();
  return result;
}

/** All of a sealed disk but its key area, which may be damaged, with keys from elsewhere. Kinds: `wrong_key`. */
export async function checkWith(
  path: string,
  { uuid, keys, backupSessions }: FromElsewhere,
  work: LongWork,
): Promise<Checked> {
  const { onProgress, signal } = work;
  const how = { onProgress, signal, ...(backupSessions && { backupSessions }) };
  return await checkWithLent(path, uuid, (fn) => lendKeys(keys, fn), how);
}

interface FromElsewhere {
  readonly uuid: Uint8Array;
  readonly keys: VolumeKeys;
  /** Entries that the disk's session table has lost. */
  readonly backupSessions?: Uint8Array | undefined;
}

async function checkWithLent(
  path: string,
  uuid: Uint8Array,
  lend: <T>(fn: (lent: NativeKeys) => T) => T,
  options: LongWork & { repair?: boolean; backupSessions?: Uint8Array },
): Promise<Checked> {
  const { repair = false, backupSessions, ...work } = options;
  const what = { path, format: 'sealed', repair, uuid, ...(backupSessions && { backupSessions }) };
  return await longCheck(work, (token) => lend((keys) => native().checkDisk(what, keys, token)));
}

const longCheck = async (
  { onProgress, signal }: LongWork,
  call: (token: NativeToken) => Promise<unknown>,
) => (await longCall({ onProgress, signal }, call)) as Checked;

const opens = ({ sectorsBad, sectorsUnreadable }: Checked) => sectorsBad + sectorsUnreadable === 0;
const closedIn = ({ sectorsBad, sectorsUnreadable }: Checked) =>
  [
    ...(sectorsBad > 0 ? [`${sectorsBad} sectors do not open with its data keys`] : []),
    ...(sectorsUnreadable > 0
      ? [`${sectorsUnreadable} sectors cannot be read, so that nobody knows of what keys they are`]
      : []),
  ].join(', ');
const isSound = (result: Checked) => result.corruptions === 0 && opens(result);

const NEWER_BACKUP = '`pqblk header restore` with a newer backup';

/** Where the tables are not where it has them a check does not come to its end. */
function aboutMark(error: unknown): unknown {
  if (!(error instanceof PqblkError)) return error;
  const { kind, message, path, operation, cause } = error;
  if (kind !== 'corrupt' && kind !== 'integrity') return error;
  const hint = `its header was put back, and is not believed: ${NEWER_BACKUP}`;
  return new PqblkError(kind, message, { path, operation, hint, cause });
}

// A header that was put back is marked until a check has found its tables true. What they do not refer to
// may be what the disk got after the backup was made, and is not to be freed.
function requireBelievable(path: string, looked: Checked): void {
  if (isSound(looked) && looked.leaks === 0) return;
  const { corruptions, leaks, sectorsBad, sectorsUnreadable } = looked;
  throw new PqblkError(
    'corrupt',
    `its header was put back, and is not believed: ${corruptions} errors, ${leaks} clusters that it does not ` +
      `refer to, ${sectorsBad} sectors that do not open, ${sectorsUnreadable} that cannot be read`,
    { path, operation: 'repair', hint: `${NEWER_BACKUP}, or --force` },
  );
}

const withMark = (result: Checked, headerPutBack: boolean): CheckResult => ({
  ...result,
  headerPutBack,
  clean: result.clean && !headerPutBack,
  messages: [
    ...(headerPutBack
      ? ['its header was put back, and is not believed: the disk is read-only']
      : []),
    ...result.messages,
  ],
});

// A damaged copy of the key area goes unnoticed until the other one fails as well; one that is left
// of a change that was cut short may open to keys that were revoked.
async function withKeyArea(
  result: CheckResult,
  { keyArea: { copies, index, findings } }: UnlockedVolume,
  mend: (() => Promise<void>) | false,
): Promise<CheckResult> {
  if (findings.length === 0) return result;
  // Numbers of epochs do not tell whose data keys are the disk's; sectors do.
  const mends = mend !== false && !(copies.differ && !opens(result));
  if (mends) await mend();
  const mended = mends
    ? `; written anew from copy ${index + 1}`
    : `; left alone: ${closedIn(result)}; those of the other copy may be right`;
  return {
    ...result,
    clean: result.clean && mends,
    corruptions: result.corruptions + (mends ? 0 : 1),
    corruptionsFixed: result.corruptionsFixed + (mends ? 1 : 0),
    messages: [...result.messages, ...findings.map((found) => (mend ? found + mended : found))],
  };
}
