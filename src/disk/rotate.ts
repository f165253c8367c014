// Room disk/: rotating the data key of a sealed disk that is open, here or in the process that serves it.
//
// The order of the steps is docs/rotation.md's: the key area holds the next key before anything is
// written under it, and loses the old one after nothing is left of it. The key area is the only
// state: whoever runs this again, after whatever happened, completes it.
import { PqblkError } from '../errors.js';
import {
  type AuditRemarks,
  type ChangedKeyArea,
  type ChangeKeyAreaOptions,
  changeKeyArea,
  type KeyAreaEditor,
  type KeyAreaPlace,
  type Secret,
} from '../keys/index.js';
import type { LongWork } from '../native.js';
import { openCopies } from './unlock.js';

export interface RekeyOptions extends LongWork {
  /** Only count what is of another epoch. */
  verify?: boolean | undefined;
  /** Bytes: where a pass that was stopped goes on. */
  from?: number | undefined;
  /** Default: no limit. */
  bytesPerSecond?: number | undefined;
  /** Share of the time that the pass works, above 0 and at most 1; the rest is the guests' alone. */
  share?: number | undefined;
}

export interface RekeyPass {
  /** False: it was stopped. */
  readonly complete: boolean;
  /** Bytes: everything before is done. */
  readonly reached: number;
  /** Written again; in a verifying pass: found. */
  readonly sectors: number;
  /** Of another epoch, and their tag does not hold: left as they are. */
  readonly damaged: number;
  /** The first of them. */
  readonly damagedSectors: readonly number[];
  /** Likewise, of those that the medium does not give out. */
  readonly unreadable: number;
  readonly unreadableSectors: readonly number[];
}

/** Whoever has the disk open: a Disk of this process, or a ControlClient of one that serves it. */
export interface RotationHost {
  readonly keyArea: KeyAreaPlace;
  /**
   * From its end on everything is written under this key, of the key area whose state that is. Kind `locked`
   * when it was replaced since: it may have lost the key, and have another of the same number.
   */
  beginEpoch(epoch: number, key: Secret, keyAreaState: Uint8Array): Promise<void>;
  rekey(options: RekeyOptions): Promise<RekeyPass>;
  /** Forgets the keys and sessions of other epochs; a verifying pass has found nothing of them. */
  finishEpoch(): Promise<void>;
}

/** The steps in order; `onStep` hears of each when it is done. */
export const ROTATION_STEPS = [
  'prepared', // the key area holds both keys
  'begun', // every new sector is of the new epoch
  'rewritten', // and every old one
  'verified', // and that was looked at again
  'finished', // the engine has forgotten the old epoch
  'forgotten', // and so has the key area
] as const;
export type RotationStep = (typeof ROTATION_STEPS)[number];

export interface RotateDataKeyOptions
  extends Pick<RekeyOptions, 'bytesPerSecond' | 'share'>,
    LongWork,
    Omit<
      ChangeKeyAreaOptions,
      'place' | 'operation' | 'edit' | 'onStep' | 'partOfMore' | 'remarks'
    > {
  /**
   * Only if the current epoch is this one: a run that was killed can be repeated safely. With `abort`: only
   * the rotation that began there is given up.
   */
  readonly fromEpoch?: number | undefined;
  /** Back to the current epoch: what was written under the next one is written again. */
  readonly abort?: boolean | undefined;
  readonly onStep?: ((step: RotationStep) => void | Promise<void>) | undefined;
}

export interface RotatedDataKey {
  /** False: `fromEpoch` is not the current one any more, so nothing was done. */
  readonly changed: boolean;
  /** A rotation that was cut short was completed. */
  readonly resumed: boolean;
  readonly aborted: boolean;
  readonly dryRun: boolean;
  readonly fromEpoch: number;
  readonly toEpoch: number;
  /** Written again by this run. */
  readonly sectors: number;
  readonly keyArea: ChangedKeyArea;
}

interface Plan {
  readonly fromEpoch: number;
  readonly toEpoch: number;
  readonly resumed: boolean;
}

/**
 * Rotates the data key, or takes a rotation that was cut short to its end. Kinds: those of changing
 * a key area; `interrupted` (stopped, and can go on), `superseded` (another one was begun),
 * `integrity` and `io_error` (sectors that do not authenticate, or cannot be read, by number: their
 * old key is kept), `not_found` (nothing to abort, or not from `fromEpoch`), `no_space`.
 */
