// Room keys/: what this host remembers of each volume, so that an older or foreign key area is
// noticed.
//
// A pin is {generation, check value of the VMK, epoch}, one file per volume UUID beside the keys.
// Before this host replaces a key area it announces the new one in the pin, so that the disk opens
// without a question wherever the replacement is cut short.
// The same VMK and nothing older opens; something older is a rollback; another VMK must be
// confirmed by its fingerprint, because whoever once knew an old VMK can forge any generation under
// it. A volume seen for the first time is trusted and pinned. Copies of a disk share their UUID and
// so their pin.
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { fromSystem, PqblkError } from '../errors.js';
import { formatUuid, fromHex, parseUuid, toHex } from './bytes.js';
import { takeLock } from './lock-file.js';
import { ensurePrivateDirectory, readPrivateFile, writePrivateFile } from './private-file.js';

/** What an opened key area shows of itself; VolumeKeys (key-area.ts) is one. */
export interface Observed {
  readonly volumeUuid: Uint8Array;
  readonly generation: number;
  readonly currentEpoch: number;
  readonly vmkCheck: Uint8Array;
}

export interface PinnedState {
  readonly generation: number;
  readonly epoch: number;
  /** Check value of the VMK, 64 hex digits. */
  readonly vmkCheck: string;
}

export interface Pin extends PinnedState {
  /** What this host was about to write when it was last heard of: as good as what it has seen. */
  readonly announced?: PinnedState | undefined;
}

/** A pin, and whose it is. */
export interface VolumePin extends PinnedState {
  readonly volumeUuid: string;
}

export interface PinOptions {
  /** Accept an older generation or epoch than the pinned one. */
  allowRollback?: boolean | undefined;
  /** Accept another VMK if its check value begins with these hex digits (at least 16). */
  confirmVmk?: string | undefined;
}

/** How an accepted key area compares with its pin; all but `same` are worth recording. */
export type PinVerdict = 'new' | 'same' | 'newer' | 'rolled-back' | 'confirmed';

const PIN_FORMAT = 'pqblk-pin';
const PIN_VERSION = 1;
const PIN_BYTES_MAX = 4096;
const CONFIRM_DIGITS_MIN = 16;
/** Changes are short; whoever waits longer is told who is at it. */
const HOLD_PATIENCE_MS = 30_000;

/**
 * Compares an opened key area with a pin. Kinds `vmk_changed` and `rollback`; the hint of each
 * names the option that accepts it. An older key area under another VMK needs both options.
 */
export function judge(pin: Pin | undefined, seen: Observed, options: PinOptions): PinVerdict {
  if (!pin) return 'new';
  const check = toHex(seen.vmkCheck);
  const isAnnounced = check !== pin.vmkCheck && check === pin.announced?.vmkCheck;
  const expected = isAnnounced && pin.announced ? pin.announced : pin;
  const changed = check !== expected.vmkCheck;
  if (changed && !confirms(check, options.confirmVmk)) {
    throw new PqblkError(
      'vmk_changed',
      `volume ${formatUuid(seen.volumeUuid)} has another master key than this host remembers: ` +
        `expected ${pin.vmkCheck}, found ${check}`,
      {
        operation: 'check pin',
        hint: isOlder(seen, expected)
          ? 'it is older than what this host has seen as well: somebody put an old copy back, or this is a ' +
            'disk whose copy had its keys changed here (`pqblk report` finds copies). Compare with whoever ' +
            `changed keys: --confirm-vmk ${check} --allow-rollback`
          : `if it was rotated elsewhere, compare with whoever did it: --confirm-vmk ${check}`,
      },
    );
  }
  const older = isOlder(seen, expected);
  if (older && options.allowRollback !== true) {
    throw new PqblkError(
      'rollback',
      `volume ${formatUuid(seen.volumeUuid)} shows an older key area than this host has seen: ` +
        `generation ${seen.generation} and epoch ${seen.currentEpoch}, ` +
        `expected at least ${expected.generation} and ${expected.epoch}`,
      {
        operation: 'check pin',
        hint: 'a restored backup may still open to revoked keys; --allow-rollback accepts it',
      },
    );
  }
  if (changed) return 'confirmed';
  if (older) return 'rolled-back';
  const same = seen.generation === pin.generation && seen.currentEpoch === pin.epoch;
  return same && !isAnnounced ? 'same' : 'newer';
}

