// Room keys/: small helpers on bytes shared by the codecs. No format knowledge of its own.
import { timingSafeEqual } from 'node:crypto';
import { PqblkError } from '../errors.js';

/** In memory of its own, which V8 does not move: the parts may be secret, and the caller wipes it then. */
export function concat(...parts: Uint8Array[]): Uint8Array {
  const out = new Uint8Array(new ArrayBuffer(parts.reduce((sum, part) => sum + part.length, 0)));
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

/** u32 little-endian length, then the bytes: makes a concatenation of fields unambiguous. */
export function lengthPrefixed(bytes: Uint8Array): Uint8Array {
  return concat(u32(bytes.length), bytes);
}

export function u16(value: number): Uint8Array {
  const out = new Uint8Array(2);
  viewOf(out).setUint16(0, value, true);
  return out;
}

export function u32(value: number): Uint8Array {
  const out = new Uint8Array(4);
  viewOf(out).setUint32(0, value, true);
  return out;
}

export function ascii(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}

/** A DataView over exactly these bytes, wherever they lie in their buffer. */
export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

export function toHex(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('hex');
}

/** The reverse of `toHex`, for text that is known to be hex. */
export function fromHex(text: string): Uint8Array {
  return Uint8Array.from(Buffer.from(text, 'hex'));
}

const ZEROS = new Uint8Array(4096);

export function isZero(bytes: Uint8Array): boolean {
  for (let at = 0; at < bytes.length; at += ZEROS.length) {
    const part = bytes.subarray(at, at + ZEROS.length);
    if (Buffer.compare(part, ZEROS.subarray(0, part.length)) !== 0) return false;
  }
  return true;
}

/** Constant time in the content; an unequal length returns false at once. */
export function equalConstantTime(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && timingSafeEqual(a, b);
}

/** 16 bytes → 8-4-4-4-12 lower-case hex. */
export function formatUuid(uuid: Uint8Array): string {
  if (uuid.length !== 16) {
    throw new PqblkError('invalid_argument', `a UUID has 16 bytes, not ${uuid.length}`);
  }
  return toHex(uuid).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
}

/** The reverse of `formatUuid`; either case, kind `invalid_argument` for anything else. */
export function parseUuid(text: string): Uint8Array {
  if (!/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(text)) {
    throw new PqblkError('invalid_argument', `not a UUID: ${JSON.stringify(text)}`);
  }
  return Uint8Array.from(Buffer.from(text.replaceAll('-', ''), 'hex'));
}
