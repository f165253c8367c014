// Key files of keys on tokens: version 2, read strictly; what an older pqblk and an import make of them.
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Kem, KeyStore, liboqs, parseRecipient } from '../../src/keys/index.js';
import { armour, encodeKeyFile, parseKeyFile, type TokenPart } from '../../src/keys/key-file.js';
import { fingerprintOf } from '../../src/keys/ml-kem.js';
import { errorOf, secretOf, temporaryDirectory } from './support.js';

const part: TokenPart = {
  protection: 'token',
  uri: 'pkcs11:token=HSM;id=%01',
  module: '/usr/lib/vendor.so',
  profile: 'pkcs11-3.2',
  login: 'pin',
};

async function keyFile(privatePart: TokenPart = part) {
  const { encapsulationKey } = await liboqs.generate(Kem.mlKem768);
  const fingerprint = fingerprintOf(encapsulationKey);
  const created = '2026-01-01T00:00:00Z';
  return { name: 'vault', kem: Kem.mlKem768, created, encapsulationKey, fingerprint, privatePart };
}

test('what was written is read back, with and without the optional fields', async () => {
  for (const whole of [part, { ...part, directory: '/var/t', pinFile: '/etc/p' }]) {
    const key = await keyFile(whole);
    const text = encodeKeyFile(key);
    expect(JSON.parse(text)).toMatchObject({ version: 2, private: whole });
    expect(parseKeyFile(secretOf(text))).toEqual({
      ...key,
      privatePart: { directory: undefined, pinFile: undefined, ...whole },
    });
  }
});

test('version and place go together', async () => {
  const key = await keyFile();
  const change = (fields: object) =>
    JSON.stringify({ ...(JSON.parse(encodeKeyFile(key)) as object), ...fields });
  expect((await errorOf(() => parseKeyFile(secretOf(change({ version: 1 }))))).kind).toBe(
    'bad_key',
  );
  expect((await errorOf(() => parseKeyFile(secretOf(change({ private: null }))))).kind).toBe(
    'bad_key',
  );
  expect((await errorOf(() => parseKeyFile(secretOf(change({ version: 3 }))))).kind).toBe(
    'newer_version',
  );
});

test.each<[string, object]>([
  ['uri', { uri: 'http://x' }],
  ['uri', { uri: 'pkcs11:token=a b' }],
  ['module', { module: 'vendor.so' }],
  ['module', { module: '/a\nb' }],
  ['profile', { profile: '' }],
  ['login', { login: 'fingerprint' }],
  ['directory', { directory: 'relative' }],
  ['pinFile', { pinFile: 7 }],
])('a damaged %s is named', async (field, change) => {
  const document = JSON.parse(encodeKeyFile(await keyFile())) as { private: object };
  const text = JSON.stringify({ ...document, private: { ...document.private, ...change } });
  const error = await errorOf(() => parseKeyFile(secretOf(text)));
  expect(error.kind).toBe('bad_key');
  expect(error.message).toContain(field);
});

test('a store cannot be talked into loading a module by an import', async () => {
  const store = new KeyStore(join(await temporaryDirectory(), 'keys'));
  const error = await errorOf(async () => store.import(armour(await keyFile())));
  expect(error.kind).toBe('unsupported');
  expect((await store.list()).keys).toEqual([]);
});

test('a disk can be sealed to a token that is not here', async () => {
  const recipient = parseRecipient(armour(await keyFile()));
  expect(recipient).toMatchObject({ kem: Kem.mlKem768, label: 'vault' });
});

test('an entry whose URI or profile was spoilt says which', async () => {
  const store = new KeyStore(join(await temporaryDirectory(), 'keys'));
  const { encapsulationKey } = await keyFile();
  const info = await store.addToken('vault', Kem.mlKem768, encapsulationKey, part);
  const text = await readFile(info.path, 'utf8');
  await writeFile(info.path, text.replace('token=HSM', 'tokens=HSM'));
  expect((await errorOf(() => store.unlock('vault'))).kind).toBe('bad_uri');
  await writeFile(info.path, text.replace('pkcs11-3.2', 'nobody'));
  expect((await errorOf(() => store.unlock('vault'))).kind).toBe('bad_profile');
  await writeFile(info.path, text);
  expect(await errorOf(() => store.unlock('vault'))).toMatchObject({
    kind: 'not_found',
    path: '/usr/lib/vendor.so',
  });
});
