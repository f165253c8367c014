// `pqblk fleet` and `pqblk report`: one change over many disks, stopped, killed, repeated, with disks among
// them that cannot be changed; and what a report finds.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import {
  appendFileSync,
  chmodSync,
  copyFileSync,
  linkSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { openDisk } from '../../src/index.js';
import { KeyStore, takeLock } from '../../src/keys/index.js';
import { ROOT } from './examples.js';
import { exitCode, MAIN, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const store = ['--store', at('keys')];
const state = process.env.XDG_STATE_HOME;
const COUNT = 8;

interface Event {
  readonly event: string;
  readonly path: string;
  readonly before?: { vmkCheck: string; keys: string[] };
  readonly after?: { vmkCheck: string; keys: string[] };
  readonly error?: { code: string };
  readonly disks: number;
  readonly done: number;
  readonly skipped: number;
  readonly failed: number;
}

beforeAll(async () => {
  process.env.XDG_STATE_HOME = at('state');
  for (const name of ['ops', 'old', 'new']) {
    await pqblk('key', 'gen', name, '--no-passphrase', ...store);
  }
});
afterAll(() => {
  if (state === undefined) delete process.env.XDG_STATE_HOME;
  else process.env.XDG_STATE_HOME = state;
});

let made = 0;
/** A directory with disks in directories, and a file that is none. */
async function fleet(): Promise<string> {
  made += 1;
  const top = at(`fleet-${made}`);
  mkdirSync(join(top, 'deep', 'er'), { recursive: true });
  writeFileSync(join(top, 'notes.txt'), 'not a disk\n');
  for (let index = 0; index < COUNT; index += 1) {
    const path = join(top, index % 2 ? 'deep' : 'deep/er', `${index}.sealed`);
    const keys = ['--key', 'ops', '--key', 'old', '--cluster-size', '4k', '--log-size', '256k'];
    await pqblkJson('create', path, '1M', ...keys, ...store);
  }
  return top;
}

const eventsOf = (stdout: string) =>
  stdout
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as Event);

async function run(...argv: string[]): Promise<{ code: number; events: Event[]; summary: Event }> {
  const { code, stdout, stderr } = await pqblk('fleet', ...argv, '--key', 'ops', ...store);
  if (stdout === '') throw new Error(stderr);
  const events = eventsOf(stdout);
  return { code, events: events.slice(0, -1), summary: events.at(-1) as Event };
}

const opens = async (path: string, key: string) =>
  (await pqblk('slot', 'test', path, '--key', key, ...store)).code;

it('moves a slot of every disk below a directory, once', async () => {
  const top = await fleet();
  const argv = ['rewrap', 'old', '--to', 'new', top];
  const planned = await run(...argv, '--dry-run');
  expect(planned.events.map(({ event }) => event)).toEqual(Array(COUNT).fill('planned'));
  const { fingerprint } = await pqblkJson<{ fingerprint: string }>('key', 'show', 'new', ...store);
  expect(planned.events[0]?.before?.keys).not.toContain(fingerprint);
  expect(planned.events[0]?.after?.keys).toContain(fingerprint);
  const done = await run(...argv);
  expect([done.code, done.summary]).toMatchObject([0, { done: COUNT, skipped: 0, failed: 0 }]);
  expect(await opens(join(top, 'deep/1.sealed'), 'new')).toBe(0);
  expect(await opens(join(top, 'deep/er/0.sealed'), 'old')).toBe(exitCode('no_slot'));
  const again = await run(...argv);
  expect(again.summary).toMatchObject({ event: 'summary', done: 0, skipped: COUNT });
  const dated = await run(...argv, '--not-after', '2099-01-31'); // which those slots are not
  expect([dated.code, dated.summary.failed]).toEqual([exitCode('slot_exists'), COUNT]);
});

it('rotates each master key once for each name of a run, by pattern and by list', async () => {
  const top = await fleet();
  const first = await run(
    'rotate-master-key',
    '--run',
    `q1-${made}`,
    join(top, 'deep', '*.sealed'),
  );
  expect(first.summary).toMatchObject({ done: COUNT / 2, failed: 0 });
  const all = await run('rotate-master-key', '--run', `q1-${made}`, join(top, '**', '?*.sealed'));
  expect(all.summary).toMatchObject({ done: COUNT / 2, skipped: COUNT / 2 });
  const list = all.events.map(({ path }) => path).join('\n');
  writeFileSync(at('list'), `# all of them\n${list}\n`);
  const named = ['rotate-master-key', '--run', `q2-${made}`, '--list', at('list')];
  const other = await run(...named);
  expect(other.summary).toMatchObject({ done: COUNT });
  const check = new Map(all.events.map(({ path, after }) => [path, after?.vmkCheck]));
  for (const { path, before, after } of other.events) {
    if (check.get(path)) expect(before?.vmkCheck).toBe(check.get(path));
    expect(after?.vmkCheck).not.toBe(before?.vmkCheck);
  }
});

