// Room disk/: one promise for each request, over a channel.
//
// Requests made in one turn of the event loop travel together: the first asks for a microtask that
// hands them all over. Beyond the channel's slots they wait here, first come first served.
import { PqblkError } from '../errors.js';
import type { NativeDisk } from '../native.js';
import { Channel } from './channel.js';

const SLOTS = 256;

export type RequestData = Uint8Array | Uint8Array[] | number;

interface Waiting {
  type: number;
  flags: number;
  offset: number;
  data: RequestData;
  resolve: () => void;
  reject: (error: unknown) => void;
}

export function closedError(): PqblkError {
  return new PqblkError('closed', 'the disk is closed');
}

export class Requests {
  readonly #channel: Channel;
  readonly #resolve: (() => void)[] = [];
  readonly #reject: ((error: unknown) => void)[] = [];
  /** Keeps the memory that the engine reads or fills. */
  readonly #data: (RequestData | undefined)[] = [];
  readonly #waiting: Waiting[] = [];
  #waitingHead = 0;
  #kicking = false;
  readonly #kick = () => {
    this.#kicking = false;
    this.#channel.kick();
  };
  readonly #completed = (slot: number, ok: boolean) => {
    this.#data[slot] = undefined;
    if (ok) (this.#resolve[slot] as () => void)();
    else (this.#reject[slot] as (error: unknown) => void)(this.#channel.error(slot));
  };

  constructor(disk: NativeDisk, queue: number) {
    this.#channel = new Channel(disk, { queue, slots: SLOTS, arenaBytes: 0 }, () => {
      this.#channel.reap(this.#completed);
      this.#startWaiting();
    });
  }

  request(type: number, flags: number, offset: number, data: RequestData): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.#channel.full) {
        this.#waiting.push({ type, flags, offset, data, resolve, reject });
      } else {
        this.#start(type, flags, offset, data, resolve, reject);
      }
    });
  }

  #start(
    type: number,
    flags: number,
    offset: number,
    data: RequestData,
    resolve: () => void,
    reject: (error: unknown) => void,
  ): void {
    const slot = this.#channel.take();
    try {
      this.#channel.add(slot, type, flags, offset, data);
    } catch (error) {
      this.#channel.giveBack(slot);
      reject(error);
      return;
    }
    this.#data[slot] = data;
    this.#resolve[slot] = resolve;
    this.#reject[slot] = reject;
    if (!this.#kicking) {
      this.#kicking = true;
      queueMicrotask(this.#kick);
    }
  }

  #startWaiting(): void {
    const waiting = this.#waiting;
    while (this.#waitingHead < waiting.length && !this.#channel.full) {
      const next = waiting[this.#waitingHead] as Waiting;
      this.#waitingHead += 1;
      this.#start(next.type, next.flags, next.offset, next.data, next.resolve, next.reject);
    }
    if (this.#waitingHead === waiting.length) {
      waiting.length = 0;
      this.#waitingHead = 0;
    }
  }

  /** What was added goes to the disk before it closes; what still waits for a slot is refused. */
  close(): void {
    if (this.#kicking) this.#kick();
    const refused = this.#waiting.splice(this.#waitingHead);
    this.#waiting.length = 0;
    this.#waitingHead = 0;
    for (const { reject } of refused) reject(closedError());
  }
}