export async function rotateDataKey(
  host: RotationHost,
  options: RotateDataKeyOptions,
): Promise<RotatedDataKey> {
  const step = async (name: RotationStep) => await options.onStep?.(name);
  const { plan, changed } = await prepare(host, options);
  const { abort: aborted = false, dryRun = false } = options;
  const result = { aborted, dryRun, ...plan, keyArea: changed };
  if (dryRun || plan.toEpoch === plan.fromEpoch) {
    return { ...result, changed: dryRun && plan.toEpoch !== plan.fromEpoch, sectors: 0 };
  }
  await step('prepared');
  await beginEpoch(host, plan.toEpoch, options);
  await step('begun');
  const { sectors } = await pass(host, options, false);
  await step('rewritten');
  const left = await pass(host, options, true);
  if (left.sectors > 0) {
    throw new PqblkError('interrupted', `${left.sectors} sectors are still of another epoch`, {
      operation: 'verify rotation',
      hint: 'run the same command again; the old key is kept until nothing is left of it',
    });
  }
  await step('verified');
  await host.finishEpoch();
  await step('finished');
  const keyArea = await change(
    host,
    options,
    (editor) => {
      requireStill(plan, editor, aborted);
      if (!aborted) editor.commitDataKey();
      const { current, all } = editor.epochs;
      for (const epoch of all) if (epoch !== current) editor.forgetDataKey(epoch);
    },
    { remarks: () => remarksOf(plan, aborted ? 'aborted' : 'finished') },
  );
  await step('forgotten');
  return { ...result, changed: true, sectors, keyArea };
}

/**
 * What `rotateDataKey` would begin with, or the error that it would end with there, of a disk that nobody has
 * open: to open it for writing could change it already.
 */
export async function planDataKeyRotation(
  keyArea: KeyAreaPlace,
  options: RotateDataKeyOptions,
): Promise<RotatedDataKey> {
  const { plan, changed } = await prepare({ keyArea }, { ...options, dryRun: true });
  const { abort: aborted = false } = options;
  const result = { aborted, dryRun: true, ...plan, keyArea: changed, sectors: 0 };
  return { ...result, changed: plan.toEpoch !== plan.fromEpoch };
}

type KeyAreaHost = Pick<RotationHost, 'keyArea'>;

function change(
  host: KeyAreaHost,
  options: RotateDataKeyOptions,
  edit: (editor: KeyAreaEditor) => void,
  more: Pick<ChangeKeyAreaOptions, 'partOfMore' | 'remarks'>,
): Promise<ChangedKeyArea> {
  const { onStep: _, ...rest } = options;
  const operation = 'rotate-data-key';
  return changeKeyArea({ ...rest, ...more, place: host.keyArea, operation, edit });
}

const remarksOf = ({ fromEpoch, toEpoch }: Plan, step: AuditRemarks['step']): AuditRemarks => ({
  step,
  fromEpoch,
  toEpoch,
});

/** The key area holds the key of the epoch to move to; what there is to do. */
async function prepare(
  host: KeyAreaHost,
  options: RotateDataKeyOptions,
): Promise<{ plan: Plan; changed: ChangedKeyArea }> {
  let plan: Plan | undefined;
  const changed = await change(
    host,
    options,
    (editor) => {
      const { current, next } = editor.epochs;
      const resumed = next !== undefined;
      if (options.abort) {
        plan = { fromEpoch: underWay(editor.epochs, options), toEpoch: current, resumed };
        return;
      }
      if (options.fromEpoch !== undefined && options.fromEpoch !== current) {
        requirePast(options.fromEpoch, current);
        plan = { fromEpoch: current, toEpoch: current, resumed: false };
        return;
      }
      plan = { fromEpoch: current, toEpoch: next ?? editor.addDataKey(), resumed };
    },
    { partOfMore: true, remarks: () => remarksOf(plan as Plan, 'begun') },
  );
  return { plan: plan as unknown as Plan, changed };
}

/** The next epoch, which is to be given up. A job that is repeated must not give up a later rotation. */
function underWay(
  { current, next }: KeyAreaEditor['epochs'],
  { fromEpoch = current }: RotateDataKeyOptions,
): number {
  if (fromEpoch !== current) requirePast(fromEpoch, current);
  if (next !== undefined && fromEpoch === current) return next;
  const from = fromEpoch === current ? '' : ` from epoch ${fromEpoch}`;
  const message = `no rotation of the data key${from} is under way; the disk is of epoch ${current}`;
  throw new PqblkError('not_found', message, { operation: 'abort rotation' });
}

