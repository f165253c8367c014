// Room keys/: proves once per process that the primitives compute what they should, before any key.
//
// A broken primitive would seal disks that nothing else can open, so key areas are neither made nor
// opened until known answers came out right. It also runs the code warm: the first unlock after it
// is as fast as the next. The answers below were computed with OpenSSL, not with the library
// tested.
import { PqblkError } from '../errors.js';
import { toHex } from './bytes.js';
import { gcmOpen, gcmSeal, hkdfExpand, hkdfExtract, hmacSha3 } from './kdf.js';
import { Secret } from './secret.js';

/** Byte i is 7i + floor(i / 256), modulo 256. */
function pattern(length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (i * 7 + (i >> 8)) & 0xff);
}

const KNOWN = {
  // HMAC-SHA3-256, key of 32 bytes, message of 8192: what a key area with one slot takes
  hmac: 'a4cc00beb70a66ce3c5cefcc1b7ba12e46ab5ae44c43c25bdf15524763fe8138',
  // HKDF-SHA3-256, key material of 80 bytes, salt of 16, info of 10, 42 bytes out (RFC 5869)
  hkdf: 'cea6e350d74a3b2b17d89847f02e46a82f74e88ddf24c87e4eab8ae06654e78087f4d03d235d9a50a0f5',
  // AES-256-GCM, key of 32 bytes, nonce of 12, AAD of 4036, plaintext of 32: ciphertext, tag
  gcm:
    'ed8cce9c610bdcaf2af37c078097f6087386b25e1716f4da0ff45eaa4f1061aa' +
    '646c6c7b2417bd05dac189fbead02304',
} as const;

let passed = false;

/** Kind `integrity` when a primitive gives a wrong answer. Runs once per process. */
export function requirePrimitives(): void {
  if (passed) return;
  using key = new Secret(pattern(32));
  const message = pattern(8192);
  const parts = Array.from({ length: 64 }, (_, i) => message.subarray(i * 128, (i + 1) * 128));
  require('HMAC-SHA3-256', toHex(hmacSha3(key, ...parts)) === KNOWN.hmac);
  require('HMAC-SHA3-256', toHex(hmacSha3(key, message)) === KNOWN.hmac);
  using prk = hkdfExtract(pattern(16), pattern(80));
  using okm = hkdfExpand(prk, pattern(10), 42);
  require('HKDF-SHA3-256', okm.use(toHex) === KNOWN.hkdf);
  const [nonce, aad] = [pattern(12), pattern(4036)];
  const sealed = gcmSeal(key, nonce, aad, pattern(32));
  require('AES-256-GCM', toHex(sealed) === KNOWN.gcm);
  using opened = gcmOpen(key, nonce, aad, sealed);
  sealed[0] = (sealed[0] ?? 0) ^ 1;
  using forged = gcmOpen(key, nonce, aad, sealed);
  require('AES-256-GCM', opened?.use(toHex) === toHex(pattern(32)) && forged === undefined);
  passed = true;
}

function require(primitive: string, holds: boolean): void {
  if (!holds) throw new PqblkError('integrity', `${primitive} fails its self-test`);
}
