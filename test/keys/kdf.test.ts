// The key schedule against @noble/hashes and @noble/ciphers, written here a second time from
// docs/keys.md.
import { randomBytes } from 'node:crypto';
import { gcm } from '@noble/ciphers/aes.js';
import { hkdf as nobleHkdf } from '@noble/hashes/hkdf.js';
import { hmac as nobleHmac } from '@noble/hashes/hmac.js';
import { shake256 as nobleShake256, sha3_256 } from '@noble/hashes/sha3.js';
import { expect, test } from 'vitest';
import { sha3_256 as hashOf, shake256 } from '../../src/keys/hash.js';
import { Secret, toHex } from '../../src/keys/index.js';
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

const sha3 = (bytes: Uint8Array) => sha3_256(bytes);
const hexOf = (secret: Secret) => secret.use((bytes) => Buffer.from(bytes).toString('hex'));
const hkdf = (key: Uint8Array, salt: Uint8Array, info: Uint8Array, length = 32) =>
  Buffer.from(nobleHkdf(sha3_256, key, salt, info, length)).toString('hex');

function lp(bytes: Uint8Array): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32LE(bytes.length);
  return Buffer.concat([length, bytes]);
}

test('HKDF, HMAC, SHA3-256 and SHAKE256 agree with noble over lengths', () => {
  for (let length = 0; length < 300; length += 7) {
    const [key, salt, info] = [randomBytes(length + 1), randomBytes(32), randomBytes(length)];
    using prk = hkdfExtract(salt, key);
    using okm = hkdfExpand(prk, info, length + 1);
    expect(hexOf(okm)).toBe(hkdf(key, salt, info, length + 1));
    using secret = Secret.copyOf(key);
    const ours = Buffer.from(hmacSha3(secret, info, salt)).toString('hex');
    const theirs = nobleHmac(sha3_256, key, Buffer.concat([info, salt]));
    expect(ours).toBe(Buffer.from(theirs).toString('hex'));
    expect(toHex(hashOf(info, salt))).toBe(toHex(sha3(Buffer.concat([info, salt]))));
    using stretched = shake256(secret, length + 1);
    expect(hexOf(stretched)).toBe(toHex(nobleShake256(key, { dkLen: length + 1 })));
  }
});

test('AES-256-GCM agrees with noble and refuses every changed byte', () => {
  using key = Secret.random(32);
  const [nonce, aad, plain] = [randomBytes(12), randomBytes(77), randomBytes(40)];
  const sealed = gcmSeal(key, nonce, aad, plain);
  const theirs = key.use((bytes) => gcm(bytes, nonce, aad).encrypt(plain));
  expect(toHex(sealed)).toBe(toHex(theirs));
  using opened = gcmOpen(key, nonce, aad, sealed);
  expect(opened && hexOf(opened)).toBe(toHex(plain));
  for (let length = 0; length < 40; length += 1) {
    expect(gcmOpen(key, nonce, aad, sealed.subarray(0, length))).toBeUndefined();
  }
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