/** An epoch that the disk never had is no work that is done. */
function requirePast(fromEpoch: number, current: number): void {
  if (fromEpoch >= 1 && fromEpoch < current) return;
  throw new PqblkError(
    'invalid_argument',
    `the disk is of epoch ${current}, and never was of ${fromEpoch}`,
    {
      operation: 'rotate data key',
    },
  );
}

const replacedMeanwhile = (cause?: PqblkError) =>
  new PqblkError('locked', cause?.message ?? 'the key area was replaced meanwhile', {
    operation: 'begin epoch',
    hint: 'run the same command again: it goes on where it was',
    cause,
  });

/** Everything is of `toEpoch` now: a key area that means something else must not lose that key. */
function requireStill(plan: Plan, editor: KeyAreaEditor, aborted: boolean): void {
  const { current, next } = editor.epochs;
  const [from, to] = aborted ? [next, current] : [current, next];
  if (from === plan.fromEpoch && to === plan.toEpoch) return;
  throw new PqblkError('locked', 'somebody else changed the data keys meanwhile', {
    operation: 'end rotation',
    hint: 'run the same command again; no key was forgotten',
  });
}

async function beginEpoch(
  host: RotationHost,
  epoch: number,
  { identity, ...accepted }: RotateDataKeyOptions,
): Promise<void> {
  const { volumeUuid } = await host.keyArea.read();
  const release = await accepted.pins?.hold(volumeUuid); // another change of this host's comes after
  try {
    const copies = await host.keyArea.read();
    using keys = (await openCopies(copies, identity, accepted)).opened;
    const key = keys.dataKeys.get(epoch);
    if (!key) throw replacedMeanwhile();
    await host.beginEpoch(epoch, key, copies.state);
  } catch (error) {
    // Somebody else drives, and says who; or keys were changed, by which nothing is lost.
    if (!(error instanceof PqblkError) || error.kind !== 'locked' || error.hint) throw error;
    throw replacedMeanwhile(error);
  } finally {
    await release?.();
  }
}

async function pass(
  host: RotationHost,
  { bytesPerSecond, share, signal, onProgress }: RotateDataKeyOptions,
  verify: boolean,
): Promise<RekeyPass> {
  const progress = verify ? {} : { onProgress };
  const work = host.rekey({ verify, bytesPerSecond, share, signal, ...progress });
  const done = await work.catch((error: unknown) => Promise.reject(unlessSuperseded(error)));
  if (!done.complete || signal?.aborted) {
    throw new PqblkError('interrupted', 'stopped; the rotation is not finished', {
      operation: 'rotate data key',
      hint: 'the same command goes on with it, --abort goes back; the disk can be used meanwhile',
    });
  }
  requireAllWritten(done);
  return done;
}

function requireAllWritten(pass: RekeyPass): void {
  // A serving process of an older version ends a pass at what it cannot read, and counts nothing.
  const { damaged, damagedSectors, unreadable = 0, unreadableSectors = [] } = pass;
  if (damaged + unreadable === 0) return;
  const name = (what: string, count: number, sectors: readonly number[]) => {
    const more = count > sectors.length ? ', …' : '';
    const which = `${sectors.join(', ')}${more}`;
    return `${count} sectors (of 4096 bytes) ${what} and cannot be written again: ${which}`;
  };
  const named = [
    ...(damaged > 0 ? [name('do not authenticate', damaged, damagedSectors)] : []),
    ...(unreadable > 0 ? [name('cannot be read', unreadable, unreadableSectors)] : []),
  ];
  const mend =
    'restore or discard them, then run the same command again; the old key is kept until then';
  throw new PqblkError(damaged > 0 ? 'integrity' : 'io_error', named.join('; '), {
    operation: 'rotate data key',
    hint: unreadable > 0 ? `the medium fails: move the disk; ${mend}` : mend,
  });
}

/** A pass is canceled by nobody but whoever begins another epoch; a signal ends it without an error. */
function unlessSuperseded(error: unknown): unknown {
  if (!(error instanceof PqblkError) || error.kind !== 'canceled') return error;
  const { message, path, cause } = error;
  return new PqblkError('superseded', message, {
    path,
    operation: 'rotate data key',
    hint: 'another command has gone back or on; look with `pqblk info` before you run this one again',
    cause,
  });
}
