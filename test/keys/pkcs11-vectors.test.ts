// Published vectors of ML-KEM-768 through tokens that take private keys: NSS's softokn by seed and by
// expanded key, our own by expanded key.
import { beforeAll, describe, expect, test } from 'vitest';
import { PqblkError } from '../../src/errors.js';
import { Kem, TokenModule } from '../../src/keys/index.js';
import type { AttributeValue } from '../../src/keys/pkcs11/wire.js';
import { freshNss, haveNss, PIN, TestToken } from './pkcs11-support.js';
import { hex, secretOf, vectors } from './support.js';

interface Vector {
  tcId: number;
  seed?: string;
  dk?: string;
  c: string;
  K?: string;
  result: 'valid' | 'invalid';
}

const bySeed = vectors<Vector>('mlkem_768_test.json');
const byKey = vectors<Vector>('mlkem_768_semi_expanded_decaps_test.json');

const CKA = { class: 0, token: 1, private: 2, value: 0x11, keyType: 0x100, sensitive: 0x103 };
const CKA_3_2 = { extractable: 0x162, parameterSet: 0x61d, decapsulate: 0x634, seed: 0x637 };

function ulong(value: number): Uint8Array {
  const bytes = new Uint8Array(8);
  new DataView(bytes.buffer).setUint32(0, value, true);
  return bytes;
}

/** A private key as an object of the session, in the standard's template. */
const standard = (key: AttributeValue): AttributeValue[] => [
  { type: CKA.class, value: ulong(3) },
  { type: CKA.keyType, value: ulong(0x49) },
  { type: CKA.token, value: Uint8Array.of(0) },
  { type: CKA.private, value: Uint8Array.of(1) },
  { type: CKA.sensitive, value: Uint8Array.of(1) },
  { type: CKA_3_2.extractable, value: Uint8Array.of(0) },
  { type: CKA_3_2.parameterSet, value: ulong(2) },
  { type: CKA_3_2.decapsulate, value: Uint8Array.of(1) },
  key,
];

const vendor = (key: AttributeValue): AttributeValue[] => [
  { type: CKA.keyType, value: ulong(0x80000002) },
  key,
];

/** The secret that the token finds in a vector, in hex; undefined when it refuses. */
async function secretIn(
  module: TokenModule,
  template: (key: AttributeValue) => AttributeValue[],
  { seed, dk, c }: Vector,
): Promise<string | undefined> {
  const key =
    seed === undefined
      ? { type: CKA.value, value: hex(dk ?? '') }
      : { type: CKA_3_2.seed, value: hex(seed) };
  try {
    const handle = await module.create(template(key));
    const none = new Uint8Array();
    const imported = { handle, kem: Kem.mlKem768, label: '', id: none, confined: true };
    try {
      using shared = await module.decapsulate({ ...imported, encapsulationKey: none }, hex(c));
      return shared.use((bytes) => Buffer.from(bytes).toString('hex'));
    } finally {
      await module.destroy(handle);
    }
  } catch (error) {
    if (error instanceof PqblkError && error.kind !== 'token_crashed') return undefined;
    throw error;
  }
}

async function check(
  module: TokenModule,
  template: (key: AttributeValue) => AttributeValue[],
  file: typeof bySeed,
): Promise<void> {
  let valid = 0;
  for (const vector of file?.testGroups.flatMap(({ tests }) => tests) ?? []) {
    const found = await secretIn(module, template, vector);
    if (vector.result === 'valid') expect(found, `tcId ${vector.tcId}`).toBe(vector.K);
    else if (found !== undefined) expect(found, `tcId ${vector.tcId}`).not.toBe(vector.K);
    valid += vector.result === 'valid' ? 1 : 0;
  }
  expect(valid).toBeGreaterThan(0);
}

describe.runIf(haveNss() && bySeed && byKey)('NSS softokn', () => {
  let module: TokenModule;
  beforeAll(async () => {
    const { place, uri } = await freshNss();
    module = await TokenModule.load(place);
    await module.logIn(await module.find(uri), secretOf(PIN), { readWrite: true });
    return () => module.end();
  });

  test('keys from seeds', () => check(module, standard, bySeed));
  test('expanded keys', () => check(module, standard, byKey));
});

test.runIf(byKey)('the token of the tests: expanded keys', async () => {
  const token = new TestToken();
  await token.init();
  using module = await token.opened();
  await check(module, vendor, byKey);
});