it('goes on after a disk that cannot be changed, and says which kind it was', async () => {
  const top = await fleet();
  const damaged = join(top, 'deep/3.sealed');
  const bytes = readFileSync(damaged);
  for (let found = bytes.indexOf('PQBLKKEY'); found >= 0; found = bytes.indexOf('PQBLKKEY')) {
    bytes.fill(0, found, found + 8);
  }
  writeFileSync(damaged, bytes);
  const argv = ['rewrap', 'old', '--to', 'new', top];
  const one = await run(...argv);
  expect(one.code).toBe(exitCode('key_area_damaged'));
  expect(one.summary).toMatchObject({ done: COUNT - 1, failed: 1 });
  expect(one.events.find(({ event }) => event === 'failed')).toMatchObject({
    path: damaged,
    error: { code: 'PQBLK_KEY_AREA_DAMAGED' },
  });
  const two = await run(...argv, join(top, 'notes.txt'), join(top, 'gone.sealed'));
  expect(two.code).toBe(exitCode('general'));
  expect(two.summary).toMatchObject({ skipped: COUNT - 1, failed: 3 });
  using identity = await new KeyStore(at('keys')).unlock('ops');
  const served = join(top, 'deep/1.sealed');
  const disk = await openDisk(served, { format: 'sealed', identity });
  const planned = await run('rewrap', 'new', '--to', 'old', served, '--dry-run');
  const busy = await run('rewrap', 'new', '--to', 'old', served);
  await disk.close();
  expect([planned.code, busy.code]).toEqual([exitCode('locked'), exitCode('locked')]);
});

