// Room disk/: making disks.
import { rm } from 'node:fs/promises';
import { PqblkError } from '../errors.js';
import {
  type AuditLine,
  type AuditTrail,
  createKeyArea,
  describeRecipients,
  type Pins,
  type Recipient,
  type VolumeKeys,
} from '../keys/index.js';
import { randomBytes } from '../keys/secret.js';
import { calling, type LongWork, longCall, native } from '../native.js';
import type { DiskFormat } from './types.js';
import { lendKeys } from './unlock.js';

export type Preallocation = 'off' | 'metadata' | 'falloc' | 'full';

export interface CreateDiskOptions extends LongWork {
  format: DiskFormat;
  /** Bytes, a multiple of 512. */
  size: number;
  /** Replace an existing file. */
  overwrite?: boolean;
  /** Allow a path under /etc, /usr, … */
  allowSystemDirectory?: boolean;
  preallocation?: Preallocation;
  /** Bytes, a power of two: qcow2 512 to 2 MiB, sealed 4 KiB to 2 MiB. Default 65536. */
  clusterSize?: number;
  /** qcow2: 2 or 3. */
  version?: number;
  /** qcow2: 1, 2, 4 … 64. */
  refcountBits?: number;
  /** qcow2. */
  extendedL2?: boolean;
  /** qcow2: what compressed clusters would use. */
  compression?: 'zlib' | 'zstd';
  /** The file below, as the new image shall name it, and its format. */
  backingName?: string;
  backingFormat?: 'raw' | 'qcow2';
  /** Sealed: whoever may open the disk; at least one. */
  recipients?: readonly Recipient[];
  /** Sealed. Default AES-256-GCM. */
  suite?: 'AES-256-GCM' | 'ChaCha20-Poly1305';
  /** Sealed: bytes; default about 0.1 % of the size. */
  logBytes?: number;
  /** Sealed: remembers the new volume at once. */
  pins?: Pins | undefined;
  /** Sealed: where the log of its keys begins. */
  audit?: ((volumeUuid: Uint8Array) => AuditTrail) | undefined;
}

export interface CreatedDisk {
  /** Sealed: the new volume's UUID, 16 bytes. */
  readonly volumeUuid?: Uint8Array;
}

/** A random UUID (RFC 9562, version 4). */
function newUuid(): Uint8Array {
  const uuid = randomBytes(16);
  uuid[6] = ((uuid[6] as number) & 0x0f) | 0x40;
  uuid[8] = ((uuid[8] as number) & 0x3f) | 0x80;
  return uuid;
}

/**
 * Makes a new, empty disk. Nothing is left behind when it fails or is stopped. Kinds `exists`,
 * `permission` (a system directory), `no_space`, `no_key` (sealed without recipients),
 * `invalid_argument`, `canceled`, …
 */
export async function createDisk(path: string, options: CreateDiskOptions): Promise<CreatedDisk> {
  return await createAndUse(path, options, async (keys) =>
    keys ? { volumeUuid: keys.volumeUuid } : {},
  );
}

/**
 * As createDisk, and `use` has its part in that: when it fails, nothing is left either. It has the new keys of
 * a sealed disk, which it may dispose of before it ends.
 */
export async function createAndUse<T>(
  path: string,
  options: CreateDiskOptions,
  use: (keys: VolumeKeys | undefined) => Promise<T>,
): Promise<T> {
  const { recipients = [], pins, audit, onProgress, signal, ...rest } = options;
  const work = { onProgress, signal };
  if (options.format !== 'sealed') {
    if (recipients.length > 0) {
      throw new PqblkError('invalid_argument', `a ${options.format} disk is not sealed to anyone`);
    }
    await longCall(work, (token) => native().createDisk({ ...rest, path }, undefined, token));
    return await orRemove(path, () => use(undefined));
  }
  const volumeUuid = newUuid();
  const line = await audit?.(volumeUuid).prepare({
    operation: 'create',
    volumeUuid,
    generation: 1,
    known: { lines: 0, hash: '' },
    unlockedBy: '',
    approvedBy: [],
    before: [],
    after: describeRecipients(recipients),
  });
  try {
    using keys = await createSealed(path, rest, { volumeUuid, recipients, line }, work);
    return await orRemove(path, async () => {
      await pins?.record(keys); // unpinned, it could be exchanged unnoticed before its first use
      return await use(keys);
    });
  } catch (error) {
    await line?.withdraw(error);
    throw error;
  } finally {
    await line?.close();
  }
}

/** A disk that was just made is removed again when that fails. */
async function orRemove<T>(path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    await rm(path, { force: true });
    throw error;
  }
}

interface NewVolume {
  readonly volumeUuid: Uint8Array;
  readonly recipients: readonly Recipient[];
  readonly line: AuditLine | undefined;
}

async function createSealed(
  path: string,
  rest: Omit<CreateDiskOptions, 'recipients' | 'audit' | 'pins'>,
  { volumeUuid, recipients, line }: NewVolume,
  work: LongWork,
): Promise<VolumeKeys> {
  const keys = await createKeyArea({ volumeUuid, recipients, audit: line });
  try {
    await line?.append();
    const backing = rest.backingName !== undefined && { backingPolicy: 'unauthenticated' };
    const sealed = { ...rest, path, uuid: volumeUuid, keyArea: keys.blob, ...backing };
    await longCall(work, (token) =>
      lendKeys(keys, (lent) => native().createDisk(sealed, lent, token)),
    );
    return keys;
  } catch (error) {
    keys[Symbol.dispose]();
    throw error;
  }
}

/** Bytes that a file in this directory could still take. */
export function freeSpace(directory: string): Promise<number> {
  return calling(() => native().freeSpace({ path: directory }));
}

/** Whether a file there would lie in a directory of the system (/etc, /usr, …). */
export function inSystemDirectory(path: string): boolean {
  return native().inSystemDirectory({ path });
}
