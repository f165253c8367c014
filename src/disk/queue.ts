// Room disk/: the batched queue: requests and completions through shared memory.
//
// A request costs no native call and no promise: data lies in the queue's own arena, submissions and
// completions are words in shared memory, and one native call hands a batch over.
import { PqblkError } from '../errors.js';
import type { NativeDisk } from '../native.js';
import { Channel, RequestFlag, RequestType } from './channel.js';
import { closedError } from './requests.js';

export interface DiskQueueOptions {
  /** Bytes of data memory. Default: 4 KiB for each request. */
  arenaBytes?: number;
  /** Which of the disk's queues runs the requests. Default 0. */
  queue?: number;
}

/** `tag` is the submitter's; `error` is undefined when the request succeeded. */
export type CompletionHandler = (tag: number, error: PqblkError | undefined) => void;

/**
 * Batched submission. `read` and the others only note a request (false: all slots are in use);
 * `submit` hands what was noted to the disk; `reap` looks at what completed. Offsets and lengths are
 * bytes of any alignment.
 */
export class DiskQueue {
  /** Data memory, aligned to 4096: read from it, write into it, by `arenaOffset`. */
  readonly arena: Buffer;
  /** Requests that can be under way at once. */
  readonly depth: number;
  readonly #channel: Channel;
  readonly #tags: Float64Array;
  #handler: CompletionHandler = () => {};
  #wake: (() => void) | undefined;
  #pending = 0;
  #closed = false;
  readonly #completed = (slot: number, ok: boolean) => {
    this.#handler(this.#tags[slot] as number, ok ? undefined : this.#channel.error(slot));
  };
  /** Called once for each batch of completions, as an alternative to `wait`. */
  onCompletions: (() => void) | undefined;

  constructor(disk: NativeDisk, depth: number, options: DiskQueueOptions = {}) {
    const { arenaBytes = depth * 4096, queue = 0 } = options;
    this.#channel = new Channel(disk, { queue, slots: depth, arenaBytes }, () => this.#announced());
    this.arena = this.#channel.arena;
    this.depth = this.#channel.slots;
    this.#tags = new Float64Array(this.depth);
  }

  /** Noted or submitted requests whose completion was not reaped yet. */
  get inFlight(): number {
    return this.#channel.inUse;
  }

  read(offset: number, length: number, arenaOffset: number, tag = 0): boolean {
    return this.#note(RequestType.read, 0, offset, length, arenaOffset, tag);
  }

  write(offset: number, length: number, arenaOffset: number, tag = 0, fua = false): boolean {
    const flags = fua ? RequestFlag.fua : 0;
    return this.#note(RequestType.write, flags, offset, length, arenaOffset, tag);
  }

  flush(tag = 0): boolean {
    return this.#note(RequestType.flush, 0, 0, 0, 0, tag);
  }

  discard(offset: number, length: number, tag = 0): boolean {
    return this.#note(RequestType.discard, 0, offset, length, 0, tag);
  }

  writeZeroes(offset: number, length: number, tag = 0, unmap = false): boolean {
    const flags = unmap ? RequestFlag.unmap : 0;
    return this.#note(RequestType.writeZeroes, flags, offset, length, 0, tag);
  }

  /** One native call. Returns how many requests it handed over. Kind `closed`. */
  submit(): number {
    const count = this.#pending;
    this.#pending = 0;
    if (this.#closed || (count > 0 && !this.#channel.kick())) throw closedError();
    return count;
  }

  /** Calls `handler` for every completion that is there. No native call unless one failed. */
  reap(handler: CompletionHandler): number {
    this.#handler = handler;
    return this.#channel.reap(this.#completed);
  }

  /** Resolves once completions may be there to reap; at once when nothing is in flight. */
  wait(): Promise<void> {
    if (this.#channel.ready || this.inFlight === this.#pending) return Promise.resolve();
    return new Promise((resolve) => {
      this.#wake = resolve;
    });
  }

  /** No further requests; what is in flight completes and can still be reaped. */
  close(): void {
    this.#closed = true;
  }

  #announced(): void {
    this.onCompletions?.();
    const wake = this.#wake;
    this.#wake = undefined;
    wake?.();
  }

  #note(
    type: number,
    flags: number,
    offset: number,
    length: number,
    arenaOffset: number,
    tag: number,
  ): boolean {
    if (!(offset >= 0) || !(length >= 0) || !(arenaOffset >= 0)) {
      throw new PqblkError('invalid_argument', 'offsets and lengths are integers from 0 on');
    }
    const moves = type === RequestType.read || type === RequestType.write;
    if (moves && arenaOffset + length > this.arena.length) {
      throw new PqblkError('invalid_argument', 'the data would reach beyond the arena');
    }
    if (this.#channel.full) return false;
    const slot = this.#channel.take();
    this.#tags[slot] = tag;
    this.#channel.enter(slot, type, flags, offset, length, arenaOffset);
    this.#pending += 1;
    return true;
  }
}