const isNewerThan = (seen: Observed, { generation, epoch }: PinnedState) =>
  seen.generation > generation || seen.currentEpoch > epoch;

const isOlder = (seen: Observed, { generation, epoch }: PinnedState) =>
  seen.generation < generation || seen.currentEpoch < epoch;

/** Whether somebody's digits are the beginning, long enough, of a check value. */
export function confirms(check: string, given: string | undefined): boolean {
  const digits = given?.toLowerCase() ?? '';
  return digits.length >= CONFIRM_DIGITS_MIN && check.startsWith(digits);
}

/** What one process tells another of a key area. */
export const toState = (seen: Observed): PinnedState => stateOf(seen);

/** The reverse, of what came from elsewhere. Kind `invalid_argument`. */
export function fromState(volumeUuid: Uint8Array, value: unknown): Observed {
  const { generation, epoch, vmkCheck } = stateIn(value, (what) => {
    return new PqblkError('invalid_argument', `not the state of a key area: ${what}`);
  });
  return { volumeUuid, generation, currentEpoch: epoch, vmkCheck: fromHex(vmkCheck) };
}

function stateIn(value: unknown, damaged: (what: string) => PqblkError): PinnedState {
  const natural = (candidate: unknown): candidate is number =>
    Number.isSafeInteger(candidate) && (candidate as number) >= 1;
  const { generation, epoch, vmkCheck } = (value ?? {}) as Record<string, unknown>;
  if (!natural(generation) || !natural(epoch)) throw damaged('generation or epoch');
  if (typeof vmkCheck !== 'string' || !/^[0-9a-f]{64}$/.test(vmkCheck)) throw damaged('vmkCheck');
  return { generation, epoch, vmkCheck };
}

/** The pins of one key store, in its directory `pins`. */
export class Pins {
  readonly #directory: string;
  /** Volumes whose pins this object holds. */
  readonly #held = new Set<string>();

  constructor(directory: string) {
    this.#directory = directory;
  }

  /** The same for all objects that mean the same directory; undefined while there is none. */
  async identity(): Promise<string | undefined> {
    const found = await stat(this.#directory).catch(() => undefined);
    return found && `${found.dev}-${found.ino}`;
  }

  #path(volumeUuid: Uint8Array): string {
    return join(this.#directory, `${formatUuid(volumeUuid)}.json`);
  }

  /** The pin of a volume, or undefined. Kind `bad_key` when its file is damaged: never ignored. */
  async get(volumeUuid: Uint8Array): Promise<Pin | undefined> {
    const path = this.#path(volumeUuid);
    let text: string;
    try {
      text = await readPrivateFile(path, PIN_BYTES_MAX);
    } catch (error) {
      if (error instanceof PqblkError && error.kind === 'not_found') return undefined;
      throw error;
    }
    return parsePin(text, path, formatUuid(volumeUuid));
  }

  /** Every volume that this host remembers. Kind `bad_key` when a file of them is damaged. */
  async list(): Promise<VolumePin[]> {
    const files = await readdir(this.#directory).catch((error: unknown) => {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
      throw fromSystem(error, { path: this.#directory, operation: 'list pins' });
    });
    const found: VolumePin[] = [];
    for (const file of files.sort()) {
      const volumeUuid = /^([0-9a-f-]{36})\.json$/.exec(file)?.[1];
      const pin = volumeUuid && (await this.get(parseUuid(volumeUuid)));
      if (volumeUuid && pin) found.push({ volumeUuid, ...pin });
    }
    return found;
  }

  /**
   * Believes somebody else's pin, whatever master key this host remembers: who calls it knows where the pin
   * is from. False: it is so already, or newer. Kind `rollback`: under another master key, and older.
   */
  async adopt(
    { volumeUuid, ...state }: VolumePin,
    { allowRollback }: PinOptions,
  ): Promise<boolean> {
    const seen = fromState(parseUuid(volumeUuid), state);
    const release = await this.#hold(seen.volumeUuid);
    try {
      const pin = await this.get(seen.volumeUuid);
      const sameKey = pin?.vmkCheck === state.vmkCheck;
      const older = pin !== undefined && isOlder(seen, pin);
      if (sameKey && (!allowRollback || !older) && !isNewerThan(seen, pin)) return false;
      judge(pin, seen, { allowRollback, confirmVmk: state.vmkCheck });
      await this.#write(seen.volumeUuid, stateOf(seen));
      return true;
    } finally {
      await release?.();
    }
  }

  /** See `judge`. Call it after the key area opened and before its keys are used. */
  async check(seen: Observed, options: PinOptions = {}): Promise<PinVerdict> {
    return judge(await this.get(seen.volumeUuid), seen, options);
  }

  /**
   * Remembers what was seen, durably. Call it once both copies of the key area are durable. Checks
   * again, so that nothing newer is overwritten unless the options allow it.
   */
  async record(seen: Observed, options: PinOptions = {}): Promise<PinVerdict> {
    const verdict = await this.check(seen, options);
    if (verdict === 'same') return verdict;
    const release = await this.#hold(seen.volumeUuid).catch((error) => {
      throw unremembered(error);
    });
    try {
      const now = await this.check(seen, options);
      if (now !== 'same') await this.#write(seen.volumeUuid, stateOf(seen));
      return now;
    } finally {
      await release?.();
    }
  }

