// `pqblk rewrap`, `slot revoke` and `slot add` where half of what is asked for is done already, and where
// nobody who is at hand could open the disk afterwards.
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect, it } from 'vitest';
import type { ChangedKeyArea } from '../../src/index.js';
import { exitCode, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);

beforeAll(async () => {
  for (const name of ['alice', 'bob', 'carol']) {
    await run('key', 'gen', name, '--no-passphrase');
    await run('key', 'export', name, '--public', '-o', at(`${name}.pub`));
  }
});

let made = 0;
async function disk(...options: string[]): Promise<string> {
  made += 1;
  const path = at(`${made}.sealed`);
  await pqblkJson('create', path, '1M', ...options, '--store', at('keys'));
  return path;
}

const run = (...argv: string[]) => pqblk(...argv, '--store', at('keys'));
const report = (...argv: string[]) => pqblkJson<ChangedKeyArea>(...argv, '--store', at('keys'));
const opens = async (path: string, key: string) =>
  (await run('slot', 'test', path, '--key', key)).code;
const states = ({ after }: ChangedKeyArea) =>
  after.slots.map(({ label, state }) => `${label} ${state}`);

it('does not move the only slot to a key that nobody has tested, unless forced', async () => {
  const path = await disk('--key', 'alice');
  const bytes = readFileSync(path);
  const argv = ['rewrap', path, 'alice', '--to', at('bob.pub'), '--key', 'alice'];
  for (const more of [[], ['--dry-run'], ['--keep-old', '--rotate-master-key']]) {
    const refused = await run(...argv, ...more);
    expect(refused.code).toBe(exitCode('policy'));
    expect(refused.stderr).toContain('no key that is at hand');
  }
  const own = await run('slot', 'revoke', path, 'alice', '--key', 'alice');
  expect(own.code).toBe(exitCode('policy'));
  expect(readFileSync(path).equals(bytes)).toBe(true);
  expect(states(await report(...argv, '--keep-old'))).toEqual(['bob active', 'alice decrypt-only']);
  expect(states(await report(...argv, '--force'))).toEqual(['bob active', 'alice revoked']);
  // A key that stays, or one that can be tested, needs no force.
  const other = await disk('--key', 'alice', '--key', 'carol');
  await report('rewrap', other, 'alice', '--to', at('bob.pub'), '--key', 'carol');
  await report('rewrap', other, 'carol', '--to', 'alice', '--key', 'carol');
});

it('does what an earlier run of rewrap has left to do', async () => {
  const path = await disk('--key', 'alice');
  const argv = ['rewrap', path, 'alice', '--to', 'bob'];
  const kept = await report(...argv, '--keep-old', '--key', 'alice');
  expect((await report(...argv, '--keep-old', '--key', 'alice')).changed).toBe(false);
  const rotated = await report(...argv, '--rotate-master-key', '--key', 'bob');
  expect(rotated.after.vmkCheck).not.toBe(kept.after.vmkCheck);
  expect(await opens(path, 'alice')).toBe(exitCode('slot_revoked'));

  const again = await disk('--key', 'alice');
  const [, , ...rest] = argv;
  await report('rewrap', again, ...rest, '--keep-old', '--key', 'alice');
  const ended = await report('rewrap', again, ...rest, '--key', 'bob');
  expect([ended.changed, ended.after.vmkCheck]).toEqual([true, ended.before.vmkCheck]);
  expect(await opens(again, 'alice')).toBe(exitCode('slot_revoked'));
  expect((await report('rewrap', again, ...rest, '--key', 'bob')).changed).toBe(false);
});

it('hands the date on, and asks for another one where it has passed', async () => {
  const path = await disk('--key', 'alice');
  const [soon, later] = ['2098-12-31', '2099-12-31'];
  await report('slot', 'add', path, 'bob', '--not-after', soon, '--key', 'alice');
  const date = (slots: readonly { label: string; notAfter?: string | undefined }[]) =>
    slots.find(({ label }) => label === 'carol')?.notAfter?.slice(0, 10);
  const move = ['rewrap', path, 'bob', '--to', 'carol', '--key', 'alice', '--dry-run'];
  expect(date((await report(...move)).after.slots)).toBe(soon);
  const said = await report(...move, '--not-after', later);
  expect(date(said.after.slots)).toBe(later);
  const never = await report(...move, '--not-after', 'never');
  expect(never.after.slots.map(({ label }) => label)).toContain('carol');
  expect(date(never.after.slots)).toBeUndefined();

  const past = await disk('--key', 'alice');
  await report('slot', 'add', past, 'bob', '--not-after', '2001-01-01', '--key', 'alice');
  const moved = ['rewrap', past, 'bob', '--to', 'carol', '--key', 'alice'];
  const refused = await run(...moved);
  expect([refused.code, refused.stderr]).toEqual([
    exitCode('policy'),
    expect.stringContaining('--not-after'),
  ]);
  expect(date((await report(...moved, '--not-after', later)).after.slots)).toBe(later);
  expect((await report(...moved)).changed).toBe(false);
});

