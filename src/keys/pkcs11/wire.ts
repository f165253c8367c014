// Room keys/pkcs11: the bytes of messages to and from the token process.
//
// native/pkcs11/protocol.h is the other end and tells the layout. Messages may hold a PIN or a
// shared secret: they are built in memory that the collector does not move, and wiped by whoever
// sent or parsed them. The token process runs foreign code, so the reader believes nothing.
import { PqblkError } from '../../errors.js';
import { viewOf } from '../bytes.js';
import { Secret } from '../secret.js';

export const MESSAGE_BYTES_MAX = 32_768;

/** In the order of native/pkcs11/protocol.h. */
export const Operation = {
  load: 1,
  describeSlot: 2,
  describeMechanism: 3,
  open: 4,
  login: 5,
  initPin: 6,
  find: 7,
  getAttributes: 8,
  generate: 9,
  decapsulate: 10,
  create: 11,
  destroy: 12,
  close: 13,
} as const;
export type OperationId = (typeof Operation)[keyof typeof Operation];

export const Style = { encapsulate: 0, derive: 1, decrypt: 2 } as const;
export type StyleName = keyof typeof Style;

export interface AttributeValue {
  readonly type: number;
  readonly value: Uint8Array | Secret;
}

const encoder = new TextEncoder();

/** Builds one request; `wipe` it once it was sent. */
export class MessageWriter {
  readonly #bytes = new Uint8Array(new ArrayBuffer(MESSAGE_BYTES_MAX + 4));
  readonly #view = viewOf(this.#bytes);
  #used = 4;

  constructor(operation: OperationId) {
    this.u8(operation);
  }

  /** The message behind its length: what goes over the wire. */
  finish(): Uint8Array {
    this.#view.setUint32(0, this.#used - 4, true);
    return this.#bytes.subarray(0, this.#used);
  }

  wipe(): void {
    this.#bytes.fill(0);
  }

  u8(value: number | boolean): this {
    this.#view.setUint8(this.#take(1), Number(value));
    return this;
  }

  u32(value: number): this {
    this.#view.setUint32(this.#take(4), value, true);
    return this;
  }

  u64(value: number | bigint): this {
    this.#view.setBigUint64(this.#take(8), BigInt(value), true);
    return this;
  }

  bytes(value: Uint8Array | Secret): this {
    if (value instanceof Secret) return value.use((bytes) => this.bytes(bytes));
    this.u32(value.length);
    this.#bytes.set(value, this.#take(value.length));
    return this;
  }

  text(value: string): this {
    return this.bytes(encoder.encode(value));
  }

  attributes(list: readonly AttributeValue[]): this {
    this.u32(list.length);
    for (const { type, value } of list) this.u64(type).bytes(value);
    return this;
  }

  #take(count: number): number {
    const at = this.#used;
    if (at + count > this.#bytes.length) {
      throw new PqblkError('invalid_argument', 'too long for a message to a token');
    }
    this.#used = at + count;
    return at;
  }
}

/** Reads one reply. What does not fit is kind `token_crashed`: the process is out of its mind. */
export class MessageReader {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  #at = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.#view = viewOf(bytes);
  }

  u8(): number {
    return this.#view.getUint8(this.#take(1));
  }

  u32(): number {
    return this.#view.getUint32(this.#take(4), true);
  }

  u64(): bigint {
    return this.#view.getBigUint64(this.#take(8), true);
  }

  /** A view into the message, which is wiped when its reader returns. */
  bytes(): Uint8Array {
    const count = this.u32();
    const at = this.#take(count);
    return this.#bytes.subarray(at, at + count);
  }

  copy(): Uint8Array {
    return Uint8Array.from(this.bytes());
  }

  /** Text of a module: what is no UTF-8 or would disturb a terminal is replaced. */
  text(): string {
    return printable(new TextDecoder().decode(this.bytes()));
  }

  end(): void {
    if (this.#at !== this.#bytes.length) throw mangled();
  }

  #take(count: number): number {
    const at = this.#at;
    if (count > this.#bytes.length - at) throw mangled();
    this.#at = at + count;
    return at;
  }
}

function mangled(): PqblkError {
  return new PqblkError('token_crashed', 'the token process answers with a mangled message');
}

/** `text` without characters that could rewrite a terminal line or reverse its reading order. */
export function printable(text: string): string {
  return text.replace(/[\p{Cc}\p{Zl}\p{Zp}\u202a-\u202e\u2066-\u2069]/gu, '\ufffd');
}