  /**
   * Keeps other processes of this host from writing the pin, from before a key area is read until its
   * successor is recorded: there is room for one announcement. Returns how to end that. Kind `locked`
   * when another change of the same volume takes too long.
   */
  async hold(volumeUuid: Uint8Array): Promise<() => Promise<void>> {
    const uuid = formatUuid(volumeUuid);
    await ensurePrivateDirectory(this.#directory);
    const path = join(this.#directory, uuid);
    const release = await takeLock(path, 'change keys', HOLD_PATIENCE_MS);
    this.#held.add(uuid);
    return async () => {
      this.#held.delete(uuid);
      await release();
    };
  }

  /** Nothing where the caller of `hold` is at work. */
  async #hold(volumeUuid: Uint8Array): Promise<(() => Promise<void>) | undefined> {
    return this.#held.has(formatUuid(volumeUuid)) ? undefined : await this.hold(volumeUuid);
  }

  /**
   * Remembers, durably, what is about to be written over `seen`, which was checked. Both open from now
   * on, until `record` sees either the new one or anything newer.
   */
  async announce(seen: Observed, next: Observed): Promise<void> {
    const pin = (await this.get(seen.volumeUuid)) ?? stateOf(seen);
    await this.#write(seen.volumeUuid, { ...pin, announced: stateOf(next) });
  }

  async #write(volumeUuid: Uint8Array, pin: Pin): Promise<void> {
    await ensurePrivateDirectory(this.#directory);
    const { announced, ...state } = pin;
    const document = {
      format: PIN_FORMAT,
      version: PIN_VERSION,
      volumeUuid: formatUuid(volumeUuid),
      ...state,
      ...(announced && { announced }),
    };
    const text = `${JSON.stringify(document, null, 2)}\n`;
    await writePrivateFile(this.#path(volumeUuid), text, 'replace');
  }
}

/** Who only opens a disk does not expect that anything is written. */
function unremembered(error: unknown): unknown {
  if (!(error instanceof PqblkError) || error.kind === 'locked') return error;
  const { kind, message, path, cause } = error;
  return new PqblkError(kind, message, {
    path,
    operation: 'remember key area',
    hint:
      'the keys of the disk are newer than what this host has seen, and it must be able to remember that: make ' +
      'the key store writable, or prepare it elsewhere with `pqblk pin import`',
    cause,
  });
}

const stateOf = (seen: Observed): PinnedState => ({
  generation: seen.generation,
  epoch: seen.currentEpoch,
  vmkCheck: toHex(seen.vmkCheck),
});

function parsePin(text: string, path: string, volumeUuid: string): Pin {
  const damaged = (what: string) =>
    new PqblkError('bad_key', `damaged pin file: ${what}`, {
      path,
      operation: 'read pin',
      hint: 'restore it from a backup; deleting it gives up the protection against rollback',
    });
  let value: Record<string, unknown>;
  try {
    value = JSON.parse(text) as Record<string, unknown>;
  } catch {
    throw damaged('not JSON');
  }
  if (value?.format !== PIN_FORMAT || value.version !== PIN_VERSION)
    throw damaged('unknown format');
  if (value.volumeUuid !== volumeUuid) throw damaged('of another volume');
  const { announced } = value;
  if (announced === undefined) return stateIn(value, damaged);
  return { ...stateIn(value, damaged), announced: stateIn(announced, damaged) };
}
