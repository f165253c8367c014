// Tokens from the command line: a disk whose private key is on NSS's softokn, and what each failure
// of a token looks like to a script.
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { KeyStore, openDisk } from '../../src/index.js';
import { haveNss, NSS_MODULE, NSS_TOKEN, PIN, TestToken } from '../keys/pkcs11-support.js';
import { secretOf } from '../keys/support.js';
import { exitCode, pqblk, pqblkJson, program, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const store = ['--store', at('keys')];
const pin = ['--pin-file', at('pin')];
writeFileSync(at('pin'), `${PIN}\n`);
writeFileSync(at('wrong-pin'), 'not-the-pin\n');

interface Listing {
  tokens: { label: string; ready: boolean; kems: string[] }[];
  keys?: { uri: string; label: string; fingerprint: string; confined: boolean }[];
}

describe.runIf(haveNss())('NSS softokn', () => {
  const module = ['--module', NSS_MODULE, '--profile', 'nss', '--token-dir', at('nss')];
  const token = ['--token', `pkcs11:token=${encodeURIComponent(NSS_TOKEN)}`];
  mkdirSync(at('nss'));

  beforeAll(async () => {
    const before = await pqblkJson<Listing>('token', 'list', ...module);
    expect(before.tokens.find(({ label }) => label === NSS_TOKEN)?.ready).toBe(false);
    await pqblkJson('token', 'init', ...module, ...token, ...pin);
  });

  it.each(['ml-kem-768', 'ml-kem-1024'])(
    'a disk whose %s key never leaves the token',
    async (kem) => {
      const disk = at(`${kem}.sealed`);
      const info = await pqblkJson(
        ...['key', 'gen', kem, '--kem', kem, ...module, ...token, ...pin, ...store],
      );
      expect(info).toMatchObject({ protection: 'token', kem: kem.toUpperCase() });
      expect(readFileSync(String(info.path), 'utf8')).not.toContain('decapsulationKey');
      await pqblkJson('create', disk, '16M', '--key', kem, ...store);
      // By name, and found by itself.
      await pqblkJson('check', disk, '--key', kem, ...pin, ...store);
      await pqblkJson('check', disk, ...pin, ...store);
      const listed = await pqblkJson<{ slots: object[] }>('slot', 'list', disk);
      expect(listed.slots[0]).toMatchObject({ label: kem, provider: 'pkcs11' });
      const wrong = await pqblk('check', disk, '--pin-file', at('wrong-pin'), ...store);
      expect(wrong.code).toBe(exitCode('wrong_pin'));
      expect(wrong.stderr).toContain('wrong PIN');
      expect(wrong.stderr).not.toContain('not-the-pin');
    },
  );

  it('another token of the same name, without a PIN, says so', async () => {
    mkdirSync(at('empty-nss'));
    const empty = ['--module', NSS_MODULE, '--profile', 'nss', '--token-dir', at('empty-nss')];
    const argv = ['key', 'import', 'foreign', ...empty, ...token, ...pin, ...store];
    const { code, stderr } = await pqblk(...argv);
    expect([code, stderr]).toEqual([
      exitCode('token_unavailable'),
      expect.stringMatching(/has no user PIN yet[\s\S]*pqblk token init/),
    ]);
  });

  it('the list shows keys and that they cannot leave', async () => {
    const { keys } = await pqblkJson<Listing>('token', 'list', ...module, ...token, ...pin);
    expect(keys?.map(({ label, confined }) => [label, confined])).toEqual(
      expect.arrayContaining([
        ['ml-kem-768', true],
        ['ml-kem-1024', true],
      ]),
    );
    const { stdout } = await pqblk('token', 'list', ...module, ...token, ...pin);
    expect(stdout).toMatch(/ml-kem-768 +ML-KEM-768 +[0-9a-f]{16} +never +pkcs11:token=NSS/);
  });

  it('a key that is there is taken in by its URI, the PIN file with it', async () => {
    const other = ['--store', at('other-keys')];
    const uri = `${token[1]};object=ml-kem-768?pin-source=file:${at('pin')}`;
    const info = await pqblkJson('key', 'import', 'mine', '--token', uri, ...module, ...other);
    expect(info).toMatchObject({ name: 'mine', token: { pinFile: at('pin'), login: 'pin' } });
    await pqblkJson('check', at('ml-kem-768.sealed'), ...other);
    const again = await pqblk('key', 'import', 'twice', '--token', uri, ...module, ...other);
    expect(again.code).toBe(exitCode('exists'));
    const tested = await pqblk('token', 'test', '--key', 'mine', ...other);
    expect(tested.stdout).toMatch(/^ML-KEM-768 [0-9a-f]{16} proved in \d+ ms: pkcs11:/);
  });

  it('a second slot is enrolled with the token, and opens without it', async () => {
    const disk = at('ml-kem-768.sealed');
    await pqblkJson('key', 'gen', 'spare', '--no-passphrase', ...store);
    await pqblkJson('slot', 'add', disk, 'spare', '--key', 'ml-kem-768', ...pin, ...store);
    await pqblkJson('check', disk, '--key', 'spare', ...store);
    await pqblkJson('rotate-master-key', disk, '--key', 'ml-kem-768', ...pin, ...store);
    await pqblkJson('check', disk, '--key', 'ml-kem-768', ...pin, ...store);
  });

  it('approves with a PIN from a file, and is tested as a new key, with nobody to ask', async () => {
    const disk = at('approved.sealed');
    const rules = ['--policy', at('two.yaml'), '--key', 'spare', ...store];
    writeFileSync(at('two.yaml'), 'version: 1\ntwoPersons: [rotate-master-key]\n');
    await pqblkJson('create', disk, '16M', '--key', 'spare', '--log-size', '8M', ...store);
    const add = ['slot', 'add', disk, 'ml-kem-768', '--new-pin-file', at('pin')];
    expect(await pqblkJson(...add, ...rules)).toMatchObject({ advice: [] });
    const rotate = ['rotate-master-key', disk, ...rules, '--approve', 'ml-kem-768'];
    expect(program(...rotate).code).toBe(exitCode('passphrase_needed'));
    const changed = await pqblkJson(...rotate, '--approve-pin-file', at('pin'));
    expect(changed).toMatchObject({ changed: true });
    writeFileSync(at('wrong-pin'), '99999999', { mode: 0o600 });
    const wrong = await pqblk(...rotate, '--approve-pin-file', at('wrong-pin'));
    expect(wrong.code).toBe(exitCode('wrong_pin'));
    await pqblkJson(...rotate, '--approve-pin-file', at('pin')); // and so is not locked
  });

  it('every key of a token is proved by `token test`; a PIN comes from a descriptor', async () => {
    const fd = openSync(at('pin'), 'r');
    try {
      const { tested } = await pqblkJson<{ tested: { kem: string }[] }>(
        ...['token', 'test', ...module, ...token, '--pin-fd', String(fd)],
      );
      expect(tested.map(({ kem }) => kem).sort()).toEqual(['ML-KEM-1024', 'ML-KEM-768']);
    } finally {
      closeSync(fd);
    }
  });

  it('as a program, with nobody to ask', () => {
    const disk = at('ml-kem-768.sealed');
    const asked = program('check', disk, '--key', 'ml-kem-768', ...store);
    expect(asked.code).toBe(exitCode('passphrase_needed'));
    expect(asked.stderr).toContain('--pin-file');
    expect(program('check', disk, '--key', 'ml-kem-768', ...pin, ...store).code).toBe(0);
  });
});

describe('a token that fails', () => {
  const liar = new TestToken();
  const from = ['--module', liar.module, '--profile', 'quac100'];
  const disk = at('liar.sealed');
  beforeAll(async () => {
    await liar.init();
    const token = `pkcs11:token=Test%20token?pin-source=${at('pin')}`;
    await pqblkJson('key', 'gen', 'liar', '--token', token, ...from, ...store);
    await pqblkJson('create', disk, '16M', '--key', 'liar', ...store);
    await pqblkJson('check', disk, ...store);
  });

  it('a KEM that tokens do not have is refused before a PIN is asked for', async () => {
    const argv = ['key', 'gen', 'hybrid', '--kem', 'x-wing', '--token', 'pkcs11:', ...from];
    const { code, stderr } = await pqblk(...argv, ...store);
    expect(stderr).toContain('have no X-Wing, but ML-KEM-768, ML-KEM-1024');
    expect(code).toBe(exitCode('unsupported'));
  });

  it('a slot for a token whose PIN is at hand is tested before it counts', async () => {
    const gift = at('gift.sealed');
    await pqblkJson('key', 'gen', 'giver', '--no-passphrase', ...store);
    await pqblkJson('create', gift, '16M', '--key', 'giver', ...store);
    liar.misbehave('wrong-secret');
    const refused = await pqblk('slot', 'add', gift, 'liar', '--key', 'giver', ...store);
    liar.misbehave('');
    expect(refused.code).toBe(exitCode('token_mistrusted'));
    await pqblkJson('slot', 'add', gift, 'liar', '--key', 'giver', ...store);
    await pqblkJson('check', gift, '--key', 'liar', ...store);
  });

  it.each([
    ['wrong-secret', 'token_mistrusted', 47],
    ['crash', 'token_crashed', 42],
    ['removed', 'token_removed', 44],
    ['session-lost', 'token_session_lost', 45],
    ['pin-incorrect', 'wrong_pin', 40],
    ['pin-locked', 'pin_locked', 41],
    ['no-token', 'token_unavailable', 4],
    ['failed', 'token_refused', 46],
  ] as const)('%s: exit code of %s, disk untouched', async (mode, kind, code) => {
    const before = readFileSync(disk);
    liar.misbehave(mode);
    const failed = await pqblk('check', disk, '--json', ...store);
    liar.misbehave('');
    expect(failed.code).toBe(exitCode(kind));
    expect(failed.code).toBe(code);
    const { error } = JSON.parse(failed.stderr) as { error: { code: string; message: string } };
    expect(error.code).toBe(`PQBLK_${kind.toUpperCase()}`);
    expect(readFileSync(disk).equals(before)).toBe(true);
    await pqblkJson('check', disk, ...store);
  });

  it('a key that the token would let out is not taken in without a word', async () => {
    const taken = async (name: string) => {
      const uri = `pkcs11:token=Test%20token;object=liar?pin-source=${at('pin')}`;
      const there = ['--store', at(`${name}-keys`)];
      return await pqblk('key', 'import', name, '--token', uri, ...from, ...there);
    };
    expect(await taken('confined')).toMatchObject({ code: 0, stderr: '' });
    const state = readFileSync(join(liar.directory, 'state'), 'utf8');
    writeFileSync(join(liar.directory, 'state'), state.replaceAll(/^(key .*) 0$/gm, '$1 1'));
    const { code, stderr } = await taken('loose');
    writeFileSync(join(liar.directory, 'state'), state);
    expect([code, stderr]).toEqual([0, expect.stringContaining('let this private key out')]);
  });

  it('the session is closed in order before the program ends', () => {
    liar.misbehave('tells-its-end');
    expect(program('check', disk, ...store)).toMatchObject({ code: 0, stderr: '' });
    liar.misbehave('');
    expect(readFileSync(join(liar.directory, 'ended'), 'utf8')).toBe('in order\n');
  });

  it('a disk that is open does not notice its token crash', async () => {
    const keys = new KeyStore(at('keys'));
    const identity = await keys.unlock('liar', secretOf(PIN));
    const open = await openDisk(disk, { format: 'sealed', identity, pins: keys.pins });
    const data = Buffer.alloc(65536, 0x5a);
    await open.write(data, 0);
    liar.misbehave('crash');
    const ciphertext = new Uint8Array(1088);
    await expect(
      identity.provider.decapsulate(identity.privateKey, ciphertext),
    ).rejects.toMatchObject({ kind: 'token_crashed' });
    liar.misbehave('');
    await open.write(data, 65536);
    await open.flush();
    const back = Buffer.alloc(131072);
    await open.read(back, 0);
    expect(back.equals(Buffer.concat([data, data]))).toBe(true);
    await open.close();
    identity[Symbol.dispose]();
    await pqblkJson('check', disk, ...store);
  });
});

describe('usage', () => {
  it.each([
    [['key', 'gen', 'x', '--module', '/x.so'], 'usage', '--module means something with --token'],
    [['key', 'gen', 'x', '--token', 'pkcs11:'], 'usage', 'which PKCS#11 module'],
    [['key', 'import'], 'usage', 'name the file'],
    [['token', 'list'], 'usage', 'which PKCS#11 module'],
    [['token', 'list', '--module', '/x.so', '--profile', 'x'], 'bad_profile', 'no profile "x"'],
    [['token', 'list', '--module', '/nowhere.so'], 'not_found', '/nowhere.so'],
    [['token', 'list', '--token', 'pkcs11:pin=1', '--module', '/x'], 'bad_uri', 'found "pin"'],
    [['token', 'test', '--key', 'nobody'], 'no_key', 'no key "nobody"'],
  ] as const)('%j', async (argv, kind, message) => {
    const { code, stderr } = await pqblk(...argv, ...(argv[1] === 'list' ? [] : store));
    expect(stderr).toContain(message);
    expect(code).toBe(exitCode(kind));
  });

  it('profiles are listed, printed and checked', async () => {
    expect((await pqblk('token', 'profile')).stdout).toMatch(/^pkcs11-3.2 .*\n?nss .*/ms);
    const { stdout } = await pqblk('token', 'profile', 'quac100');
    writeFileSync(at('own.json'), stdout);
    expect((await pqblk('token', 'profile', at('own.json'))).stdout).toContain('in order');
    writeFileSync(at('own.json'), stdout.replace('derive', 'guess'));
    const bad = await pqblk('token', 'profile', at('own.json'));
    expect(bad.code).toBe(exitCode('bad_profile'));
    expect(bad.stderr).toContain(
      'style: expected one of encapsulate, derive, decrypt, found "guess"',
    );
  });
});
