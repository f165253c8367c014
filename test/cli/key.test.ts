// `pqblk key`: the key store from the command line, its refusals and their exit codes.
import { chmodSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { KeyInfo } from '../../src/keys/index.js';
import { exitCode, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
let stores = 0;
const newStore = () => join(dir, `store-${++stores}`);

function passphraseFile(name: string, text: string): string {
  const path = join(dir, name);
  writeFileSync(path, `${text}\n`);
  return path;
}

const right = passphraseFile('right', 'correct horse');
const wrong = passphraseFile('wrong', 'incorrect horse');

describe('key gen, list, show', () => {
  it('makes keys that list and show know by name and fingerprint', async () => {
    const store = newStore();
    const made = await pqblkJson<KeyInfo>(
      'key',
      'gen',
      'alice',
      '--store',
      store,
      '--passphrase-file',
      right,
    );
    expect(made).toMatchObject({ name: 'alice', kem: 'ML-KEM-768', protection: 'scrypt' });
    expect(made.fingerprint).toMatch(/^[0-9a-f]{64}$/);
    expect(statSync(made.path).mode & 0o777).toBe(0o600);
    const big = await pqblkJson<KeyInfo>(
      ...[
        'key',
        'gen',
        '--name',
        'big',
        '--kem',
        'ml-kem-1024',
        '--no-passphrase',
        '--store',
        store,
      ],
    );
    expect(big).toMatchObject({ name: 'big', kem: 'ML-KEM-1024', protection: 'none' });
    const { keys } = await pqblkJson<{ keys: KeyInfo[] }>('key', 'list', '--store', store);
    expect(keys).toEqual([made, big]);
    const shown = await pqblkJson('key', 'show', made.fingerprint.slice(0, 8), '--store', store);
    expect(shown).toEqual(made);
    const text = await pqblk('key', 'list', '--store', store);
    expect(text.stdout.split('\n')[1]).toContain(made.fingerprint.slice(0, 16));
  });

  it('lists an empty store as nothing, and says on stderr how to begin', async () => {
    const { code, stdout, stderr } = await pqblk('key', 'list', '--store', newStore());
    expect({ code, stdout }).toEqual({ code: 0, stdout: '' });
    expect(stderr).toContain('key gen');
  });

  it('refuses a second key of the same name', async () => {
    const store = newStore();
    await pqblkJson('key', 'gen', 'a', '--no-passphrase', '--store', store);
    const { code, stderr } = await pqblk('key', 'gen', 'a', '--no-passphrase', '--store', store);
    expect(code).toBe(exitCode('exists'));
    expect(stderr).toMatch(/^pqblk: .*already/);
  });
});

describe('key export and import', () => {
  it('moves a public half and a pair to another store', async () => {
    const [first, second, third] = [newStore(), newStore(), newStore()];
    const made = await pqblkJson<KeyInfo>(
      'key',
      'gen',
      'a',
      '--passphrase-file',
      right,
      '--store',
      first,
    );
    const publicFile = join(dir, 'a.pub');
    expect(
      (await pqblk('key', 'export', 'a', '--public', '-o', publicFile, '--store', first)).code,
    ).toBe(0);
    expect(readFileSync(publicFile, 'utf8')).toContain('BEGIN PQBLK PUBLIC KEY');
    const guest = await pqblkJson<KeyInfo>('key', 'import', publicFile, '--store', second);
    expect(guest).toMatchObject({ fingerprint: made.fingerprint, protection: 'public-only' });

    const pairFile = join(dir, 'a.pair');
    const exported = ['key', 'export', 'a', '-o', pairFile, '--store', first];
    expect((await pqblk(...exported, '--passphrase-file', wrong)).code).toBe(
      exitCode('wrong_passphrase'),
    );
    expect((await pqblk(...exported, '--passphrase-file', right)).code).toBe(0);
    expect((await pqblk(...exported, '--passphrase-file', right)).code).toBe(exitCode('exists'));
    const moved = await pqblkJson<KeyInfo>(
      ...['key', 'import', pairFile, '--name', 'b', '--passphrase-file', right, '--store', third],
    );
    expect(moved).toMatchObject({ name: 'b', fingerprint: made.fingerprint, protection: 'scrypt' });
  });

  it('puts an exported pair under a new passphrase when one is given', async () => {
    const [first, second] = [newStore(), newStore()];
    await pqblkJson('key', 'gen', 'a', '--no-passphrase', '--store', first);
    const file = join(dir, 'a.new');
    await pqblk('key', 'export', 'a', '-o', file, '--new-passphrase-file', wrong, '--store', first);
    const bring = ['key', 'import', file, '--store', second, '--passphrase-file'];
    expect((await pqblk(...bring, right)).code).toBe(exitCode('wrong_passphrase'));
    expect((await pqblk(...bring, wrong)).code).toBe(0);
  });

  it('refuses what is no exported key', async () => {
    const { code } = await pqblk('key', 'import', right, '--store', newStore());
    expect(code).toBe(exitCode('bad_key'));
  });
});

describe('key delete', () => {
  it('deletes a private key only when forced', async () => {
    const store = newStore();
    await pqblkJson('key', 'gen', 'a', '--no-passphrase', '--store', store);
    expect((await pqblk('key', 'delete', 'a', '--store', store)).code).toBe(exitCode('policy'));
    expect((await pqblkJson<{ keys: [] }>('key', 'list', '--store', store)).keys).toHaveLength(1);
    expect((await pqblk('key', 'delete', 'a', '--force', '--store', store)).code).toBe(0);
    expect((await pqblkJson<{ keys: [] }>('key', 'list', '--store', store)).keys).toHaveLength(0);
  });
});

describe('refusals', () => {
  it.each([
    [['bogus'], 'usage'],
    [[], 'usage'],
    [['key'], 'usage'],
    [['key', 'gen', 'a', '--kem', 'rsa'], 'usage'],
    [['key', 'gen', 'a', '--passphrase-fd', 'x'], 'usage'],
    [['key', 'gen', 'a', '--passphrase-file', '/p', '--passphrase-env', 'P'], 'usage'],
    [['key', 'show'], 'usage'],
    [['key', 'gen', '../evil', '--no-passphrase'], 'invalid_argument'],
    [['key', 'show', 'nobody'], 'no_key'],
    [['key', 'gen', 'a', '--passphrase-env', 'PQBLK_TEST_UNSET'], 'passphrase_needed'],
    [['key', 'gen', 'a', '--passphrase-file', '/nonexistent'], 'not_found'],
  ] as const)('%j ends with the exit code of %s', async (argv, kind) => {
    const { code } = await pqblk(...argv, ...(argv.length > 1 ? ['--store', newStore()] : []));
    expect(code).toBe(exitCode(kind));
  });

  it('refuses a store that others may read', async () => {
    const store = newStore();
    await pqblkJson('key', 'gen', 'a', '--no-passphrase', '--store', store);
    chmodSync(store, 0o755);
    const { code, stderr } = await pqblk('key', 'list', '--store', store);
    expect(code).toBe(exitCode('permission'));
    expect(stderr).toContain('hint: chmod 0700');
  });

  it('prints a JSON error on stderr and nothing on stdout', async () => {
    const store = newStore();
    const { code, stdout, stderr } = await pqblk(
      'key',
      'show',
      'nobody',
      '--json',
      '--store',
      store,
    );
    expect(stdout).toBe('');
    expect(JSON.parse(stderr)).toEqual({
      error: expect.objectContaining({ code: 'PQBLK_NO_KEY', exitCode: code }),
    });
  });
});

it('lists every exit code once, but for those that mean the same to a script', async () => {
  const rows = await pqblkJson<{ code: string; exitCode: number }[]>('exit-codes');
  expect(rows.find(({ code }) => code === 'PQBLK_LOCKED')?.exitCode).toBe(exitCode('locked'));
  expect(new Set(rows.map(({ code }) => code)).size).toBe(rows.length);
  const { stdout } = await pqblk('exit-codes');
  expect(stdout).toMatch(/^55 +PQBLK_AUDIT_BROKEN +the audit log is not whole/m);
});
