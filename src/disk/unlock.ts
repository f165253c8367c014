// Room disk/: from a sealed disk's file and a private key to the keys the engine wants.
//
// The engine reads the key area and hands it up unopened; the room keys/ opens it; the pins of this
// host are asked before anything is used. Copies of secrets live here for the length of one call.
import { PqblkError } from '../errors.js';
import {
  type Chosen,
  type CopyIndex,
  findingsOf,
  type Identity,
  type KeyAreaCopies,
  needsMending,
  type OpenedKeyArea,
  openKeyArea,
  openNewest,
  type Refusal,
  unmovedCopy,
  type VolumeKeys,
} from '../keys/index.js';
import type { NativeKeys } from '../native.js';
import { keyAreaOf } from './key-area-file.js';
import type { KeyOptions } from './types.js';

/** The keys of one volume. Dispose of it as soon as the engine has them. */
export interface UnlockedVolume {
  readonly uuid: Uint8Array;
  /** The copies as they were, that which opened, and what is wrong with them. */
  readonly keyArea: {
    readonly copies: KeyAreaCopies;
    readonly index: CopyIndex;
    readonly findings: readonly string[];
    readonly refused: Refusal | undefined;
  };
  /** A rotation of the data key is under way: one of the keys may be given up. */
  readonly rotating: boolean;
  /**
   * Calls `fn` with copies that are wiped when it returns. The engine opens nothing with them once the key
   * area was replaced.
   */
  lendKeys<T>(fn: (lent: NativeKeys) => T): T;
  /** Lets this host remember what it saw; after the open succeeded. */
  record(): Promise<void>;
  [Symbol.dispose](): void;
}

/**
 * Calls `fn` with the keys as the addon takes them; it copies them before it returns. While a rotation is under
 * way everything is written under the next epoch already, unless one copy of the key area alone may have its
 * key: `whole` is false then.
 */
export function lendKeys<T>(keys: VolumeKeys, fn: (lent: NativeKeys) => T, whole = true): T {
  const copies: Uint8Array[] = [];
  const copy = (bytes: Uint8Array) => {
    const made = unmovedCopy(bytes);
    copies.push(made);
    return made;
  };
  try {
    return fn({
      integrity: keys.integrityKey.use(copy),
      data: [...keys.dataKeys].map(([epoch, key]) => ({ epoch, key: key.use(copy) })),
      currentEpoch: (whole && keys.nextEpoch) || keys.currentEpoch,
    });
  } finally {
    for (const made of copies) made.fill(0);
  }
}

/**
 * What the engine says of keys that came out of the disk's own key area: those in it are not the disk's,
 * whatever key opened it. Kind `data_key_missing` instead of `wrong_key`.
 */
function aboutDataKeys(error: unknown): unknown {
  if (!(error instanceof PqblkError) || error.kind !== 'wrong_key') return error;
  const { message, path, operation, cause } = error;
  const hint = 'the key area is older than the disk: restore a newer one from a header backup';
  return new PqblkError('data_key_missing', message, { path, operation, hint, cause });
}

/** Opens the copy that counts, as `identity` and the pin see it. Kinds as `openNewest`. */
export async function openCopies(
  copies: KeyAreaCopies,
  identity: Identity,
  { pins, allowRollback, confirmVmk }: KeyOptions,
): Promise<Chosen<OpenedKeyArea>> {
  const expectedVolumeUuid = copies.volumeUuid;
  return await openNewest(copies, {
    ...{ pins, allowRollback, confirmVmk },
    open: (blob) => openKeyArea(blob, identity, { expectedVolumeUuid }),
    observe: (opened) => opened,
  });
}

/** Nobody replaces a key area again and again in the moments between reading and locking it. */
const UNLOCKS_MAX = 4;

/**
 * Unlocks and calls `use`, which lends the keys to the engine. That compares the key area that they are from
 * once it holds the disk's lock: where another process was quicker, and may have given a data key up,
 * everything is done anew. Kinds: those of `unlock` and `use`.
 */
export async function withUnlocked<T>(
  path: string,
  options: KeyOptions,
  use: (volume: UnlockedVolume) => Promise<T>,
): Promise<T> {
  for (let left = UNLOCKS_MAX; ; left -= 1) {
    const volume = await unlock(path, options);
    try {
      return await use(volume);
    } catch (error) {
      if (left === 1 || !(await wasReplaced(path, volume, error))) throw aboutDataKeys(error);
    } finally {
      volume[Symbol.dispose]();
    }
  }
}

/** The disk may as well be locked by somebody who leaves its key area alone. */
async function wasReplaced(
  path: string,
  { keyArea }: UnlockedVolume,
  error: unknown,
): Promise<boolean> {
  if (!(error instanceof PqblkError) || error.kind !== 'locked') return false;
  const { state } = await keyAreaOf(path).read();
  return Buffer.compare(state, keyArea.copies.state) !== 0;
}

/** Kinds `no_key` (no identity), `key_area_damaged`, and those of openKeyArea and Pins.check. */
export async function unlock(path: string, options: KeyOptions): Promise<UnlockedVolume> {
  const { identity, pins } = options;
  if (identity === undefined) {
    throw new PqblkError('no_key', 'a sealed disk opens with a private key only', {
      path,
      hint: 'name a key of the key store',
    });
  }
  const copies = await keyAreaOf(path).read();
  const chosen = await openCopies(copies, identity, options);
  const { opened: keys, index, refused } = chosen;
  try {
    options.onSlot?.(keys.slot);
  } catch (error) {
    keys[Symbol.dispose]();
    throw error;
  }
  return {
    uuid: copies.volumeUuid,
    keyArea: { copies, index, refused, findings: findingsOf(copies, { refused }) },
    rotating: keys.nextEpoch !== undefined,
    lendKeys: (fn) => {
      const keyAreaState = Uint8Array.from(copies.state);
      return lendKeys(keys, (lent) => fn({ ...lent, keyAreaState }), !needsMending(copies));
    },
    record: async () => {
      await pins?.record(keys, options);
    },
    [Symbol.dispose]: () => keys[Symbol.dispose](),
  };
}
