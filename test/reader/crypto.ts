// The second reader: the primitives, from @noble, and the key derivations of docs/format.md section 2.
//
// noble's AES-GCM opens some 5,000 sectors a second. `fast` lets node:crypto open them instead, sixty
// times as fast; it is a speed switch and nothing else (crypto.test.ts shows that both agree), and
// every MAC and derivation stays with noble.
import { createDecipheriv } from 'node:crypto';
import { gcm } from '@noble/ciphers/aes.js';
import { chacha20poly1305 } from '@noble/ciphers/chacha.js';
import { hkdf } from '@noble/hashes/hkdf.js';
import { hmac } from '@noble/hashes/hmac.js';
import { sha3_256 } from '@noble/hashes/sha3.js';
import { be32, join } from './bytes.js';

export { sha3_256 };

/** Numbers of section 1, offset 8. */
export const Suite = { aes256Gcm: 1, chaCha20Poly1305: 2 } as const;
export type SuiteId = (typeof Suite)[keyof typeof Suite];

export type Aead = 'noble' | 'fast';

export function hmacSha3(key: Uint8Array, message: Uint8Array): Uint8Array {
  return hmac(sha3_256, key, message);
}

export function hkdfSha3(key: Uint8Array, salt: Uint8Array, info: Uint8Array): Uint8Array {
  return hkdf(sha3_256, key, salt, info, 32);
}

/** The plaintext, or undefined when the tag does not hold. */
export function aeadOpen(
  suite: SuiteId,
  key: Uint8Array,
  nonce: Uint8Array,
  aad: Uint8Array,
  ciphertext: Uint8Array,
  tag: Uint8Array,
  aead: Aead = 'noble',
): Uint8Array | undefined {
  const open = aead === 'fast' ? openFast : openNoble;
  try {
    return open(suite, key, nonce, aad, ciphertext, tag);
  } catch {
    return undefined; // both libraries throw for a tag that does not hold; sizes are constants here
  }
}

type Open = (
  suite: SuiteId,
  key: Uint8Array,
  nonce: Uint8Array,
  aad: Uint8Array,
  ciphertext: Uint8Array,
  tag: Uint8Array,
) => Uint8Array;

const openNoble: Open = (suite, key, nonce, aad, ciphertext, tag) => {
  const cipher = suite === Suite.aes256Gcm ? gcm : chacha20poly1305;
  const sealed = new Uint8Array(ciphertext.length + tag.length);
  sealed.set(ciphertext);
  sealed.set(tag, ciphertext.length);
  return cipher(key, nonce, aad).decrypt(sealed);
};

const openFast: Open = (suite, key, nonce, aad, ciphertext, tag) => {
  const options = { authTagLength: 16 };
  const cipher =
    suite === Suite.aes256Gcm
      ? createDecipheriv('aes-256-gcm', key, nonce, options)
      : createDecipheriv('chacha20-poly1305', key, nonce, options);
  cipher.setAAD(aad, { plaintextLength: ciphertext.length });
  cipher.setAuthTag(tag);
  const plaintext = cipher.update(ciphertext);
  cipher.final();
  return plaintext;
};

/** K_header, K_sessions and K_loghead. */
export interface MacKeys {
  readonly header: Uint8Array;
  readonly sessions: Uint8Array;
  readonly logHead: Uint8Array;
}

export function deriveMacKeys(integrityKey: Uint8Array, uuid: Uint8Array): MacKeys {
  const derive = (label: string) => hkdfSha3(integrityKey, uuid, join(label));
  return {
    header: derive('pqblk/v1 header mac'),
    sessions: derive('pqblk/v1 session mac'),
    logHead: derive('pqblk/v1 log header mac'),
  };
}

/** K_sector or K_log of one session. */
export function deriveSessionKey(
  use: 'sector' | 'log',
  dataKey: Uint8Array,
  salt: Uint8Array,
  uuid: Uint8Array,
  sessionId: number,
  suite: SuiteId,
): Uint8Array {
  const info = join(`pqblk/v1 ${use}`, uuid, be32(sessionId), Uint8Array.of(suite));
  return hkdfSha3(dataKey, salt, info);
}
