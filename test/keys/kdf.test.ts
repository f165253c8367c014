// The key schedule against OpenSSL (node:crypto), written here a second time from docs/keys.md.
import {
  createCipheriv,
  createDecipheriv,
  createHash,
  createHmac,
  hkdfSync,
  randomBytes,
} from 'node:crypto';
import { expect, test } from 'vitest';
import { Secret } from '../../src/keys/index.js';
import {
  deriveMasterKeys,
  deriveSlotKeys,
  gcmOpen,
  gcmSeal,
  hkdfExpand,
  hkdfExtract,
  hmacSha3,
} from '../../src/keys/kdf.js';
import { requirePrimitives } from '../../src/keys/self-test.js';
import { hex, vectors } from './support.js';

const sha3 = (bytes: Uint8Array) => createHash('sha3-256').update(bytes).digest();
const hexOf = (secret: Secret) => secret.use((bytes) => Buffer.from(bytes).toString('hex'));
const hkdf = (key: Uint8Array, salt: Uint8Array, info: Uint8Array, length = 32) =>
  Buffer.from(hkdfSync('sha3-256', key, salt, info, length)).toString('hex');

function lp(bytes: Uint8Array): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32LE(bytes.length);
  return Buffer.concat([length, bytes]);
}

test('HKDF and HMAC agree with OpenSSL over lengths', () => {
  for (let length = 0; length < 300; length += 7) {
    const [key, salt, info] = [randomBytes(length + 1), randomBytes(32), randomBytes(length)];
    using prk = hkdfExtract(salt, key);
    using okm = hkdfExpand(prk, info, length + 1);
    expect(hexOf(okm)).toBe(hkdf(key, salt, info, length + 1));
    using secret = Secret.copyOf(key);
    const ours = Buffer.from(hmacSha3(secret, info, salt)).toString('hex');
    expect(ours).toBe(createHmac('sha3-256', key).update(info).update(salt).digest('hex'));
  }
});

test('AES-256-GCM agrees with OpenSSL and refuses every changed byte', () => {
  using key = Secret.random(32);
  const [nonce, aad, plain] = [randomBytes(12), randomBytes(77), randomBytes(40)];
  const sealed = gcmSeal(key, nonce, aad, plain);
  const cipher = key.use((bytes) => createCipheriv('aes-256-gcm', bytes, nonce)).setAAD(aad);
  const theirs = Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
  expect(Buffer.from(sealed)).toEqual(theirs);
  const decipher = key.use((bytes) => createDecipheriv('aes-256-gcm', bytes, nonce)).setAAD(aad);
  decipher.setAuthTag(sealed.subarray(40));
  expect(Buffer.concat([decipher.update(sealed.subarray(0, 40)), decipher.final()])).toEqual(plain);
  for (let at = 0; at < sealed.length; at += 1) {
    const changed = sealed.map((byte, index) => (index === at ? byte ^ 0x80 : byte));
    expect(gcmOpen(key, nonce, aad, changed)).toBeUndefined();
  }
  expect(gcmOpen(key, nonce, aad.subarray(1), sealed)).toBeUndefined();
});

test('KEK and commitment are those of the format', () => {
  const shared = randomBytes(32);
  const slot = {
    kem: 1,
    kdf: 1,
    aead: 1,
    volumeUuid: randomBytes(16),
    slotId: randomBytes(16),
    encapsulationKey: randomBytes(1184),
    ciphertext: randomBytes(1088),
  };
  using secret = Secret.copyOf(shared);
  const { kek, commitment } = deriveSlotKeys(secret, slot);
  const context = Buffer.concat([
    lp(slot.volumeUuid),
    lp(slot.slotId),
    lp(sha3(slot.encapsulationKey)),
    lp(sha3(slot.ciphertext)),
  ]);
  const salt = sha3(Buffer.concat([Buffer.from('pqblk/v1'), Buffer.from([1, 0, 1, 0, 1, 0])]));
  const info = (label: string) => Buffer.concat([Buffer.from(label), context]);
  expect(hexOf(kek)).toBe(hkdf(shared, salt, info('pqblk/v1 kek')));
  expect(hexOf(commitment)).toBe(hkdf(shared, salt, info('pqblk/v1 commit')));
});

test('what hangs on the master key is that of the format', () => {
  const [vmk, uuid] = [randomBytes(32), randomBytes(16)];
  using secret = Secret.copyOf(vmk);
  using master = deriveMasterKeys(secret, uuid);
  const expected = (label: string) =>
    hkdf(vmk, sha3(Buffer.from('pqblk/v1 vmk')), Buffer.concat([Buffer.from(label), lp(uuid)]));
  expect(hexOf(master.wrap)).toBe(expected('pqblk/v1 wrap'));
  expect(hexOf(master.mac)).toBe(expected('pqblk/v1 key area mac'));
  expect(Buffer.from(master.vmkCheck).toString('hex')).toBe(expected('pqblk/v1 vmk check'));
});

test('the self-test of the primitives passes', () => {
  expect(requirePrimitives).not.toThrow();
});

interface MacTest {
  tcId: number;
  key: string;
  msg: string;
  tag: string;
  result: 'valid' | 'invalid';
}

const macVectors = vectors<MacTest>('hmac_sha3_256_test.json');
test.skipIf(!macVectors)('vectors: HMAC-SHA3-256', () => {
  let count = 0;
  for (const { tests, tagSize = 0 } of macVectors?.testGroups ?? []) {
    for (const vector of tests) {
      using key = new Secret(hex(vector.key));
      const tag = Buffer.from(hmacSha3(key, hex(vector.msg)).subarray(0, tagSize / 8));
      const holds = tag.toString('hex') === vector.tag;
      expect(holds, `tcId ${vector.tcId}`).toBe(vector.result === 'valid');
      count += 1;
    }
  }
  expect(count).toBe(macVectors?.numberOfTests);
});
