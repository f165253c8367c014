// The key store: what is on disk, who may read it, and that every refusal has a kind of its own.

import {
  chmod,
  mkdir,
  readdir,
  readFile,
  rename,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { join } from 'node:path';
import { gcm } from '@noble/ciphers/aes.js';
import { scryptAsync } from '@noble/hashes/scrypt.js';
import { describe, expect, test } from 'vitest';
import {
  createKeyArea,
  defaultStorePath,
  Kem,
  KeyStore,
  openKeyArea,
  type Protection,
  prepareKeys,
  SCRYPT_COST,
  toHex,
} from '../../src/keys/index.js';
import { CHEAP, errorOf, secretOf, temporaryDirectory } from './support.js';

const VOLUME = new Uint8Array(16).fill(5);
const under = (text: string): Protection => ({ passphrase: secretOf(text), cost: CHEAP });
const newStore = async () => new KeyStore(join(await temporaryDirectory(), 'deep', 'keys'));
const kindOf = async (action: () => unknown) => (await errorOf(action)).kind;

test('a generated key opens what is sealed to its recipient', async () => {
  const store = await newStore();
  for (const [name, kem] of [['alice', Kem.mlKem768] as const, ['bob', Kem.mlKem1024] as const]) {
    const info = await store.generate(name, under('secret'), kem);
    expect(info).toMatchObject({
      name,
      protection: 'scrypt',
      path: join(store.path, `${name}.key`),
    });
    const recipients = [await store.recipient(name)];
    const { blob } = await createKeyArea({ volumeUuid: VOLUME, recipients });
    using identity = await store.unlock(name, secretOf('secret'));
    expect(toHex(identity.fingerprint)).toBe(info.fingerprint);
    expect((await openKeyArea(blob, identity)).generation).toBe(1);
  }
  expect((await store.list()).keys.map(({ name }) => name)).toEqual(['alice', 'bob']);
});

test('names and fingerprints find keys; what fits none or several says so', async () => {
  const store = await newStore();
  expect((await store.list()).keys).toEqual([]);
  expect(await kindOf(() => store.show('alice'))).toBe('no_key');
  const { fingerprint } = await store.generate('alice', { noPassphrase: true });
  expect((await store.show(fingerprint)).name).toBe('alice');
  expect((await store.show(fingerprint.slice(0, 8).toUpperCase())).name).toBe('alice');
  expect(await kindOf(() => store.show(fingerprint.slice(0, 7)))).toBe('no_key');
  expect(await kindOf(() => store.show('../alice'))).toBe('no_key');
  expect(await kindOf(() => store.generate('alice', { noPassphrase: true }))).toBe('exists');
  for (const name of ['', '../x', '.hidden', 'a b', 'x'.repeat(65), '-rf']) {
    expect(await kindOf(() => store.generate(name, { noPassphrase: true }))).toBe(
      'invalid_argument',
    );
  }
  const text = await readFile(join(store.path, 'alice.key'), 'utf8');
  await writeFile(join(store.path, 'twin.key'), text.replace('"alice"', '"twin"'), { mode: 0o600 });
  expect(await kindOf(() => store.show(fingerprint))).toBe('ambiguous');
  await store.delete('twin');
  await store.delete('alice');
  expect((await store.list()).keys).toEqual([]);
  expect(await kindOf(() => store.delete('alice'))).toBe('no_key');
});

test('passphrases: needed, wrong, right; none only when asked for, and shown', async () => {
  const store = await newStore();
  await store.generate('alice', under('right'));
  await store.generate('robot', { noPassphrase: true });
  expect(await kindOf(() => store.unlock('alice'))).toBe('passphrase_needed');
  const error = await errorOf(() => store.unlock('alice', secretOf('wrong horse')));
  expect(error.kind).toBe('wrong_passphrase');
  expect(error.path).toBe(join(store.path, 'alice.key'));
  expect(JSON.stringify(error)).not.toContain('horse');
  (await store.unlock('robot'))[Symbol.dispose]();
  expect((await store.show('robot')).protection).toBe('none');
});

test('every change of a sealed key file is noticed', async () => {
  const store = await newStore();
  const { path } = await store.generate('alice', under('p'));
  const document = JSON.parse(await readFile(path, 'utf8'));
  const attempt = async (change: (copy: typeof document) => void) => {
    const copy = structuredClone(document);
    change(copy);
    await writeFile(path, JSON.stringify(copy));
    return await kindOf(() => store.unlock('alice', secretOf('p')));
  };
  const swapFirst = (text: string) => (text.startsWith('A') ? 'B' : 'A') + text.slice(1);
  for (const field of ['salt', 'nonce', 'sealed']) {
    const kind = await attempt((copy) => {
      copy.private[field] = swapFirst(copy.private[field]);
    });
    expect(kind, field).toBe('wrong_passphrase');
  }
  expect(await attempt((copy) => Object.assign(copy, { created: '2020-01-01T00:00:00Z' }))).toBe(
    'wrong_passphrase',
  );
  const damages: [string, (copy: typeof document) => void][] = [
    ['format', (copy) => Object.assign(copy, { format: 'x' })],
    ['kem', (copy) => Object.assign(copy, { kem: 'X-Wing' })],
    ['other kem', (copy) => Object.assign(copy, { kem: 'ML-KEM-1024' })],
    ['fingerprint', (copy) => Object.assign(copy, { fingerprint: '00'.repeat(32) })],
    ['name', (copy) => Object.assign(copy, { name: 'bob' })],
    ['no private', (copy) => delete copy.private],
    ['N not a power of two', (copy) => Object.assign(copy.private, { N: 100_000 })],
    ['N too small', (copy) => Object.assign(copy.private, { N: 2 ** 10 })],
    ['N too large', (copy) => Object.assign(copy.private, { N: 2 ** 24 })],
    ['memory', (copy) => Object.assign(copy.private, { N: 2 ** 20, r: 32 })],
    ['r', (copy) => Object.assign(copy.private, { r: 1 })],
    ['p', (copy) => Object.assign(copy.private, { p: 1e9 })],
    ['short salt', (copy) => Object.assign(copy.private, { salt: 'AAAA' })],
    ['protection', (copy) => Object.assign(copy.private, { protection: 'rot13' })],
    ['a private string', (copy) => Object.assign(copy, { private: '{}' })],
  ];
  for (const [name, change] of damages) expect(await attempt(change), name).toBe('bad_key');
  expect(await attempt((copy) => Object.assign(copy, { version: 3 }))).toBe('newer_version');
  await writeFile(path, '{"truncated": ');
  expect(await kindOf(() => store.unlock('alice', secretOf('p')))).toBe('bad_key');
  await writeFile(path, 'x'.repeat(100_000));
  expect(await kindOf(() => store.show('alice'))).toBe('bad_key');
  const listing = await store.list();
  expect(listing.keys).toEqual([]);
  expect(listing.damaged.map(({ kind, path: at }) => [kind, at])).toEqual([['bad_key', path]]);
});

test('an open private key that is not that of its public half is refused', async () => {
  const store = await newStore();
  const [one, two] = [
    await store.generate('one', { noPassphrase: true }),
    await store.generate('two', { noPassphrase: true }),
  ];
  const [first, second] = [
    JSON.parse(await readFile(one.path, 'utf8')),
    JSON.parse(await readFile(two.path, 'utf8')),
  ];
  await writeFile(one.path, JSON.stringify({ ...first, private: second.private }));
  expect(await kindOf(() => store.unlock('one'))).toBe('bad_key');
});

describe('permissions', () => {
  test('directory 0700, files 0600, whatever the umask', async () => {
    const before = process.umask(0);
    try {
      const store = await newStore();
      const { path } = await store.generate('alice', { noPassphrase: true });
      expect((await stat(store.path)).mode & 0o777).toBe(0o700);
      expect((await stat(path)).mode & 0o777).toBe(0o600);
      expect(await readdir(store.path)).toEqual(['alice.key']); // and no temporary file
    } finally {
      process.umask(before);
    }
  });

  test('looser permissions and symbolic links are refused, with what to do', async () => {
    const store = await newStore();
    const { path } = await store.generate('alice', { noPassphrase: true });
    await chmod(path, 0o640);
    const error = await errorOf(() => store.unlock('alice'));
    expect(error.kind).toBe('permission');
    expect(error.hint).toBe(`chmod 0600 ${path}`);
    await chmod(path, 0o400);
    (await store.unlock('alice'))[Symbol.dispose]();
    await rename(path, `${path}.real`);
    await symlink(`${path}.real`, path);
    expect(await kindOf(() => store.unlock('alice'))).toBe('permission');
    await chmod(store.path, 0o755);
    expect(await kindOf(() => store.list())).toBe('permission');
    expect(await kindOf(() => store.generate('bob', { noPassphrase: true }))).toBe('permission');
  });

  test('a store that is a file, or a key that is a directory', async () => {
    const directory = await temporaryDirectory();
    await writeFile(join(directory, 'file'), '');
    const store = new KeyStore(join(directory, 'file'));
    expect(await kindOf(() => store.list())).toBe('permission');
    await mkdir(join(directory, 'store', 'dir.key'), { recursive: true, mode: 0o700 });
    const other = new KeyStore(join(directory, 'store'));
    expect((await other.list()).damaged.map(({ kind }) => kind)).toEqual(['permission']);
  });
});

describe('export and import', () => {
  test('a public key travels and can be sealed to', async () => {
    const [mine, theirs] = [await newStore(), await newStore()];
    const { fingerprint } = await mine.generate('alice', under('p'));
    const text = await mine.exportPublic('alice');
    expect(text).toMatch(/^-----BEGIN PQBLK PUBLIC KEY-----\nName: alice\nKEM: ML-KEM-768\n/);
    expect(text.split('\n').every((line) => line.length <= 77)).toBe(true);
    const info = await theirs.import(text, { name: 'friend' });
    expect(info).toMatchObject({ name: 'friend', fingerprint, protection: 'public-only' });
    expect(await kindOf(() => theirs.unlock('friend'))).toBe('no_key');
    const recipients = [await theirs.recipient('friend')];
    const { blob } = await createKeyArea({ volumeUuid: VOLUME, recipients });
    using identity = await mine.unlock('alice', secretOf('p'));
    await openKeyArea(blob, identity);
    expect(await kindOf(() => theirs.import(text, { name: 'again' }))).toBe('exists');
  });

  test('a private key travels under a passphrase of its own, even from an open store', async () => {
    const [mine, theirs] = [await newStore(), await newStore()];
    await mine.generate('robot', { noPassphrase: true });
    const text = await mine.exportPrivate('robot', undefined, secretOf('travel'), CHEAP);
    expect(text).toContain('BEGIN PQBLK PRIVATE KEY');
    const open = JSON.parse(await readFile(join(mine.path, 'robot.key'), 'utf8'));
    const body = Buffer.from(text.split('\n\n')[1]?.split('-----')[0] ?? '', 'base64').toString();
    expect(body).toContain('"protection": "scrypt"');
    expect(body).not.toContain(open.private.decapsulationKey.slice(100, 140));
    // CRLF, and prose around it, as mail makes of it.
    const mailed = `Dear Bob,\r\n${text.replaceAll('\n', '\r\n')}\r\nYours`;
    expect(await kindOf(() => theirs.import(mailed))).toBe('passphrase_needed');
    expect(await kindOf(() => theirs.import(mailed, { passphrase: secretOf('no') }))).toBe(
      'wrong_passphrase',
    );
    const passphrase = secretOf('travel');
    await theirs.import(mailed, { passphrase, name: 'kept', protection: under('home') });
    (await theirs.unlock('kept', secretOf('home')))[Symbol.dispose]();
    expect(await kindOf(() => theirs.unlock('kept', secretOf('travel')))).toBe('wrong_passphrase');
  });

  test('what is no exported key is refused', async () => {
    const store = await newStore();
    await store.generate('alice', under('p'));
    const text = await store.exportPublic('alice');
    await store.delete('alice');
    const lines = text.split('\n');
    for (const bad of [
      '',
      'hello',
      text.slice(0, -10),
      text.replaceAll('PUBLIC', 'PRIVATE'),
      text.replace('\n\n', '\n'),
      lines.filter((_, index) => index !== 10).join('\n'),
      text.replace(lines[6] ?? '', '*'.repeat(64)),
      'x'.repeat(100_000),
    ]) {
      expect(await kindOf(() => store.import(bad)), bad.slice(0, 40)).toBe('bad_key');
    }
    expect((await store.import(text)).name).toBe('alice');
  });
});

test('where the store is', () => {
  expect(defaultStorePath({ PQBLK_KEYS: '/k', XDG_DATA_HOME: '/x', HOME: '/h' })).toBe('/k');
  expect(defaultStorePath({ XDG_DATA_HOME: '/x', HOME: '/h' })).toBe('/x/pqblk/keys');
  expect(defaultStorePath({ XDG_DATA_HOME: 'x', HOME: '/h' })).toBe('/h/.local/share/pqblk/keys');
  expect(defaultStorePath({ HOME: '/h' })).toBe('/h/.local/share/pqblk/keys');
});

test('a new key gets scrypt of real cost, and its file opens with another scrypt', async () => {
  const { N, r, p } = SCRYPT_COST;
  expect({ N, r, p }).toEqual({ N: 2 ** 17, r: 8, p: 1 });
  const store = await newStore();
  const { path } = await store.generate('alice', { passphrase: secretOf('p') });
  const document = JSON.parse(await readFile(path, 'utf8'));
  expect(document.private).toMatchObject({ N, r, p });
  const salt = Buffer.from(document.private.salt, 'base64');
  const peer = await scryptAsync(new TextEncoder().encode('p'), salt, { N, r, p, dkLen: 32 });
  const { private: part, ...open } = document;
  const { nonce, sealed, ...parameters } = part;
  const aad = new TextEncoder().encode(JSON.stringify([open, parameters]));
  const [iv, ciphertext] = [nonce, sealed].map((text) => Buffer.from(text, 'base64'));
  expect(gcm(peer, iv as Buffer, aad).decrypt(ciphertext as Buffer)).toHaveLength(2400);
});

test('unlocking without a passphrase takes at most 5 ms', async () => {
  const store = await newStore();
  await store.generate('robot', { noPassphrase: true });
  const recipients = [await store.recipient('robot')];
  const { blob } = await createKeyArea({ volumeUuid: VOLUME, recipients });
  await prepareKeys();
  const times: number[] = [];
  for (let round = 0; round < 60; round += 1) {
    const started = performance.now();
    using identity = await store.unlock('robot');
    using _keys = await openKeyArea(blob, identity);
    times.push(performance.now() - started);
  }
  const first = times[0] ?? 0;
  times.sort((a, b) => a - b);
  const [best = 0, median = 0] = [times[0], times[30]];
  console.info(
    `key layer of an unlock: best ${best.toFixed(2)} ms, median ${median.toFixed(2)} ms, ` +
      `first here ${first.toFixed(2)} ms`,
  );
  // The best of sixty: what the code costs, whoever else keeps this machine's cores busy.
  expect(best).toBeLessThanOrEqual(5);
});