it('does not take the slot that a key was moved to for the one that it was moved from', async () => {
  const path = await disk('--key', 'carol', '--key', 'alice');
  const keeping = ['rewrap', path, '1', '--to', 'bob', '--keep-old', '--key', 'carol'];
  const moved = await report(...keeping);
  expect(states(moved)).toEqual(['carol active', 'bob active', 'alice decrypt-only']);
  expect((await report(...keeping)).changed).toBe(false);
  const byNumber = ['rewrap', path, '1', '--to', 'bob', '--key', 'carol'];
  // The number is bob's now: nobody is ended for it, and it is said that alice is there.
  const again = await run(...byNumber);
  expect([again.code, again.stdout]).toEqual([0, expect.stringContaining('nothing to change')]);
  expect(again.stderr).toContain('slot 2 ("alice") still opens the disk');
  const own = await run('rewrap', path, '--to', 'bob', '--key', 'bob');
  expect([own.code, own.stderr]).toEqual([0, expect.stringContaining('slot 2 ("alice")')]);
  const ended = await report('rewrap', path, 'alice', '--to', 'bob', '--key', 'carol');
  expect(states(ended)).toEqual(['carol active', 'bob active', 'alice revoked']);
  expect((await report(...byNumber)).changed).toBe(false);
});

it('knows the former key where the new one has taken its label', async () => {
  const path = await disk('--key', 'carol', '--key', 'alice');
  const argv = ['rewrap', path, 'alice', '--to', 'bob', '--label', 'alice', '--key', 'carol'];
  expect(states(await report(...argv, '--keep-old'))).toEqual([
    'carol active',
    'alice active',
    'alice decrypt-only',
  ]);
  expect((await report(...argv, '--keep-old')).changed).toBe(false);
  expect((await report(...argv)).after.slots[2]?.state).toBe('revoked');
  expect((await report(...argv)).changed).toBe(false);
  expect(await opens(path, 'alice')).toBe(exitCode('slot_revoked'));
});

it('takes no slot for another one that was asked for', async () => {
  const path = await disk('--key', 'alice', '--key', 'bob');
  const add = ['slot', 'add', path, 'bob', '--key', 'alice'];
  expect((await report(...add)).changed).toBe(false);
  for (const more of [
    ['--role', 'recovery'],
    ['--not-after', '2099-01-31'],
    ['--label', 'x'],
  ]) {
    const refused = await run(...add, ...more);
    expect([refused.code, refused.stderr]).toEqual([
      exitCode('slot_exists'),
      expect.stringContaining('("bob", primary, without a date)'),
    ]);
  }
  // Nor for the one that a key was to be moved to.
  const move = ['rewrap', path, 'alice', '--to', 'carol', '--keep-old', '--key', 'alice'];
  const dated = [...move, '--not-after', '2099-01-31'];
  await report(...move);
  const undated = readFileSync(path);
  for (const argv of [
    dated,
    [...dated, '--dry-run'],
    [...move, '--label', 'x'],
    ['rewrap', path, 'carol', '--to', 'carol', '--not-after', '2099-01-31', '--key', 'carol'],
  ]) {
    const refused = await run(...argv);
    expect([refused.code, refused.stderr]).toEqual([
      exitCode('slot_exists'),
      expect.stringContaining('("carol", primary, without a date)'),
    ]);
  }
  expect(readFileSync(path).equals(undated)).toBe(true);
  expect((await report(...move, '--not-after', 'never', '--label', 'carol')).changed).toBe(false);
  await run('key', 'gen', 'laptop', '--no-passphrase');
  const again = ['rewrap', path, 'carol', '--to', 'laptop', '--key'];
  const such = ['--not-after', '2099-01-31', '--label', 'x'];
  expect((await report(...again, 'carol', ...such)).changed).toBe(true);
  expect((await report(...again, 'laptop', ...such)).changed).toBe(false);
  expect((await report(...again, 'laptop')).changed).toBe(false);

  await report('slot', 'retire', path, 'bob', '--key', 'alice');
  const retired = await run(...add);
  expect([retired.code, retired.stderr]).toEqual([
    exitCode('slot_exists'),
    expect.stringContaining('slot retire --undo'),
  ]);
});

it('rotates the data key of a disk with a backing file, when it may open that', async () => {
  writeFileSync(at('base.raw'), Buffer.alloc(1 << 20, 7));
  const path = await disk('--key', 'alice', '--backing', at('base.raw'), '--backing-format', 'raw');
  const rotate = ['rotate-data-key', path, '--key', 'alice'];
  expect((await run(...rotate)).code).toBe(exitCode('gate_refused'));
  const allowed = ['--allow-backing', at('base.raw'), '--allow-unauthenticated-backing'];
  const done = await run(...rotate, ...allowed, '--json');
  expect([done.code, done.stdout]).toEqual([0, expect.stringContaining('"toEpoch": 2')]);
  await run('export', path, at('out.raw'), '--key', 'alice', ...allowed);
  expect(readFileSync(at('out.raw')).equals(readFileSync(at('base.raw')))).toBe(true);
});
