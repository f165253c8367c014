// Room keys/: secret bytes that wipe themselves and never print.
//
// A Secret owns its buffer. Nothing but `use` hands the bytes out, and every way of turning it into
// text (inspect, JSON, string) yields the same word for all. The buffer is an ArrayBuffer of its own: V8
// keeps small typed arrays on its heap, where the garbage collector moves them and leaves copies
// behind. For the same reason whoever makes secret bytes puts them into a Secret at once (strings
// cannot be wiped at all).
import { randomFillSync, timingSafeEqual } from 'node:crypto';
import { inspect } from 'node:util';
import { PqblkError } from '../errors.js';

const REDACTED = '[secret]';

export class Secret {
  #bytes: Uint8Array | undefined;

  /** Moves `bytes` here: what the caller holds is zeros from now on. */
  constructor(bytes: Uint8Array) {
    this.#bytes = unmovedCopy(bytes);
    bytes.fill(0);
  }

  /** A Secret over a private copy; the caller's bytes stay the caller's to wipe. */
  static copyOf(bytes: Uint8Array): Secret {
    const secret = new Secret(new Uint8Array());
    secret.#bytes = unmovedCopy(bytes);
    return secret;
  }

  /** `length` zero bytes, to be filled in. */
  static zeros(length: number): Secret {
    return new Secret(new Uint8Array(length));
  }

  /** `length` bytes from the system's random source; kind `no_random` if that fails. */
  static random(length: number): Secret {
    return new Secret(randomBytes(length));
  }

  /** Number of bytes; 0 after `wipe`. */
  get length(): number {
    return this.#bytes?.length ?? 0;
  }

  get wiped(): boolean {
    return this.#bytes === undefined;
  }

  /**
   * Calls `fn` with the bytes and returns what it returns. They are valid until `wipe`; `fn` must
   * not keep them. Kind `closed` when the Secret was wiped.
   */
  use<T>(fn: (bytes: Uint8Array) => T): T {
    if (this.#bytes === undefined) throw new PqblkError('closed', 'this secret was wiped already');
    return fn(this.#bytes);
  }

  /** Constant-time comparison (of secrets of equal length; lengths are no secret). */
  equals(other: Secret): boolean {
    return this.use((a) => other.use((b) => a.length === b.length && timingSafeEqual(a, b)));
  }

  /** Overwrites the bytes with zero. Harmless when repeated. */
  wipe(): void {
    this.#bytes?.fill(0);
    this.#bytes = undefined;
  }

  [Symbol.dispose](): void {
    this.wipe();
  }

  toString(): string {
    return REDACTED;
  }

  toJSON(): string {
    return REDACTED;
  }

  [inspect.custom](): string {
    return REDACTED;
  }
}

/** A copy that the garbage collector never moves; its owner wipes it. */
export function unmovedCopy(bytes: Uint8Array): Uint8Array {
  const copy = new Uint8Array(new ArrayBuffer(bytes.length));
  copy.set(bytes);
  return copy;
}

/** Random bytes, nowhere else in memory; kind `no_random` when the source fails. */
export function randomBytes(length: number): Uint8Array {
  try {
    return randomFillSync(new Uint8Array(new ArrayBuffer(length)));
  } catch (cause) {
    throw new PqblkError('no_random', 'the random source of the system failed', { cause });
  }
}
