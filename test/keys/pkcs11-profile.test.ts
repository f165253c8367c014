// Profiles: the shipped ones, a user's own, and every way to get one wrong.
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { Kem, loadProfile, PROFILES, parseProfile } from '../../src/keys/index.js';
import { errorOf, temporaryDirectory } from './support.js';

const good = () => structuredClone(PROFILES.quac100) as Record<string, unknown>;

describe('shipped', () => {
  test.each(Object.keys(PROFILES))('%s is in order and bears its name', async (name) => {
    const profile = await loadProfile(name);
    expect(profile.name).toBe(name);
    expect([...profile.kems.keys()]).toEqual([Kem.mlKem768, Kem.mlKem1024]);
  });

  test('the numbers of the standard and of the vendor', async () => {
    const standard = await loadProfile('pkcs11-3.2');
    expect(standard.kems.get(Kem.mlKem1024)).toEqual({
      keyType: 0x49,
      parameterSet: 3,
      generate: 0x0f,
      decapsulate: 0x17,
    });
    const quac = await loadProfile('quac100');
    expect(quac.style).toBe('derive');
    expect(quac.kems.get(Kem.mlKem768)).toEqual({
      keyType: 0x80000002,
      generate: 0x80000002,
      decapsulate: 0x80000008,
    });
  });
});

test('a profile in a file', async () => {
  const path = join(await temporaryDirectory(), 'own.json');
  await writeFile(path, JSON.stringify({ ...good(), name: 'own', timeoutSeconds: 5 }));
  expect(await loadProfile(path)).toMatchObject({ name: 'own', timeoutSeconds: 5 });
  await writeFile(path, '{"name": ');
  expect(await errorOf(() => loadProfile(path))).toMatchObject({ kind: 'bad_profile', path });
  expect((await errorOf(() => loadProfile(`${path}x`))).kind).toBe('not_found');
  const unknown = await errorOf(() => loadProfile('toString'));
  expect(unknown.kind).toBe('bad_profile');
  expect(unknown.hint).toContain('quac100');
});

const kems = (entry: object) => ({ 'ML-KEM-768': entry });
const numbers = { keyType: 1, generate: 2, decapsulate: 3 };

test.each<[string, object, RegExp]>([
  ['name', { name: '../x' }, /name: expected a name of letters and digits, found "..\/x"/],
  ['style', { style: 'sign' }, /style: expected one of encapsulate, derive, decrypt, found "sign"/],
  ['kems', { kems: [] }, /kems: expected a JSON object, found \[\]/],
  ['no kem', { kems: {} }, /kems: expected one of ML-KEM-768, ML-KEM-1024, found nothing/],
  ['other kem', { kems: { ...kems(numbers), 'RSA-2048': numbers } }, /no unknown field.*RSA-2048/],
  ['a number', { kems: kems({ ...numbers, keyType: -1 }) }, /kems.ML-KEM-768.keyType: .* found -1/],
  ['a missing number', { kems: kems({ keyType: 1 }) }, /generate: .*found nothing/],
  ['hex', { kems: kems({ ...numbers, keyType: '0xg' }) }, /keyType: .*or "0x…", found "0xg"/],
  ['a typo', { timeoutSecond: 3 }, /expected no unknown field, found "timeoutSecond"/],
  ['time-out', { timeoutSeconds: 0 }, /timeoutSeconds: expected a number from 1 to 600/],
  ['omit', { omit: { secret: ['size'] } }, /omit.secret: expected some of class.*found "size"/],
  ['linker', { environment: ['LD_PRELOAD'] }, /environment: .*dynamic linker, found "LD_PRELOAD"/],
  ['preload', { preload: ['a/b.so'] }, /preload: expected a file name or absolute path/],
  ['locking', { osLocking: 1 }, /osLocking: expected true or false, found 1/],
])('refused by name: %s', async (_, change, message) => {
  expect(() => parseProfile(good())).not.toThrow();
  const error = await errorOf(() => parseProfile({ ...good(), ...change }));
  expect(error.kind).toBe('bad_profile');
  expect(error.message).toMatch(message);
});
