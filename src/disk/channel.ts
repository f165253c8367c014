// Room disk/: the words in which requests and completions pass between JavaScript and one queue.
//
// Layout and numbers are those of native/node/channel.h. This file knows slots and memory, not what
// a disk is. A slot is in use from its submission until its completion was seen here; a buffer is
// kept alive for as long, since the engine holds only its address.
import { fromNative, type PqblkError } from '../errors.js';
import type { NativeChannel, NativeDisk } from '../native.js';

export const RequestType = {
  read: 0,
  write: 1,
  flush: 4,
  getId: 8,
  discard: 11,
  writeZeroes: 13,
} as const;

export const RequestFlag = { fua: 1, unmap: 2 } as const;

const WORD = 4;
const COMPLETION_WORDS = 2;
const SUBMISSION_WORDS = 8;
const TWO_TO_32 = 2 ** 32;

/** Called for each completion: the slot is free again once it returns. */
export type Completed = (slot: number, ok: boolean) => void;

export class Channel {
  readonly slots: number;
  /** Memory for data that needs no native call; empty when none was asked for. */
  readonly arena: Buffer;
  readonly #native: NativeChannel;
  readonly #words: Int32Array;
  readonly #unsigned: Uint32Array;
  readonly #completions: number;
  readonly #submissions: number;
  readonly #free: Uint16Array;
  #freeCount: number;
  #seen = 0;
  #entries = 0;

  constructor(
    disk: NativeDisk,
    options: { queue: number; slots: number; arenaBytes: number },
    onCompletions: () => void,
  ) {
    // A power of two, so that positions stay right when the 32-bit count of completions wraps.
    this.slots = 2 ** Math.ceil(Math.log2(options.slots));
    this.#native = disk.channel({ ...options, slots: this.slots }, onCompletions);
    const memory = this.#native.memory();
    this.arena = Buffer.from(memory.buffer, memory.arena, memory.arenaBytes);
    this.#words = new Int32Array(memory.buffer, 0, memory.arena / WORD);
    this.#unsigned = new Uint32Array(memory.buffer, 0, memory.arena / WORD);
    this.#completions = memory.completions / WORD;
    this.#submissions = memory.submissions / WORD;
    this.#free = Uint16Array.from({ length: this.slots }, (_, i) => this.slots - 1 - i);
    this.#freeCount = this.slots;
  }

  get full(): boolean {
    return this.#freeCount === 0;
  }

  /** Slots taken: submitted or about to be, and not yet reaped. */
  get inUse(): number {
    return this.slots - this.#freeCount;
  }

  /** Takes a free slot; the caller looked at `full` before. */
  take(): number {
    this.#freeCount -= 1;
    return this.#free[this.#freeCount] as number;
  }

  /** Gives back a slot whose request was never submitted. */
  giveBack(slot: number): void {
    this.#free[this.#freeCount] = slot;
    this.#freeCount += 1;
  }

  /** One native call; the request waits for the next kick. `data` must live until it completes. */
  add(
    slot: number,
    type: number,
    flags: number,
    offset: number,
    data: Uint8Array | Uint8Array[] | number,
  ): void {
    this.#native.add(slot, type, flags, offset, data);
  }

  /** No native call: an entry in the shared memory, with data in the arena. */
  enter(
    slot: number,
    type: number,
    flags: number,
    offset: number,
    length: number,
    arenaOffset: number,
  ): void {
    const words = this.#unsigned;
    const at = this.#submissions + this.#entries * SUBMISSION_WORDS;
    words[at] = type | (flags << 8);
    words[at + 1] = slot;
    words[at + 2] = offset % TWO_TO_32;
    words[at + 3] = Math.floor(offset / TWO_TO_32);
    words[at + 4] = length % TWO_TO_32;
    words[at + 5] = Math.floor(length / TWO_TO_32);
    words[at + 6] = arenaOffset;
    this.#entries += 1;
  }

  /** Hands everything added and entered to the queue. False: the disk is closed. */
  kick(): boolean {
    const entries = this.#entries;
    this.#entries = 0;
    return this.#native.kick(entries);
  }

  /** Whether completions are there that were not reaped. */
  get ready(): boolean {
    return (Atomics.load(this.#words, 0) | 0) !== (this.#seen | 0);
  }

  /** Looks at the completions that are there, no native call. Returns how many there were. */
  reap(completed: Completed): number {
    const words = this.#words;
    let count = 0;
    while ((Atomics.load(words, 0) | 0) !== (this.#seen | 0)) {
      const at = this.#completions + ((this.#seen >>> 0) % this.slots) * COMPLETION_WORDS;
      const slot = words[at] as number;
      const ok = words[at + 1] === 0;
      this.#seen = (this.#seen + 1) | 0;
      count += 1;
      completed(slot, ok);
      this.#free[this.#freeCount] = slot;
      this.#freeCount += 1;
    }
    return count;
  }

  /** Why the slot's request failed; valid inside `completed`. */
  error(slot: number): PqblkError {
    return fromNative(this.#native.error(slot));
  }
}
