// ML-KEM through liboqs: against a second implementation both ways, against published vectors, and
// for what it leaves in memory.
import { ml_kem768, ml_kem1024 } from '@noble/post-quantum/ml-kem.js';
import { describe, expect, test } from 'vitest';
import { Kem, type KemId, kemParameters, liboqs, Secret } from '../../src/keys/index.js';
import { loadOqsKem } from '../../src/keys/liboqs.js';
import { checkDecapsulationKey, checkEncapsulationKey } from '../../src/keys/ml-kem.js';
import type { PrivateKey } from '../../src/keys/provider.js';
import { errorOf, hex, vectors } from './support.js';

const ORACLE = { [Kem.mlKem768]: ml_kem768, [Kem.mlKem1024]: ml_kem1024 };
const BOTH = [Kem.mlKem768, Kem.mlKem1024] as const;

const softwareKey = (kem: KemId, bytes: Uint8Array): PrivateKey => ({
  type: 'software',
  kem,
  decapsulationKey: Secret.copyOf(bytes),
});

async function generated(kem: KemId) {
  const { encapsulationKey, privateKey } = await liboqs.generate(kem);
  if (privateKey.type !== 'software') throw new Error('not a software key');
  return { ek: encapsulationKey, dk: privateKey.decapsulationKey, privateKey };
}

describe.each(BOTH)('KEM %i against @noble/post-quantum', (kem) => {
  const oracle = ORACLE[kem];

  test('liboqs opens what the oracle sealed, and the other way round', async () => {
    for (let round = 0; round < 10; round += 1) {
      const { ek, dk, privateKey } = await generated(kem);
      const sealed = oracle.encapsulate(ek);
      using opened = await liboqs.decapsulate(privateKey, sealed.cipherText);
      expect(opened.use((bytes) => Uint8Array.from(bytes))).toEqual(sealed.sharedSecret);
      const { ciphertext, sharedSecret } = await liboqs.encapsulate(kem, ek);
      const theirs = dk.use((bytes) => oracle.decapsulate(ciphertext, bytes));
      expect(sharedSecret.use((bytes) => Uint8Array.from(bytes))).toEqual(theirs);
    }
  });

  test('implicit rejection gives the same wrong secret in both', async () => {
    const { ek, dk, privateKey } = await generated(kem);
    const { ciphertext, sharedSecret } = await liboqs.encapsulate(kem, ek);
    ciphertext[17] = (ciphertext[17] ?? 0) ^ 4;
    using rejected = await liboqs.decapsulate(privateKey, ciphertext);
    expect(rejected.equals(sharedSecret)).toBe(false);
    const theirs = dk.use((bytes) => oracle.decapsulate(ciphertext, bytes));
    expect(rejected.use((bytes) => Uint8Array.from(bytes))).toEqual(theirs);
  });

  test('a key made by the oracle from a seed works here', async () => {
    const { publicKey, secretKey } = oracle.keygen(new Uint8Array(64).fill(kem));
    checkEncapsulationKey(kem, publicKey);
    checkDecapsulationKey(kem, secretKey);
    const { ciphertext, sharedSecret } = await liboqs.encapsulate(kem, publicKey);
    using opened = await liboqs.decapsulate(softwareKey(kem, secretKey), ciphertext);
    expect(opened.equals(sharedSecret)).toBe(true);
  });

  test('the FIPS 203 checks refuse what is no key', async () => {
    const { ek, dk } = await generated(kem);
    const refused = async (action: () => unknown, what: RegExp) => {
      const error = await errorOf(action);
      expect(error.kind).toBe('bad_key');
      expect(error.message).toMatch(what);
    };
    const { rank } = kemParameters(kem);
    // The last 12-bit coefficient becomes 3329 = q, one more than the largest that is reduced.
    const unreduced = Uint8Array.from(ek);
    const at = 384 * rank - 2;
    unreduced[at] = ((unreduced[at] ?? 0) & 0x0f) | ((3329 & 0x0f) << 4);
    unreduced[at + 1] = 3329 >> 4;
    await refused(() => liboqs.encapsulate(kem, unreduced), /modulus/);
    unreduced[at] = ((unreduced[at] ?? 0) & 0x0f) | ((3328 & 0x0f) << 4);
    expect(() => checkEncapsulationKey(kem, unreduced)).not.toThrow();
    await refused(() => liboqs.encapsulate(kem, ek.subarray(1)), /bytes, expected/);
    const bytes = dk.use((key) => Uint8Array.from(key));
    await refused(() => checkDecapsulationKey(kem, bytes.subarray(1)), /bytes, expected/);
    const wrongHash = Uint8Array.from(bytes);
    wrongHash[768 * rank + 40] = (wrongHash[768 * rank + 40] ?? 0) ^ 1;
    await refused(() => checkDecapsulationKey(kem, wrongHash), /hash/);
    const wrongVector = Uint8Array.from(bytes).fill(0xff, 0, 3);
    await refused(() => checkDecapsulationKey(kem, wrongVector), /modulus/);
    const ciphertext = new Uint8Array(kemParameters(kem).ciphertextBytes);
    const short = softwareKey(kem, new Uint8Array(5));
    await refused(() => liboqs.decapsulate(short, ciphertext), /5 bytes, expected/);
  });

  test('a ciphertext of the wrong length is refused by name', async () => {
    const { privateKey } = await generated(kem);
    const error = await errorOf(() => liboqs.decapsulate(privateKey, new Uint8Array(100)));
    expect(error.kind).toBe('corrupt');
  });

  test('self-test and description', async () => {
    await liboqs.selfTest(kem);
    const description = await liboqs.describe();
    expect(description).toMatchObject({ name: 'liboqs', hardware: false });
    expect(description.kems).toContain(kem);
  });
});

