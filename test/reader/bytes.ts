// The second reader: how it reads big-endian fields and how it complains. Knows no structure.
//
// The reader is an oracle: it is written from docs/format.md and docs/keys.md alone and shares no
// line with native/ or src/. Where it and the engine disagree, one of the three is wrong.

/** What did not hold. `sector` and `entry` concern one guest sector, the others the whole image. */
export type Fault =
  | 'io'
  | 'header'
  | 'header-mac'
  | 'regions'
  | 'key-area'
  | 'wrong-key'
  | 'sessions'
  | 'log'
  | 'tables'
  | 'entry'
  | 'sector'
  | 'refcounts';

export class ReaderError extends Error {
  override readonly name = 'ReaderError';
  readonly fault: Fault;

  constructor(fault: Fault, message: string) {
    super(`${fault}: ${message}`);
    this.fault = fault;
  }
}

export function fail(fault: Fault, message: string): never {
  throw new ReaderError(fault, message);
}

export function ensure(holds: boolean, fault: Fault, message: string): asserts holds {
  if (!holds) fail(fault, message);
}

/** Integers above 2^53 - 1 appear in no sane image; they are a fault of the structure they stand in. */
export class Fields {
  readonly bytes: Uint8Array;
  readonly #view: DataView;
  readonly #fault: Fault;

  constructor(bytes: Uint8Array, fault: Fault) {
    this.bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.#fault = fault;
  }

  u8(at: number): number {
    return this.#view.getUint8(at);
  }

  u16(at: number): number {
    return this.#view.getUint16(at);
  }

  u32(at: number): number {
    return this.#view.getUint32(at);
  }

  u64(at: number): number {
    const value = this.#view.getBigUint64(at);
    ensure(
      value <= BigInt(Number.MAX_SAFE_INTEGER),
      this.#fault,
      `absurd number ${value} at ${at}`,
    );
    return Number(value);
  }

  u64big(at: number): bigint {
    return this.#view.getBigUint64(at);
  }

  text(at: number, length: number): string {
    return String.fromCharCode(...this.bytes.subarray(at, at + length));
  }

  slice(at: number, length: number): Uint8Array {
    return this.bytes.slice(at, at + length);
  }

  zero(at: number, length: number, what: string): void {
    ensure(isZero(this.bytes.subarray(at, at + length)), this.#fault, `${what} must be zero`);
  }
}

export function isZero(bytes: Uint8Array): boolean {
  for (let at = 0; at < bytes.length; at += 1) if (bytes[at] !== 0) return false;
  return true;
}

export function same(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, at) => byte === b[at]);
}

export function join(...parts: (Uint8Array | string)[]): Uint8Array {
  const all = parts.map((part) => (typeof part === 'string' ? ascii(part) : part));
  const out = new Uint8Array(all.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of all) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

export function ascii(text: string): Uint8Array {
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0));
}

export function be32(value: number): Uint8Array {
  const out = new Uint8Array(4);
  new DataView(out.buffer).setUint32(0, value);
  return out;
}

export function be64(value: number): Uint8Array {
  const out = new Uint8Array(8);
  new DataView(out.buffer).setBigUint64(0, BigInt(value));
  return out;
}

export function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
