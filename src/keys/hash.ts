// Room keys/: SHA-3, by OpenSSL: it wipes what it worked with, and needs no warming up.
import { createHash, createHmac } from 'node:crypto';
import { Secret } from './secret.js';

export function sha3_256(...parts: readonly Uint8Array[]): Uint8Array {
  const hash = createHash('sha3-256');
  for (const part of parts) hash.update(part);
  return plain(hash.digest());
}

/** HMAC-SHA3-256 under bytes that the caller wipes. */
export function hmacSha3Of(key: Uint8Array, ...message: readonly Uint8Array[]): Uint8Array {
  const mac = createHmac('sha3-256', key);
  for (const part of message) mac.update(part);
  return plain(mac.digest());
}

/** `length` bytes of SHAKE256. */
export function shake256(secret: Secret, length: number): Secret {
  return new Secret(
    secret.use((bytes) => createHash('shake256', { outputLength: length }).update(bytes).digest()),
  );
}

/** Not a Buffer, whose `slice` is another one. */
const plain = (bytes: Buffer) => new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.length);
