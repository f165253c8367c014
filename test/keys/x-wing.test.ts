// X-Wing (draft-connolly-cfrg-xwing-kem): against the draft's test vectors, against a second
// implementation both ways, and what it leaves in the heap of liboqs.
//
// The three vectors of the draft take their seeds from SHAKE128 of nothing, and are told here by the
// SHA3-256 of what they expect. @noble/post-quantum makes the ciphertext for a given randomness, which
// no X-Wing for use offers; it makes the ML-KEM pair from its seed in our implementation as well, so
// that part has the hashes for its only oracle.

import { sha3_256, shake128, shake256 } from '@noble/hashes/sha3.js';
import { ml_kem768_x25519 as oracle } from '@noble/post-quantum/hybrid.js';
import { ml_kem768 } from '@noble/post-quantum/ml-kem.js';
import { describe, expect, test } from 'vitest';
import { createKeyArea, Kem, liboqs, openKeyArea, Secret, toHex } from '../../src/keys/index.js';
import { loadOqsKem } from '../../src/keys/liboqs.js';
import { checkEncapsulationKey, kemParameters } from '../../src/keys/ml-kem.js';
import type { PrivateKey } from '../../src/keys/provider.js';
import { publicHalfOf, selfTestXWing } from '../../src/keys/x-wing.js';
import { errorOf, person } from './support.js';

const bytesOf = (secret: Secret) => secret.use((bytes) => Uint8Array.from(bytes));

const keyOf = (seed: Uint8Array): PrivateKey => ({
  type: 'software',
  kem: Kem.xWing,
  decapsulationKey: Secret.copyOf(seed),
});

/** SHA3-256 of encapsulation key, ciphertext and shared secret of each vector of the draft. */
const VECTORS = [
  [
    '5121745904643ad9dfacca7869292c19a8a69533b53e60666b7db910b4ad6367',
    'c0abd149f83f45324ac3a7ddc7606c71f257e5ea86113522834a0ee1bcb34e3e',
    '7132be3c0b4cc1c587a1778a23051bb24663d07836c4310e1d2cca2af9b9c9e2',
  ],
  [
    '799b6016e5daa56ffa1b5e79f7caf73413ceecd6df428642404cac41ddee4853',
    '7680b7ba47ae09bac4b43001edcef9d98e50df20026e70ba6a424447e1f2b961',
    '4cba9bba0e276ca184f6e9dd7f09a9af6832735e68bcd1dbaa0088bbb7b696d6',
  ],
  [
    '1ef0c99a06026450564957a5402a788feffbbefdcce55d25de254d0a49eb095a',
    '3088688d63201d5d844170b79f148b2791c15f346ff6f8bd559807fbd442f91f',
    '8f34c83b946fa8dcd7f33b16b59f913004c1c792dc44ce8082649dbc69153322',
  ],
] as const;
const SEEDS = shake128(new Uint8Array(0), { dkLen: 96 * VECTORS.length });

test.each(VECTORS)('a vector of the draft', async (...expected) => {
  const at = 96 * VECTORS.findIndex(([key]) => key === expected[0]);
  const key = keyOf(SEEDS.slice(at, at + 32));
  if (key.type !== 'software') throw new Error('not a software key');
  const ek = await publicHalfOf(Kem.xWing, key.decapsulationKey);
  const { cipherText } = oracle.encapsulate(ek, SEEDS.slice(at + 32, at + 96));
  using shared = await liboqs.decapsulate(key, cipherText);
  expect([ek, cipherText, bytesOf(shared)].map((bytes) => toHex(sha3_256(bytes)))).toEqual(
    expected,
  );
});

describe('against @noble/post-quantum', () => {
  test('each opens what the other sealed, to keys that either made', async () => {
    for (let round = 0; round < 5; round += 1) {
      const own = await liboqs.generate(Kem.xWing);
      const theirs = oracle.keygen();
      for (const { ek, key } of [
        { ek: own.encapsulationKey, key: own.privateKey },
        { ek: theirs.publicKey, key: keyOf(theirs.secretKey) },
      ]) {
        if (key.type !== 'software') throw new Error('not a software key');
        const seed = bytesOf(key.decapsulationKey);
        expect(oracle.keygen(seed).publicKey).toEqual(ek);
        const { ciphertext, sharedSecret } = await liboqs.encapsulate(Kem.xWing, ek);
        expect([ek.length, ciphertext.length, sharedSecret.length]).toEqual([1216, 1120, 32]);
        expect(oracle.decapsulate(ciphertext, seed)).toEqual(bytesOf(sharedSecret));
        const sealed = oracle.encapsulate(ek);
        using opened = await liboqs.decapsulate(key, sealed.cipherText);
        expect(bytesOf(opened)).toEqual(sealed.sharedSecret);
      }
    }
  });

  test('a changed ciphertext gives the same wrong secret, whichever half changed', async () => {
    const { encapsulationKey, privateKey } = await liboqs.generate(Kem.xWing);
    if (privateKey.type !== 'software') throw new Error('not a software key');
    const { ciphertext, sharedSecret } = await liboqs.encapsulate(Kem.xWing, encapsulationKey);
    for (const at of [0, 1087, 1088, 1119]) {
      const changed = ciphertext.map((byte, index) => (index === at ? byte ^ 2 : byte));
      using rejected = await liboqs.decapsulate(privateKey, changed);
      expect(rejected.equals(sharedSecret)).toBe(false);
      const seed = bytesOf(privateKey.decapsulationKey);
      expect(bytesOf(rejected)).toEqual(oracle.decapsulate(changed, seed));
    }
  });
});