it('killed in the middle, completes when it is run again', async () => {
  const top = await fleet();
  const argv = ['fleet', 'rotate-master-key', '--run', `killed-${made}`, '--jobs', '2', top];
  const child = spawn(process.execPath, [MAIN, ...argv, '--key', 'ops', ...store], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  let seen = '';
  child.stdout.on('data', (data) => {
    seen += data;
    if (seen.split('\n').length > 3) child.kill('SIGKILL');
  });
  await once(child, 'close');
  const before = new Map(
    eventsOf(seen.slice(0, seen.lastIndexOf('\n'))).map(({ path, after }) => [path, after]),
  );
  const again = await run(...argv.slice(1));
  expect(again.code).toBe(0);
  expect(again.events).toHaveLength(COUNT);
  for (const { path, event } of again.events) {
    if (before.has(path)) expect([path, event]).toEqual([path, 'skipped']);
    expect([await opens(path, 'ops'), await opens(path, 'old')]).toEqual([0, 0]);
  }
  const third = await run(...argv.slice(1));
  expect(third.summary).toMatchObject({ done: 0, skipped: COUNT });
});

it('is one run at a time, and refuses what makes no sense', async () => {
  const top = await fleet();
  const path = join(top, 'deep/1.sealed');
  mkdirSync(at('state/pqblk/fleet'), { recursive: true });
  const release = await takeLock(at('state/pqblk/fleet/run'), 'test');
  const argv = ['rewrap', 'old', '--to', 'new', path];
  const locked = await pqblk('fleet', ...argv, '--key', 'ops', ...store);
  expect([locked.code, locked.stderr]).toEqual([
    exitCode('locked'),
    expect.stringContaining(String(process.pid)),
  ]);
  await release();
  expect((await run(...argv)).summary).toMatchObject({ done: 1 });
  const usage = [
    ['rewrap', 'old', '--to', 'new', path],
    ['rewrap', 'old', '--to', 'new', '--key', 'ops'],
    ['rotate-master-key', '--key', 'ops', path],
    ['rotate-master-key', '--run', '../x', '--key', 'ops', path],
  ];
  for (const wrong of usage) {
    expect((await pqblk('fleet', ...wrong, ...store)).code).toBe(exitCode('usage'));
  }
});

it('scripts/rekey-fleet is the same command', () => {
  const script = join(ROOT, 'scripts', 'rekey-fleet');
  const { status, stdout } = spawnSync(script, ['--help'], { encoding: 'utf8' });
  expect([status, stdout]).toEqual([0, expect.stringContaining('rotate-master-key')]);
});

it('a report names stale, expiring, expired and policy-breaking keys, and what it cannot read', async () => {
  const top = await fleet();
  const clean = await pqblk('report', top);
  expect([clean.code, clean.stderr]).toEqual([
    0,
    expect.stringContaining(`${COUNT} disks, 0 with findings`),
  ]);
  const path = join(top, 'deep/1.sealed');
  const soon = new Date(Date.now() + 5 * 86_400_000).toISOString().slice(0, 10);
  const add = ['slot', 'add', path, 'new', '--key', 'ops', ...store];
  await pqblkJson(...(add as [string]), '--not-after', soon);
  const kinds = async (...argv: string[]) => {
    const { code, stdout } = await pqblk('report', top, '--json', ...argv);
    const { disks } = JSON.parse(stdout) as { disks: { findings: { kind: string }[] }[] };
    return [code, disks.flatMap(({ findings }) => findings.map(({ kind }) => kind)).sort()];
  };
  expect(await kinds()).toEqual([0, ['expiring']]);
  expect(await kinds('--expiring', '2')).toEqual([0, []]);
  const [code, stale] = await kinds('--stale', '0', '--expiring', '0');
  expect([code, (stale as string[]).length]).toEqual([0, 2 * COUNT + 1]);
  writeFileSync(at('policy.json'), '{"version": 1, "minimumSlots": 3}');
  const broken = await kinds('--policy', at('policy.json'), '--expiring', '0');
  expect(broken).toEqual([exitCode('policy'), Array(COUNT - 1).fill('policy')]);
  await pqblkJson('slot', 'retire', path, 'new', '--key', 'ops', ...store);
  const [ends, retired] = await kinds();
  expect([ends, retired]).toEqual([0, ['stale']]); // its key opens the disk all the same
  const late = join(top, 'deep/3.sealed');
  const past = ['--not-after', '2001-01-01', '--key', 'ops', ...store];
  await pqblkJson('slot', 'add', late, 'new', ...past);
  await pqblkJson('slot', 'retire', late, 'new', '--key', 'ops', ...store);
  expect(await kinds()).toEqual([exitCode('policy'), ['expired', 'stale']]);
  copyFileSync(join(top, 'notes.txt'), join(top, 'x.sealed'));
  const named = await pqblk('report', join(top, '*.sealed'));
  expect([named.code, named.stdout]).toEqual([
    exitCode('io_error'),
    expect.stringContaining('unreadable'),
  ]);
});

const ROTATE = ['rotate-master-key', '--run'];

it('takes a disk with several names for one, and a copy of it for what nobody can decide', async () => {
  const top = at('names');
  mkdirSync(join(top, 'real'), { recursive: true });
  const path = join(top, 'real/1.sealed');
  const make = ['--key', 'ops', '--cluster-size', '4k', '--log-size', '256k', ...store];
  await pqblkJson('create', path, '1M', ...make);
  symlinkSync('real', join(top, 'alias'));
  symlinkSync('real/1.sealed', join(top, 'link.sealed'));
  symlinkSync('..', join(top, 'real/round'));
  linkSync(path, join(top, 'hard.sealed'));
  for (const names of [[top], [join(top, '**/*.sealed')], [join(top, 'alias'), path]]) {
    const planned = await run('rewrap', 'ops', '--to', 'new', '--dry-run', ...names);
    expect(planned.summary).toMatchObject({ disks: 1, done: 1 });
    const { stdout } = await pqblk('report', '--all', '--json', ...names);
    expect(JSON.parse(stdout)).toMatchObject({ looked: 1, disks: [{ findings: [] }] });
  }
  expect((await run(...ROTATE, 'alias', path)).summary).toMatchObject({ done: 1 });
  const again = await run(...ROTATE, 'alias', join(top, 'al*/?.sealed'));
  expect(again.summary).toMatchObject({ done: 0, skipped: 1 });
  copyFileSync(path, join(top, 'copy.sealed'));
  const bytes = [path, join(top, 'copy.sealed')].map((one) => readFileSync(one));
  await pqblkJson('create', join(top, 'other.sealed'), '1M', ...make);
  // Both are one volume to the host: with either changed, it would take the other for an old one put back.
  for (const more of [['--dry-run'], []]) {
    const copies = await run(...ROTATE, 'copies', top, ...more);
    expect([copies.code, copies.summary]).toMatchObject([
      exitCode('ambiguous'),
      { disks: 3, done: 1, failed: 2 },
    ]);
    const failed = copies.events.filter(({ event }) => event === 'failed');
    expect(failed).toHaveLength(2);
    for (const { error } of failed) {
      expect(error?.code).toBe('PQBLK_AMBIGUOUS');
      expect(JSON.stringify(error)).toMatch(/copy\.sealed.*1\.sealed|1\.sealed.*copy\.sealed/);
    }
  }
  expect(readFileSync(path).equals(bytes[0] as Buffer)).toBe(true);
  expect(readFileSync(join(top, 'copy.sealed')).equals(bytes[1] as Buffer)).toBe(true);
  const { code, stdout } = await pqblk('report', '--json', top);
  const { disks } = JSON.parse(stdout) as { disks: { findings: { kind: string }[] }[] };
  expect([code, disks.map(({ findings }) => findings.map(({ kind }) => kind))]).toEqual([
    exitCode('ambiguous'),
    [['copy'], ['copy']],
  ]);
  // Who changes one by name may do so, and is told what to make of the other.
  expect((await run(...ROTATE, 'one', path)).summary).toMatchObject({ done: 1 });
  const other = await pqblk('slot', 'test', join(top, 'copy.sealed'), '--key', 'ops', ...store);
  expect([other.code, other.stderr]).toEqual([
    exitCode('vmk_changed'),
    expect.stringMatching(/finds copies.*--confirm-vmk [0-9a-f]{64} --allow-rollback/s),
  ]);
});

it('says what it cannot look at, and takes a name that stands for nothing for a mistake', async () => {
  const top = at('hidden');
  mkdirSync(join(top, 'empty'), { recursive: true });
  const path = join(top, 'a.sealed');
  const make = ['--key', 'ops', '--cluster-size', '4k', '--log-size', '256k', ...store];
  await pqblkJson('create', path, '1M', ...make);
  const look = async (...argv: string[]) => {
    const { code, stdout } = await pqblk('report', '--json', ...argv);
    const { disks } = JSON.parse(stdout) as { disks: { path: string }[] };
    return [code, disks.map((disk) => disk.path)];
  };
  const failing = exitCode('io_error');
  writeFileSync(join(top, 'b.sealed'), 'no header is left');
  symlinkSync('/nowhere', join(top, 'c.sealed'));
  expect(await look(top)).toEqual([failing, [join(top, 'b.sealed'), join(top, 'c.sealed')]]);
  expect(await look(path, join(top, 'empty'))).toEqual([failing, [join(top, 'empty')]]);
  expect(await look(path, join(top, '*.typo'))).toEqual([failing, [join(top, '*.typo')]]);
  const events = await run(...ROTATE, 'hidden', top, join(top, 'empty'));
  expect(events.summary).toMatchObject({ disks: 4, done: 1, failed: 3 });
  writeFileSync(at('nothing'), '# no disk\n');
  for (const nothing of [[], ['--list', at('nothing')]]) {
    expect((await pqblk('report', ...nothing)).code).toBe(exitCode('usage'));
  }
});

it('passes no disk over whose name is not UTF-8', async () => {
  const top = at('latin');
  mkdirSync(top);
  const raw = (name: string) =>
    Buffer.concat([Buffer.from(`${top}/`), Buffer.from(name, 'latin1')]);
  const make = ['--key', 'ops', '--cluster-size', '4k', '--log-size', '256k', ...store];
  for (const name of ['a', 'b', 'c', 'd']) {
    await pqblkJson('create', join(top, `${name}.sealed`), '1M', ...make);
  }
  renameSync(join(top, 'b.sealed'), raw('vm\xe4.sealed'));
  renameSync(join(top, 'c.sealed'), raw('vm\xf6'));
  writeFileSync(raw('n\xf6tes.txt'), 'no disk\n');
  const deep = 'v\ufffdms/deep/\ufffd.sealed';
  mkdirSync(raw('v\xe4ms/deep'), { recursive: true });
  renameSync(join(top, 'd.sealed'), raw('v\xe4ms/deep/\xfc.sealed'));
  const named = ['vm\ufffd.sealed', deep];
  for (const [argument, names] of [
    [top, [...named, 'vm\ufffd']],
    [join(top, '**', '*.sealed'), named],
    [join(top, '*', 'deep', '?.sealed'), [deep]],
  ] as const) {
    const { code, stdout } = await pqblk('report', '--json', argument);
    const { disks } = JSON.parse(stdout) as { disks: { path: string }[] };
    expect(code).toBe(exitCode('io_error'));
    expect(disks.map(({ path }) => path).sort()).toEqual(
      names.map((name) => join(top, name)).sort(),
    );
  }
  const events = await run(...ROTATE, 'latin', join(top, '*.sealed'));
  expect([events.code, events.summary]).toMatchObject([
    exitCode('unsupported'),
    { disks: 2, done: 1, failed: 1 },
  ]);
  symlinkSync(raw('vm\xe4.sealed'), join(top, 'z.sealed'));
  expect((await run(...ROTATE, 'latin', join(top, '*.sealed'))).summary).toMatchObject({
    ...{ disks: 2, done: 1, skipped: 1 },
  });
});

it('minds no name that is not UTF-8 of what is no disk', async () => {
  const top = at('latin-others');
  mkdirSync(top);
  const raw = (name: string) =>
    Buffer.concat([Buffer.from(`${top}/`), Buffer.from(name, 'latin1')]);
  const make = ['--key', 'ops', '--cluster-size', '4k', '--log-size', '256k', ...store];
  await pqblkJson('create', join(top, 'a.sealed'), '1M', ...make);
  mkdirSync(raw('\xe4'));
  writeFileSync(raw('\xe4/n\xf6tes.txt'), 'no disk\n');
  symlinkSync('nowhere', raw('\xe4/\xf6'));
  const listener = createServer().listen(join(top, 'socket'));
  await once(listener, 'listening');
  renameSync(join(top, 'socket'), raw('s\xf6cket'));
  expect(spawnSync('mkfifo', [join(top, 'pipe')]).status).toBe(0);
  renameSync(join(top, 'pipe'), raw('p\xefpe.sealed'));
  for (const argument of [top, join(top, '**', '*.sealed')]) {
    const { code, stderr } = await pqblk('report', argument);
    expect([code, stderr]).toEqual([0, expect.stringMatching(/^1 disks, 0 with/)]);
  }
  expect((await run(...ROTATE, 'latin-others', top)).summary).toMatchObject({ disks: 1, done: 1 });
  listener.close();
  await once(listener, 'close');
});

it('says so of what it may not look at', ({ skip }) => {
  const top = at('shut');
  mkdirSync(join(top, 'open'), { recursive: true });
  mkdirSync(join(top, 'lost+found'));
  writeFileSync(join(top, 'open/x'), 'no disk');
  const shut = [join(top, 'lost+found'), join(top, 'open/x')];
  for (const path of [dir, top]) chmodSync(path, 0o755);
  for (const path of shut) chmodSync(path, 0);
  const user = process.getuid?.() === 0 ? { uid: 65534, gid: 65534 } : {}; // root may look at anything
  const as = (...argv: string[]) =>
    spawnSync(process.execPath, [MAIN, ...argv], { encoding: 'utf8', ...user });
  const able = as('--version').status === 0;
  const { status, stdout } = as('report', top, '--json');
  for (const path of shut) chmodSync(path, 0o700);
  if (!able) skip('SKIP: another user may not run the command where it lies');
  const { disks } = JSON.parse(stdout) as { disks: { path: string }[] };
  expect([status, disks.map(({ path }) => path)]).toEqual([exitCode('io_error'), shut]);
});

it('goes on with a journal whose last line was cut short', async () => {
  const top = await fleet();
  const [one, two] = [join(top, 'deep/1.sealed'), join(top, 'deep/3.sealed')];
  await run(...ROTATE, 'torn', one);
  const journal = at('state/pqblk/fleet/torn.journal');
  appendFileSync(journal, '{"volume":"/tmp/half');
  expect((await run(...ROTATE, 'torn', two)).summary).toMatchObject({ done: 1 });
  expect((await run(...ROTATE, 'torn', one, two)).summary).toMatchObject({ skipped: 2 });
});

it('changes the master key for a slot that was moved before, once', async () => {
  const top = await fleet();
  const [one, two] = [join(top, 'deep/1.sealed'), join(top, 'deep/3.sealed')];
  const argv = ['rewrap', 'old', '--to', 'new', one, two];
  expect((await run('rewrap', 'old', '--to', 'new', one)).summary).toMatchObject({ done: 1 });
  const both = await run(...argv, '--rotate-master-key');
  for (const { before, after } of both.events) expect(after?.vmkCheck).not.toBe(before?.vmkCheck);
  expect(both.summary).toMatchObject({ done: 2 });
  const again = await run(...argv, '--rotate-master-key');
  expect(again.summary).toMatchObject({ skipped: 2 });
});

it('refuses options that are of one disk', async () => {
  const top = await fleet();
  const argv = ['fleet', ...ROTATE, 'wrong', top, ...store];
  for (const more of [
    ['--key', 'ops', '--audit', at('one.log')],
    ['--recovery-code', at('code')],
    ['--key', 'ops', '--key', 'old'],
  ]) {
    const { code, stderr } = await pqblk(...argv, ...more);
    expect([code, stderr]).toEqual([
      exitCode('usage'),
      expect.stringMatching(/one disk|another was named/),
    ]);
  }
  rmSync(top, { recursive: true });
});
