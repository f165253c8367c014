// The fast option of the second reader is a speed switch only: node:crypto and noble must agree, on
// what opens and on what does not; and noble's derivations must be those of OpenSSL.
import { createCipheriv, createHmac, hkdfSync, randomBytes } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { aeadOpen, hkdfSha3, hmacSha3, Suite } from './crypto.js';

const suites = [
  { name: 'aes-256-gcm', suite: Suite.aes256Gcm },
  { name: 'chacha20-poly1305', suite: Suite.chaCha20Poly1305 },
] as const;

describe.each(suites)('$name', ({ name, suite }) => {
  const seal = (plain: Buffer, aad: Buffer) => {
    const [key, nonce] = [randomBytes(32), randomBytes(12)];
    const cipher = createCipheriv(name as 'aes-256-gcm', key, nonce, { authTagLength: 16 });
    cipher.setAAD(aad, { plaintextLength: plain.length });
    const ciphertext = Buffer.concat([cipher.update(plain), cipher.final()]);
    return { key, nonce, ciphertext, tag: cipher.getAuthTag() };
  };

  it.each([0, 1, 4096])('opens %i bytes alike with noble and node:crypto', (length) => {
    const [plain, aad] = [randomBytes(length), randomBytes(36)];
    const { key, nonce, ciphertext, tag } = seal(plain, aad);
    for (const aead of ['noble', 'fast'] as const) {
      const opened = aeadOpen(suite, key, nonce, aad, ciphertext, tag, aead);
      expect(opened && Buffer.from(opened).equals(plain)).toBe(true);
    }
  });

  it('refuses any change alike', () => {
    const [plain, aad] = [randomBytes(4096), randomBytes(36)];
    const { key, nonce, ciphertext, tag } = seal(plain, aad);
    for (const changed of [key, nonce, aad, ciphertext, tag]) {
      changed[3] = (changed[3] ?? 0) ^ 1;
      for (const aead of ['noble', 'fast'] as const) {
        expect(aeadOpen(suite, key, nonce, aad, ciphertext, tag, aead)).toBeUndefined();
      }
      changed[3] = (changed[3] ?? 0) ^ 1;
    }
    expect(aeadOpen(suite, key, nonce, aad, ciphertext, tag)).toBeDefined();
  });
});

it('derives as OpenSSL does', () => {
  for (const length of [0, 16, 32, 135, 136, 137, 300]) {
    const [key, salt, info] = [randomBytes(32), randomBytes(length), randomBytes(40)];
    const expected = Buffer.from(hkdfSync('sha3-256', key, salt, info, 32));
    expect(Buffer.from(hkdfSha3(key, salt, info)).equals(expected)).toBe(true);
    const long = randomBytes(length + 1);
    const mac = createHmac('sha3-256', long).update(info).digest();
    expect(Buffer.from(hmacSha3(long, info)).equals(mac)).toBe(true);
  }
});