test('an X25519 half of small order makes its secret zero, and no error', async () => {
  const { encapsulationKey, privateKey } = await liboqs.generate(Kem.xWing);
  if (privateKey.type !== 'software') throw new Error('not a software key');
  for (const point of [0, 1]) {
    const small = Uint8Array.from(encapsulationKey);
    small.fill(0, 1184);
    small[1184] = point;
    const sealed = await liboqs.encapsulate(Kem.xWing, small);
    expect(sealed.sharedSecret.length).toBe(32);
    const { ciphertext } = await liboqs.encapsulate(Kem.xWing, encapsulationKey);
    const degenerate = Uint8Array.from(ciphertext);
    degenerate.fill(0, 1088);
    degenerate[1088] = point;
    using opened = await liboqs.decapsulate(privateKey, degenerate);
    // The draft's combiner, with 32 zeros for ss_X and noble's ML-KEM.
    const seed = shake256(bytesOf(privateKey.decapsulationKey), { dkLen: 96 });
    const { secretKey } = ml_kem768.keygen(seed.subarray(0, 64));
    const inner = ml_kem768.decapsulate(degenerate.slice(0, 1088), secretKey);
    const parts = [inner, new Uint8Array(32), degenerate.slice(1088), encapsulationKey.slice(1184)];
    const label = Uint8Array.of(0x5c, 0x2e, 0x2f, 0x2f, 0x5e, 0x5c);
    expect(bytesOf(opened)).toEqual(sha3_256(Buffer.concat([...parts, label])));
  }
});

test('what is no key, no ciphertext, no working module is refused', async () => {
  const { encapsulationKey, privateKey } = await liboqs.generate(Kem.xWing);
  const kindOf = async (action: () => unknown) => (await errorOf(action)).kind;
  const unreduced = Uint8Array.from(encapsulationKey).fill(0xff, 0, 3);
  expect(await kindOf(() => checkEncapsulationKey(Kem.xWing, unreduced))).toBe('bad_key');
  expect(await kindOf(() => liboqs.encapsulate(Kem.xWing, unreduced))).toBe('bad_key');
  const short = encapsulationKey.subarray(32);
  expect(await kindOf(() => liboqs.encapsulate(Kem.xWing, short))).toBe('bad_key');
  expect(await kindOf(() => liboqs.decapsulate(privateKey, new Uint8Array(1088)))).toBe('corrupt');
  const long = keyOf(new Uint8Array(2400));
  expect(await kindOf(() => liboqs.decapsulate(long, new Uint8Array(1120)))).toBe('bad_key');
  const lying = {
    encapsulate: () => ({ ciphertext: new Uint8Array(1088), sharedSecret: Secret.random(32) }),
    decapsulate: () => Secret.random(32),
  };
  expect(await kindOf(() => selfTestXWing(lying as never))).toBe('integrity');
});

test('opens a key area, beside other KEMs', async () => {
  const [alice, bob] = [await person('alice', Kem.xWing), await person('bob')];
  const recipients = [alice.recipient, bob.recipient];
  const { blob } = await createKeyArea({ volumeUuid: new Uint8Array(16).fill(7), recipients });
  for (const { identity } of [alice, bob]) {
    using opened = await openKeyArea(blob, identity);
    expect(opened.dataKeys.size).toBe(1);
  }
});

test('leaves nothing in the heap of liboqs', async () => {
  const oqs = await loadOqsKem(Kem.mlKem768);
  const { encapsulationKey, privateKey } = await liboqs.generate(Kem.xWing);
  if (privateKey.type !== 'software') throw new Error('not a software key');
  const { ciphertext, sharedSecret } = await liboqs.encapsulate(Kem.xWing, encapsulationKey);
  using opened = await liboqs.decapsulate(privateKey, ciphertext);
  expect(opened.equals(sharedSecret)).toBe(true);
  // The expanded ML-KEM key, as liboqs was given it.
  const seed = shake256(bytesOf(privateKey.decapsulationKey), { dkLen: 96 });
  const { secretKey } = ml_kem768.keygen(seed.subarray(0, 64));
  expect(secretKey.length).toBe(kemParameters(Kem.mlKem768).decapsulationKeyBytes);
  const heap = () => Buffer.from(oqs.heap.buffer, oqs.heap.byteOffset, oqs.heap.byteLength);
  const pieces = [bytesOf(opened), seed, secretKey.subarray(0, 1152), secretKey.subarray(2368)];
  const found = () =>
    pieces.flatMap((piece) =>
      Array.from({ length: piece.length >> 4 }, (_, i) =>
        heap().includes(Buffer.from(piece.subarray(16 * i, 16 * i + 16))),
      ).filter(Boolean),
    ).length;
  expect(found()).toBe(0);
  const before = oqs.heap.slice(-1152);
  oqs.heap.set(secretKey.subarray(0, 1152), oqs.heap.length - 1152); // the scan can fail
  expect(found()).toBe(72);
  oqs.heap.set(before, oqs.heap.length - 1152);
});