// ---- residue -----------------------------------------------------------------------------------

/** Every aligned 16-byte piece of a secret, and of its polynomials as 16-bit numbers. */
function piecesOf(secret: Uint8Array, vectorBytes: number): Buffer[] {
  const unpacked = new Int16Array((vectorBytes / 3) * 2);
  for (let i = 0; i < vectorBytes / 3; i += 1) {
    const [a = 0, b = 0, c = 0] = secret.subarray(3 * i, 3 * i + 3);
    unpacked[2 * i] = a | ((b & 15) << 8);
    unpacked[2 * i + 1] = (b >> 4) | (c << 4);
  }
  const pieces: Buffer[] = [];
  for (const bytes of [Buffer.from(secret), Buffer.from(unpacked.buffer)]) {
    for (let at = 0; at + 16 <= bytes.length; at += 16) pieces.push(bytes.subarray(at, at + 16));
  }
  return pieces;
}

describe.each(BOTH)('KEM %i leaves nothing in the heap of liboqs', (kem) => {
  test('after generate, encapsulate and decapsulate', async () => {
    const oqs = await loadOqsKem(kem);
    const found = (pieces: Buffer[]) => {
      const heap = Buffer.from(oqs.heap.buffer, oqs.heap.byteOffset, oqs.heap.byteLength);
      return pieces.filter((piece) => heap.includes(piece)).length;
    };
    const { rank } = kemParameters(kem);
    const { ek, dk, privateKey } = await generated(kem);
    const { ciphertext, sharedSecret } = await liboqs.encapsulate(kem, ek);
    using opened = await liboqs.decapsulate(privateKey, ciphertext);
    expect(opened.equals(sharedSecret)).toBe(true);
    // In an expanded key the middle part is the public key; s and z are the secret ones.
    const s = dk.use((bytes) => bytes.slice(0, 384 * rank));
    const z = dk.use((bytes) => bytes.slice(bytes.length - 32));
    const pieces = [
      ...piecesOf(s, s.length),
      ...piecesOf(z, 0),
      ...opened.use((bytes) => piecesOf(bytes, 0)),
    ];
    expect(pieces.length).toBeGreaterThan(70);
    expect(found(pieces)).toBe(0);
    // The scan can fail: the same bytes, once on the heap, are all found.
    const heap = oqs.heap;
    const at = heap.length - s.length;
    const before = heap.slice(at);
    heap.set(s, at);
    expect(found(piecesOf(s, 0))).toBe(piecesOf(s, 0).length);
    heap.set(before, at);
  });

  test('not even when liboqs refuses a key', async () => {
    const oqs = await loadOqsKem(kem);
    const { ek, dk } = await generated(kem);
    const { ciphertext } = await liboqs.encapsulate(kem, ek);
    const { rank } = kemParameters(kem);
    const broken = dk.use((bytes) => Uint8Array.from(bytes));
    broken[768 * rank + 32] = (broken[768 * rank + 32] ?? 0) ^ 1; // the hash of the public key
    const error = await errorOf(() => liboqs.decapsulate(softwareKey(kem, broken), ciphertext));
    expect(error.kind).toBe('bad_key');
    const heap = Buffer.from(oqs.heap);
    for (const piece of piecesOf(broken.slice(0, 384 * rank), 0)) {
      expect(heap.includes(piece)).toBe(false);
    }
  });
});

