// Room disk/: an open disk.
//
// Translates the public API into requests on the engine's queues and long calls of the addon. What a
// request means is the engine's business; keys pass through unlock.ts only.
import { PqblkError } from '../errors.js';
import { type KeyAreaPlace, type Secret, unmovedCopy, type VolumeKeys } from '../keys/index.js';
import {
  asPqblkError,
  calling,
  type LongWork,
  longCall,
  type NativeDisk,
  native,
} from '../native.js';
import { RequestFlag, RequestType } from './channel.js';
import { type CreateDiskOptions, createAndUse } from './create.js';
import { keyAreaPlace } from './key-area-file.js';
import { DiskQueue, type DiskQueueOptions } from './queue.js';
import { closedError, Requests } from './requests.js';
import type { RekeyOptions, RekeyPass } from './rotate.js';
import { type NbdOptions, type NbdServer, serveNbd } from './serve.js';
import { serveVhostUser, type VhostUserOptions, type VhostUserServer } from './serve-vhost-user.js';
import { given } from './server.js';
import type {
  BenchResult,
  BenchSpec,
  DiskExtent,
  DiskFacts,
  DiskStats,
  ExtentKind,
  KeyOptions,
  OpenDiskOptions,
  RateLimits,
} from './types.js';
import { lendKeys, type UnlockedVolume, withUnlocked } from './unlock.js';

export interface WriteOptions {
  /** Durable when the promise resolves. */
  fua?: boolean;
}

export interface ZeroOptions extends WriteOptions {
  /** Give the space back. */
  unmap?: boolean;
}

/** An open disk. Offsets and lengths are bytes, of any alignment, within `size`. */
export class Disk {
  readonly #native: NativeDisk;
  readonly #requests: Requests[];
  readonly #queues: DiskQueue[] = [];
  readonly #volumeUuid: Uint8Array | undefined;
  #facts: DiskFacts;
  #next = 0;
  #closing: Promise<void> | undefined;

  /** Use `openDisk`. */
  constructor(handle: NativeDisk, volumeUuid?: Uint8Array) {
    this.#native = handle;
    this.#volumeUuid = volumeUuid;
    this.#facts = handle.facts() as unknown as DiskFacts;
    this.#requests = Array.from(
      { length: this.#facts.queues },
      (_, queue) => new Requests(handle, queue),
    );
  }

  /** Bytes. */
  get size(): number {
    return this.#facts.size;
  }

  get facts(): DiskFacts {
    return this.#facts;
  }

  get closed(): boolean {
    return this.#closing !== undefined;
  }

  /** Sealed: the volume's UUID, 16 bytes. */
  get volumeUuid(): Uint8Array | undefined {
    return this.#volumeUuid;
  }

  /**
   * Fills `buffer` from `offset` on. The buffer must not be transferred or resized before the promise
   * settles. Kinds `out_of_range`, `integrity`, `io_error`, `closed`, …
   */
  read(buffer: Uint8Array, offset: number): Promise<void> {
    return this.#request(RequestType.read, 0, offset, buffer);
  }

  /** Fills the buffers one after the other, in one request. */
  readv(buffers: Uint8Array[], offset: number): Promise<void> {
    return this.#request(RequestType.read, 0, offset, buffers);
  }

  /** Writes `buffer` at `offset`; it must not change before the promise settles. */
  write(buffer: Uint8Array, offset: number, options: WriteOptions = {}): Promise<void> {
    return this.#request(RequestType.write, flagsOf(options), offset, buffer);
  }

  writev(buffers: Uint8Array[], offset: number, options: WriteOptions = {}): Promise<void> {
    return this.#request(RequestType.write, flagsOf(options), offset, buffers);
  }

  /** Everything that was acknowledged before survives power loss once the promise resolves. */
  flush(): Promise<void> {
    return this.#request(RequestType.flush, 0, 0, 0);
  }

  /** Advice that a range is no longer needed: whole blocks inside it may read as zeros. */
  discard(offset: number, length: number): Promise<void> {
    return this.#request(RequestType.discard, 0, offset, requireCount(length, 'length'));
  }

  /** The range reads as zeros. */
  writeZeroes(offset: number, length: number, options: ZeroOptions = {}): Promise<void> {
    const bytes = requireCount(length, 'length');
    return this.#request(RequestType.writeZeroes, flagsOf(options), offset, bytes);
  }

