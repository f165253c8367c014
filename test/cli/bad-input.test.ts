// What people get wrong: each mistake has a clear error and an exit code of its own, and the disk is
// byte for byte what it was.
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { closeSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from 'vitest';
import type { ErrorKind } from '../../src/errors.js';
import { KeyStore, openDisk } from '../../src/index.js';
import { exitCode, MAIN, peer, pqblk, pqblkJson, program, scratch } from './helpers.js';
import { running } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const withStore = (argv: string[]) => [...argv, '--store', at('keys')];
const run = (...argv: string[]) => pqblk(...withStore(argv));
const disk = at('vm.sealed');

beforeAll(async () => {
  for (const name of ['alice', 'bob']) await run('key', 'gen', name, '--no-passphrase');
  await pqblkJson(...withStore(['create', disk, '16M', '--key', 'alice', '--log-size', '8M']));
  peer('mkfifo', at('pipe'));
});

const hashOf = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');

describe('what is no file', () => {
  /** Commands that read a file which is named for them. */
  const READERS: readonly [what: string, (file: string) => string[]][] = [
    ['policy', (file) => ['slot', 'add', disk, 'bob', '--key', 'alice', '--policy', file]],
    ['list', (file) => ['report', '--list', file]],
    ['trust', (file) => ['slot', 'add', disk, 'bob', '--key', 'alice', '--trust', file]],
    ['recipient', (file) => ['slot', 'add', disk, file, '--key', 'alice']],
    ['imported key', (file) => ['key', 'import', file]],
    ['header backup', (file) => ['header', 'restore', disk, file, '--key', 'alice']],
    ['audit log', (file) => ['slot', 'add', disk, 'bob', '--key', 'alice', '--audit', file]],
    ['verified log', (file) => ['audit', 'verify', disk, '--key', 'alice', '--audit', file]],
    ['configuration', (file) => ['serve', '--config', file]],
    ['recovery code', (file) => ['slot', 'test', disk, '--recovery-code', file]],
  ];
  const CODES = ['invalid_argument', 'audit_log', 'passphrase_needed'] as const;

  it.each(READERS)('is refused as a %s, at once', async (_, reading) => {
    const before = hashOf(disk);
    const refused = async (file: string) => {
      const argv = reading(file);
      const { code, stderr } =
        argv[0] === 'serve' || argv[0] === 'report' ? await pqblk(...argv) : await run(...argv);
      expect(CODES.map(exitCode), stderr).toContain(code);
      expect(stderr).toContain(file);
    };
    await Promise.all([at('pipe'), '/dev/zero', '/dev/full', dir].map(refused));
    expect(hashOf(disk)).toBe(before);
  });

  it('a socket is refused, and a device where a passphrase is expected', async () => {
    const server = createServer().listen(at('socket'));
    await once(server, 'listening');
    const { code, stderr } = await run('slot', 'test', disk, '--policy', at('socket'));
    server.close();
    expect(code).toBe(exitCode('invalid_argument'));
    expect(stderr).toContain('is a socket, not a file');
    writeFileSync(at('passphrase'), 'correct horse');
    await run('key', 'gen', 'locked', '--passphrase-file', at('passphrase'));
    for (const file of ['/dev/zero', dir]) {
      const opened = await run('key', 'export', 'locked', '--passphrase-file', file);
      expect(opened.code, opened.stderr).toBe(exitCode('invalid_argument'));
    }
    const nothing = await run('key', 'export', 'locked', '--passphrase-file', at('pipe'));
    expect(nothing.code).toBe(exitCode('passphrase_needed'));
  });

  it('a pipe is read to its end, however late and in whatever pieces', () => {
    const policy = `(sleep 0.2; printf 'version: 1\\nmini'; sleep 0.2; printf 'mumSlots: 2\\n')`;
    const argv = `"$0" "$1" create ${at('p.sealed')} 16M --key alice --store ${at('keys')}`;
    const script = `${argv} --policy <(${policy})`;
    const { status, stderr } = spawnSync('bash', ['-c', script, process.execPath, MAIN], {
      encoding: 'utf8',
    });
    expect(status, stderr).toBe(exitCode('policy'));
    expect(stderr).toContain('1 active slots, at least 2 demanded');
  });

  it('a pipe whose writer is silent hears the first SIGTERM', async () => {
    for (const option of ['--policy', '--passphrase-file'] as const) {
      const key = option === '--policy' ? 'alice' : 'locked';
      const writer = openSync(at('pipe'), 'r+'); // so that somebody could write
      const argv = ['slot', 'test', disk, '--key', key, option, at('pipe'), '--store', at('keys')];
      const child = spawn(process.execPath, [MAIN, ...argv], { stdio: 'ignore' });
      running.add(child);
      const ended = once(child, 'exit');
      while (!reads(Number(child.pid), at('pipe'))) await sleep(20);
      child.kill('SIGTERM');
      expect((await ended)[0]).toBe(143);
      running.delete(child);
      closeSync(writer);
    }
  });
});

it('a disk that is locked is told before anybody is asked for a passphrase', async () => {
  const store = new KeyStore(at('keys'));
  using identity = await store.unlock('alice');
  await using held = await openDisk(disk, { format: 'sealed', identity });
  expect(held.closed).toBe(false);
  const { code, stderr } = program(
    ...withStore(['slot', 'revoke', disk, 'bob', '--key', 'locked', '--approve', 'locked']),
  );
  expect(code, stderr).toBe(exitCode('locked'));
  expect(stderr).toContain('hint: no `pqblk serve` of this user');
});

describe('each mistake has its own exit code, and the disk is what it was', () => {
  const file = (name: string, text: string) => {
    writeFileSync(at(name), text);
    return at(name);
  };
  const add = ['slot', 'add', disk, 'bob', '--key', 'alice'];
  const policy = (name: string, text: string) => ['--policy', file(name, text)];
  const none = at('none.so');
  const MISTAKES: readonly [what: string, kind: ErrorKind, argv: () => string[]][] = [
    ['a wrong key', 'no_slot', () => ['slot', 'add', disk, 'alice', '--key', 'bob']],
    ['an expired key', 'key_expired', () => [...add, ...policy('a', OLD)]],
    ['a key that is not there', 'no_key', () => ['slot', 'add', disk, 'bob', '--key', 'nobody']],
    ['a key of two names', 'ambiguous', () => ['slot', 'add', disk, 'bob', '--key', twins()]],
    ['a slot that is not there', 'slot_not_found', () => [...revoke, 'nobody', '--key', 'alice']],
    ['a slot that there is', 'slot_exists', () => [...add.with(3, 'alice'), '--label', 'x']],
    ['a malformed URI', 'bad_uri', () => ['key', 'import', 'x', '--module', none, '--token', 'x:']],
    ['a malformed profile', 'bad_profile', () => ['token', 'profile', file('p', '{}')]],
    ['no module', 'not_found', () => ['token', 'list', '--module', none, '--profile', 'nss']],
    [
      'a rule of the policy',
      'policy',
      () => [...add, ...policy('b', 'version: 1\nkems: [X-Wing]')],
    ],
    [
      'a policy that is none',
      'invalid_argument',
      () => [...add, ...policy('c', 'version: 1\nx: 1')],
    ],
    ['a later policy', 'newer_version', () => [...add, ...policy('d', 'version: 2')]],
    ['an audit log nowhere', 'audit_log', () => [...add, '--audit', at('no/log')]],
    ['the same, for hours', 'audit_log', () => [...rotate, '--audit', at('no/log')]],
    ['an audit log of others', 'audit_broken', () => [...add, '--audit', file('log', '{}\n')]],
    ['an epoch never had', 'invalid_argument', () => [...rotate, '--from-epoch', '7']],
    ['no rotation to abort', 'not_found', () => [...rotate, '--abort']],
    ['the last slot', 'policy', () => [...revoke, 'alice', '--key', 'alice']],
    ['a backup that is none', 'corrupt', () => ['header', 'restore', disk, file('h', 'x')]],
    ['no disk', 'not_found', () => ['slot', 'add', none, 'bob', '--key', 'alice']],
  ];
  const OLD = 'version: 1\nmaximumKeyAgeDays: 0\nexpiredSlots: refuse';
  const revoke = ['slot', 'revoke', disk];
  const rotate = ['rotate-data-key', disk, '--key', 'alice'];

  /** The fingerprint of a key that the store has twice. */
  function twins(): string {
    const text = readFileSync(at('keys/alice.key'), 'utf8');
    writeFileSync(at('keys/twin.key'), text.replace('"alice"', '"twin"'), { mode: 0o600 });
    return String((JSON.parse(text) as { fingerprint: string }).fingerprint);
  }

  it.each(MISTAKES)('%s: %s', async (_, kind, argv) => {
    const before = hashOf(disk);
    const words = argv();
    const plain = words[0] === 'token';
    const { code, stdout, stderr } = await (plain ? pqblk(...words) : run(...words));
    rmSync(at('keys/twin.key'), { force: true });
    expect([stderr, code]).toEqual([expect.stringMatching(/^pqblk: .{10}/m), exitCode(kind)]);
    expect(stdout).toBe('');
    expect(hashOf(disk)).toBe(before);
  });

  it('an inventory with a disk that cannot be read', async () => {
    const { code, stdout } = await pqblk('report', disk, at('none.sealed'));
    expect(code).toBe(exitCode('io_error'));
    expect(stdout).toMatch(/none.sealed +unreadable +/);
  });
});

/** Whether the process has the file open. */
function reads(pid: number, path: string): boolean {
  return peer('sh', '-c', `ls -l /proc/${pid}/fd; true`).includes(path);
}