// ---- published vectors -------------------------------------------------------------------------

interface KemTest {
  tcId: number;
  seed: string;
  ek?: string;
  c: string;
  K: string;
  result: 'valid' | 'invalid';
}

const kemVectors = vectors<KemTest>('mlkem_768_test.json');
test.skipIf(!kemVectors)('vectors: ML-KEM-768 decapsulation, with keys from seeds', async () => {
  const count = { valid: 0, invalid: 0 };
  for (const { tests } of kemVectors?.testGroups ?? []) {
    for (const vector of tests) {
      count[vector.result] += 1;
      const refusal = await decapsulateVector(vector);
      if (vector.result === 'valid') expect(refusal, `tcId ${vector.tcId}`).toBeUndefined();
      else expect(refusal, `tcId ${vector.tcId}`).toBeDefined();
    }
  }
  expect(count.valid + count.invalid).toBe(kemVectors?.numberOfTests);
  expect(count.valid).toBeGreaterThan(100);
  expect(count.invalid).toBeGreaterThan(10);
});

/** What is wrong with a vector, or undefined when it comes out as it says. */
async function decapsulateVector(vector: KemTest): Promise<string | undefined> {
  try {
    const { publicKey, secretKey } = ml_kem768.keygen(hex(vector.seed));
    if (vector.ek !== undefined && vector.ek !== Buffer.from(publicKey).toString('hex')) {
      return 'another key';
    }
    const key = softwareKey(Kem.mlKem768, secretKey);
    const secret = await liboqs.decapsulate(key, hex(vector.c));
    const ours = secret.use((bytes) => Buffer.from(bytes).toString('hex'));
    return ours === vector.K ? undefined : 'another secret';
  } catch (error) {
    return String(error);
  }
}

interface KeygenTest {
  tcId: number;
  seed: string;
  ek: string;
  dk: string;
}

const keygenVectors = vectors<KeygenTest>('mlkem_768_keygen_seed_test.json');
test.skipIf(!keygenVectors)('vectors: ML-KEM-768 keys pass the checks and work', async () => {
  let count = 0;
  for (const { tests } of keygenVectors?.testGroups ?? []) {
    for (const vector of tests) {
      const [ek, dk] = [hex(vector.ek), hex(vector.dk)];
      checkEncapsulationKey(Kem.mlKem768, ek);
      checkDecapsulationKey(Kem.mlKem768, dk);
      const { ciphertext, sharedSecret } = await liboqs.encapsulate(Kem.mlKem768, ek);
      using opened = await liboqs.decapsulate(softwareKey(Kem.mlKem768, dk), ciphertext);
      expect(opened.equals(sharedSecret), `tcId ${vector.tcId}`).toBe(true);
      count += 1;
    }
  }
  expect(count).toBe(keygenVectors?.numberOfTests);
});

interface DecapsTest {
  tcId: number;
  dk: string;
  c: string;
  K?: string;
  result: 'valid' | 'invalid';
}

const decapsVectors = vectors<DecapsTest>('mlkem_768_semi_expanded_decaps_test.json');
test.skipIf(!decapsVectors)('vectors: ML-KEM-768 decapsulation with given keys', async () => {
  let count = 0;
  for (const { tests } of decapsVectors?.testGroups ?? []) {
    for (const vector of tests) {
      count += 1;
      const attempt = async () => {
        checkDecapsulationKey(Kem.mlKem768, hex(vector.dk));
        return await liboqs.decapsulate(softwareKey(Kem.mlKem768, hex(vector.dk)), hex(vector.c));
      };
      if (vector.result === 'invalid') {
        expect(['bad_key', 'corrupt']).toContain((await errorOf(attempt)).kind);
      } else {
        using secret = await attempt();
        const ours = secret.use((bytes) => Buffer.from(bytes).toString('hex'));
        expect(ours, `tcId ${vector.tcId}`).toBe(vector.K);
      }
    }
  }
  expect(count).toBe(decapsVectors?.numberOfTests);
});