  /** Batched submission over shared memory, for `depth` requests at once. See DiskQueue. */
  queue(depth: number, options: DiskQueueOptions = {}): DiskQueue {
    this.#requireOpen();
    const queue = new DiskQueue(this.#native, requireCount(depth, 'depth'), options);
    this.#queues.push(queue);
    return queue;
  }

  /** What is allocated where, in order, without gaps; neighbours of one kind are joined. */
  async *extents(from = 0, to = this.size): AsyncGenerator<DiskExtent, void, void> {
    let open: DiskExtent | undefined;
    for (let offset = from; offset < to; ) {
      this.#requireOpen();
      const at = offset;
      for (const found of await calling(() =>
        this.#native.extents({ offset: at, length: to - at }),
      )) {
        const kind = found.kind as ExtentKind;
        if (open?.kind === kind) {
          open = { ...open, length: open.length + found.length };
        } else {
          if (open) yield open;
          open = { offset, length: found.length, kind };
        }
        offset += found.length;
      }
    }
    if (open) yield open;
  }

  /** Counters since the disk was opened. */
  stats(): DiskStats {
    this.#requireOpen();
    return this.#native.stats() as unknown as DiskStats;
  }

  /**
   * Holds requests back from now on, also those of running servers. What already waits meets the
   * new limits. Kind `invalid_argument`: a burst without its limit; nothing changes.
   */
  setLimits(limits: RateLimits): void {
    this.#requireOpen();
    try {
      this.#native.setLimits(given({ ...limits }));
    } catch (error) {
      throw asPqblkError(error);
    }
  }

  get limits(): Required<RateLimits> {
    this.#requireOpen();
    return this.#native.limits() as unknown as Required<RateLimits>;
  }

  /** Grows the disk to `size` bytes (a multiple of 512). Requests wait meanwhile. */
  async resize(size: number): Promise<void> {
    this.#requireOpen();
    await calling(() => this.#native.resize({ size }));
    this.#facts = this.#native.facts() as unknown as DiskFacts;
  }

  /** Drives the engine's queues directly, as a hypervisor would. Writing patterns destroy data. */
  async bench(spec: BenchSpec, work: LongWork = {}): Promise<BenchResult> {
    this.#requireOpen();
    return (await longCall(work, (token) => this.#native.bench(spec, token))) as BenchResult;
  }

  /** Sealed: the key area, changed while the disk is in use. */
  get keyArea(): KeyAreaPlace {
    return keyAreaPlace(this.#facts.path, async (change) => {
      this.#requireOpen();
      await this.#native.changeKeyArea(change);
    });
  }

  /** Sealed: see RotationHost, which a Disk is. Use `rotateDataKey`. */
  async beginEpoch(epoch: number, key: Secret, keyAreaState: Uint8Array): Promise<void> {
    this.#requireOpen();
    const begun = key.use((bytes) => {
      const copy = unmovedCopy(bytes);
      try {
        return this.#native.beginEpoch({ epoch, key: copy, keyAreaState });
      } finally {
        copy.fill(0);
      }
    });
    await calling(() => begun);
  }

  /** Sealed: a pass over the disk, which is in use meanwhile. */
  async rekey(options: RekeyOptions): Promise<RekeyPass> {
    this.#requireOpen();
    const { onProgress, signal, ...spec } = options;
    return (await longCall({ onProgress, signal }, (token) =>
      this.#native.rekey(given(spec), token),
    )) as RekeyPass;
  }

  /**
   * Of a sealed disk that is open read-only. Kind `corrupt`: to be written it has to be resized first, as it has
   * data beyond its size.
   */
  async requireWithinSize(): Promise<void> {
    this.#requireOpen();
    await calling(() => this.#native.requireWithinSize());
  }

  async finishEpoch(): Promise<void> {
    this.#requireOpen();
    await calling(() => this.#native.finishEpoch());
  }

  /** Serves the disk to NBD clients, each on one of its queues. See NbdOptions for the kinds. */
  async serveNbd(options: NbdOptions): Promise<NbdServer> {
    this.#requireOpen();
    return await serveNbd(this.#native, this, options);
  }

  /** Serves the disk to a hypervisor as a virtio block device. See VhostUserOptions for the kinds. */
  async serveVhostUser(options: VhostUserOptions): Promise<VhostUserServer> {
    this.#requireOpen();
    return await serveVhostUser(this.#native, this, options);
  }

  /**
   * Stops its servers, waits for what is in flight, writes everything home, gives the file free. Later requests are
   * refused with kind `closed`. May be called again; every call settles alike.
   */
  close(): Promise<void> {
    if (this.#closing === undefined) {
      for (const requests of this.#requests) requests.close();
      for (const queue of this.#queues) queue.close();
      this.#closing = calling(() => this.#native.close());
    }
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #request(
    type: number,
    flags: number,
    offset: number,
    data: Uint8Array | Uint8Array[] | number,
  ): Promise<void> {
    if (this.#closing !== undefined) return Promise.reject(closedError());
    if (!Number.isSafeInteger(offset) || offset < 0) {
      return Promise.reject(countError(offset, 'offset'));
    }
    const requests = this.#requests[this.#next] as Requests;
    this.#next = this.#next + 1 < this.#requests.length ? this.#next + 1 : 0;
    return requests.request(type, flags, offset, data);
  }

  #requireOpen(): void {
    if (this.#closing !== undefined) throw closedError();
  }
}

function flagsOf(options: ZeroOptions): number {
  return (options.fua ? RequestFlag.fua : 0) | (options.unmap ? RequestFlag.unmap : 0);
}

function requireCount(value: number, name: string): number {
  if (Number.isSafeInteger(value) && value >= 0) return value;
  throw countError(value, name);
}

/** Of what is no number the type only: it may be a guest's data, in the place of another argument. */
function countError(value: unknown, name: string): PqblkError {
  const found = typeof value === 'number' ? value : `a value of type ${typeof value}`;
  return new PqblkError('invalid_argument', `${name}: expected an integer from 0 on, not ${found}`);
}

/**
 * Opens a disk. A sealed one that was not closed cleanly is recovered first. Kinds `not_found`,
 * `locked`, `no_key`, `no_slot`, `wrong_key`, `data_key_missing`, `rollback`, `integrity`, `corrupt`, …
 */
export async function openDisk(path: string, options: OpenDiskOptions): Promise<Disk> {
  const { identity, pins, allowRollback, confirmVmk, onSlot, ...rest } = options;
  const open = { ...rest, path };
  if (options.format !== 'sealed') {
    return new Disk(await calling(() => native().openDisk(open)));
  }
  const how = { identity, pins, allowRollback, confirmVmk, onSlot };
  return await withUnlocked(path, how, async (volume) => {
    const { uuid } = volume;
    const opened = calling(() =>
      volume.lendKeys((keys) => native().openDisk({ ...open, uuid }, keys)),
    );
    const disk = new Disk(await opened, uuid);
    await recordOrClose(disk, volume);
    return disk;
  });
}

/**
 * Makes a disk and opens it with the keys that were just made: a disk for others can be filled
 * without a private key. A disk that does not open is removed again. Kinds as both calls.
 */
export async function createAndOpenDisk(
  path: string,
  create: CreateDiskOptions,
  open: OpenNewOptions = {},
): Promise<Disk> {
  const { format } = create;
  return await createAndUse(path, create, (keys) => openNewDisk(path, { ...open, format }, keys));
}

type OpenNewOptions = Omit<OpenDiskOptions, 'format' | keyof KeyOptions>;

/** Opens a disk with the keys that were made with it, and disposes of them. */
export async function openNewDisk(
  path: string,
  open: OpenNewOptions & Pick<OpenDiskOptions, 'format'>,
  given: VolumeKeys | undefined,
): Promise<Disk> {
  using keys = given;
  const options = { ...open, path };
  if (!keys) return new Disk(await calling(() => native().openDisk(options)));
  const uuid = Uint8Array.from(keys.volumeUuid);
  const sealed = { ...options, uuid };
  const opened = calling(() => lendKeys(keys, (lent) => native().openDisk(sealed, lent)));
  return new Disk(await opened, uuid);
}

async function recordOrClose(disk: Disk, volume: UnlockedVolume): Promise<void> {
  try {
    await volume.record();
  } catch (error) {
    await disk.close();
    throw error;
  }
}
