// `pqblk slot`, `rewrap` and `rotate-master-key` as their users type them: what they change, what they
// refuse and with which exit code, and that running them twice changes nothing.
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import type { ChangedKeyArea, SlotDescription } from '../../src/index.js';
import { exitCode, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const NAMES = ['alice', 'bob', 'carol', 'mallory'];
const fingerprints = new Map<string, string>();

interface Report extends ChangedKeyArea {
  readonly warnings: string[];
  readonly advice: string[];
}

beforeAll(async () => {
  for (const name of NAMES) {
    const { fingerprint } = await pqblkJson<{ fingerprint: string }>(
      ...['key', 'gen', name, '--no-passphrase', '--store', at('keys')],
    );
    fingerprints.set(name, fingerprint);
    await pqblk('key', 'export', name, '--public', '-o', at(`${name}.pub`), '--store', at('keys'));
  }
});

let made = 0;
/** A new disk, sealed to these keys. */
async function disk(...keys: string[]): Promise<string> {
  made += 1;
  const path = at(`${made}.sealed`);
  const named = keys.flatMap((key) => ['--key', key]);
  await pqblkJson('create', path, '16M', ...named, '--log-size', '8M', '--store', at('keys'));
  return path;
}

const withStore = (argv: string[]) => [...argv, '--store', at('keys')];
const report = (...argv: string[]) => pqblkJson<Report>(...withStore(argv));
const run = (...argv: string[]) => pqblk(...withStore(argv));
const opens = async (path: string, key: string) =>
  (await run('slot', 'test', path, '--key', key)).code;
const states = (slots: readonly SlotDescription[]) =>
  slots.map(({ label, role, state }) => `${label} ${role} ${state}`);

describe('slot', () => {
  it('adds keys of the store and of files, tests what it can, and adds nothing twice', async () => {
    const path = await disk('alice');
    const added = await report('slot', 'add', path, 'bob', '--key', 'alice');
    expect(added.changed).toBe(true);
    expect(added.advice).toEqual([]); // it was tested: the store has the private half
    expect(await opens(path, 'bob')).toBe(0);
    const recovery = [
      '--role',
      'recovery',
      '--label',
      'safe, building 2',
      '--not-after',
      '2099-01-01',
    ];
    const safe = await report('slot', 'add', path, at('carol.pub'), ...recovery, '--key', 'bob');
    expect(safe.advice.join()).toContain('was not tested');
    expect(safe.warnings).toEqual(['only one recovery slot is left']);
    const { slots } = await pqblkJson<{ slots: SlotDescription[] }>('slot', 'list', path);
    expect(states(slots)).toEqual([
      'alice primary active',
      'bob primary active',
      'safe, building 2 recovery active',
    ]);
    expect(slots[2]?.notAfter).toBe('2099-01-01T00:00:00.000Z');
    const before = readFileSync(path);
    const again = await report('slot', 'add', path, 'bob', '--key', 'alice');
    expect(again.changed).toBe(false);
    expect(readFileSync(path).equals(before)).toBe(true);
  });

  it('lists without a key, and says when a copy is damaged', async () => {
    const path = await disk('alice', 'bob');
    const { code, stdout, stderr } = await pqblk('slot', 'list', path);
    expect([code, stderr]).toEqual([0, '']);
    expect(stdout.split('\n')[2]).toMatch(/^1 +bob +primary +active +ML-KEM-768 +[0-9a-f]{16} /);
    const bytes = readFileSync(path);
    bytes.fill(7, bytes.indexOf('PQBLKKEY'), bytes.indexOf('PQBLKKEY') + 32);
    writeFileSync(path, bytes);
    expect((await pqblk('slot', 'list', path)).stderr).toContain('DAMAGED');
  });

  it('revokes: the key opens no more, the others do; the last one only by force', async () => {
    const path = await disk('alice', 'bob', 'carol');
    const dry = await report('slot', 'revoke', path, 'bob', '--key', 'alice', '--dry-run');
    expect([dry.changed, dry.dryRun]).toEqual([true, true]);
    expect(await opens(path, 'bob')).toBe(0);
    const done = await report('slot', 'revoke', path, 'bob', '--key', 'alice');
    expect(done.advice.join()).toContain('rotate-data-key');
    expect(done.after.vmkCheck).not.toBe(done.before.vmkCheck);
    expect(await opens(path, 'bob')).toBe(exitCode('slot_revoked'));
    expect([await opens(path, 'alice'), await opens(path, 'carol')]).toEqual([0, 0]);
    const again = await report('slot', 'revoke', path, 'bob', '--key', 'alice');
    expect(again.changed).toBe(false);

    const both = ['slot', 'revoke', path, 'alice', 'carol', '--key', 'alice'];
    const refused = await run(...both);
    expect(refused.code).toBe(exitCode('policy'));
    expect(refused.stderr).toContain('last active');
    const forced = await report(...both, '--force');
    expect(forced.warnings).toEqual(['no active slot is left: nobody can open this disk']);
    expect(await opens(path, 'alice')).toBe(exitCode('slot_revoked'));
  });

  it('retires: opens until the master key changes', async () => {
    const path = await disk('alice', 'bob');
    await report('slot', 'retire', path, 'bob', '--key', 'alice');
    expect(await opens(path, 'bob')).toBe(0);
    await report('slot', 'retire', path, 'bob', '--undo', '--key', 'alice');
    await report('slot', 'retire', path, '1', '--key', 'alice');
    const last = await run('slot', 'retire', path, 'alice', '--key', 'alice');
    expect(last.code).toBe(exitCode('policy'));
    await report('rotate-master-key', path, '--key', 'alice');
    expect(await opens(path, 'bob')).toBe(exitCode('slot_revoked'));
  });

  it('takes hybrid keys, which open the disk and are kept under a passphrase', async () => {
    const path = await disk('alice');
    writeFileSync(at('new-passphrase'), 'another one\n');
    const passphrase = ['--passphrase-file', at('new-passphrase')];
    const key = await pqblkJson<{ kem: string }>(
      ...withStore(['key', 'gen', `hybrid-${made}`, '--kem', 'x-wing', ...passphrase]),
    );
    expect(key.kem).toBe('X-Wing');
    const tested = ['--new-passphrase-file', at('new-passphrase'), '--key', 'alice'];
    const added = await report('slot', 'add', path, `hybrid-${made}`, ...tested);
    expect([added.after.slots[1]?.kem, added.advice]).toEqual(['X-Wing', []]);
    const { code } = await run('slot', 'test', path, '--key', `hybrid-${made}`, ...passphrase);
    expect(code).toBe(0);
  });

  it('warns of slots past their date', async () => {
    const path = await disk('alice');
    const date = ['--not-after', '2001-01-01'];
    const added = await report('slot', 'add', path, 'bob', ...date, '--key', 'alice');
    expect(added.warnings.join()).toContain('past its date');
    const { stderr, code } = await run('slot', 'test', path, '--key', 'bob');
    expect([code, stderr]).toEqual([0, expect.stringContaining('past its date')]);
    expect((await pqblk('slot', 'list', path)).stdout).toContain('2001-01-01 PAST');
  });

  it('finds a slot by number, label, fingerprint; says which there are; asks which of several', async () => {
    const path = await disk('alice', 'bob');
    const byDigits = (fingerprints.get('bob') as string).slice(0, 8);
    expect((await report('rewrap', path, byDigits, '--key', 'alice')).changed).toBe(true);
    const none = await run('rewrap', path, 'dave', '--key', 'alice');
    expect(none.code).toBe(exitCode('slot_not_found'));
    expect(none.stderr).toContain('0 "alice", 1 "bob"');
    await report('slot', 'add', path, 'carol', '--label', 'bob', '--key', 'alice');
    const several = await run('rewrap', path, 'bob', '--key', 'alice');
    expect(several.code).toBe(exitCode('ambiguous'));
    for (const date of ['soon', '2027-02-30', '2027-13-01']) {
      const wrong = await run('slot', 'add', path, 'mallory', '--not-after', date);
      expect([date, wrong.code]).toEqual([date, exitCode('usage')]);
    }
  });
});

describe('a label that was revoked before', () => {
  it('is revoked again, and once more means that nothing is to be done', async () => {
    const path = await disk('alice', 'bob');
    const revoke = ['slot', 'revoke', path, 'bob', '--key', 'alice'];
    expect((await report(...revoke)).changed).toBe(true);
    await report('slot', 'add', path, 'bob', '--key', 'alice');
    const again = await report(...revoke);
    expect(states(again.after.slots)).toEqual([
      'alice primary active',
      'bob primary revoked',
      'bob primary revoked',
    ]);
    expect((await report(...revoke)).changed).toBe(false);
    const rewrap = await run('rewrap', path, 'bob', '--key', 'alice');
    expect(rewrap.code).toBe(exitCode('slot_revoked'));
  });
});

describe('rewrap and rotate-master-key', () => {
  it('rewrap moves a slot to a new key, and is done when it is run again', async () => {
    const path = await disk('alice', 'bob');
    const argv = ['rewrap', path, 'bob', '--to', 'carol', '--key', 'alice'];
    const { after, advice } = await report(...argv);
    expect(states(after.slots)).toEqual(['alice primary active', 'carol primary active']);
    expect(advice.join()).toContain('--rotate-master-key');
    expect([await opens(path, 'carol'), await opens(path, 'bob')]).toEqual([
      0,
      exitCode('no_slot'),
    ]);
    expect((await report(...argv)).changed).toBe(false);
  });

  it('rewrap --keep-old --rotate-master-key: the former key ends with the former master key', async () => {
    const path = await disk('alice', 'bob');
    const kept = await report(
      'rewrap',
      path,
      'bob',
      '--to',
      'carol',
      '--keep-old',
      '--key',
      'alice',
    );
    expect(states(kept.after.slots)[2]).toBe('bob primary decrypt-only');
    expect(await opens(path, 'bob')).toBe(0);
    const argv = ['rewrap', path, '0', '--to', 'mallory', '--rotate-master-key', '--key', 'alice'];
    const moved = await report(...argv);
    expect(states(moved.after.slots)).toEqual([
      'mallory primary active',
      'carol primary active',
      'bob primary revoked',
    ]);
    expect(await opens(path, 'mallory')).toBe(0);
  });

  it('without a slot seals the opener anew', async () => {
    const path = await disk('alice', 'bob');
    const { before, after } = await report('rewrap', path, '--key', 'bob');
    expect(after.slots).toEqual(before.slots);
    expect(after.vmkCheck).toBe(before.vmkCheck);
    expect(after.generation).toBe(before.generation + 1);
  });

  it('rotate-master-key --from does it once', async () => {
    const path = await disk('alice', 'bob');
    const { before } = await report('rotate-master-key', path, '--key', 'alice', '--dry-run');
    const from = ['--from', (before.vmkCheck as string).slice(0, 16), '--key', 'alice'];
    expect((await report('rotate-master-key', path, ...from)).changed).toBe(true);
    expect((await report('rotate-master-key', path, ...from)).changed).toBe(false);
    expect([await opens(path, 'alice'), await opens(path, 'bob')]).toEqual([0, 0]);
  });

  it('seals to no key that only the image names', async () => {
    const path = await disk('alice', 'bob');
    const elsewhere = at(`store-${made}`);
    const backup = at(`alice-${made}.backup`);
    writeFileSync(at('passphrase'), 'a passphrase\n');
    const passphrase = ['--passphrase-file', at('passphrase')];
    await run('key', 'export', 'alice', '-o', backup, ...passphrase);
    const kept = ['--no-passphrase', '--store', elsewhere];
    expect((await pqblk('key', 'import', backup, ...passphrase, ...kept)).code).toBe(0);
    const rotate = ['rotate-master-key', path, '--key', 'alice', '--store', elsewhere];
    const refused = await pqblk(...rotate);
    expect(refused.code).toBe(exitCode('policy'));
    expect(refused.stderr).toContain(fingerprints.get('bob'));
    const short = (fingerprints.get('bob') as string).slice(0, 31);
    expect((await pqblk(...rotate, '--trust', short)).code).toBe(exitCode('usage'));
    expect((await pqblk(...rotate, '--trust', `${short}${'0'.repeat(33)}`)).code).toBe(
      exitCode('policy'),
    );
    expect((await pqblk(...rotate, '--trust', fingerprints.get('bob') as string)).code).toBe(0);
    expect((await pqblk(...rotate, '--trust', at('bob.pub'))).code).toBe(0);
  });

  it('another host has to confirm a master key that was changed elsewhere', async () => {
    const path = await disk('alice', 'bob');
    const copy = at(`copy-${made}.sealed`);
    copyFileSync(path, copy);
    const { after } = await report('rotate-master-key', path, '--key', 'alice');
    const old = await run('slot', 'test', copy, '--key', 'alice');
    expect(old.code).toBe(exitCode('vmk_changed'));
    expect((await run('slot', 'test', path, '--key', 'alice')).code).toBe(0);
    expect(after.vmkCheck).toHaveLength(64);
  });
});
