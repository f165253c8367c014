// What a policy demands of keys and slots, and how it refuses, from the command line.
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { openDisk, rotateDataKey } from '../../src/index.js';
import { KeyStore } from '../../src/keys/index.js';
import { exitCode, pqblk, program } from './helpers.js';
import { at, disk, made, policy, refused, report, run, withStore } from './key-disks.js';

/** A rotation of the data key that has only begun; the bytes of the disk then. */
async function beginRotation(path: string): Promise<Buffer> {
  const store = new KeyStore(at('keys'));
  using identity = await store.unlock('alice');
  {
    await using disk = await openDisk(path, { format: 'sealed', identity, pins: store.pins });
    const onStep = async (step: string) => {
      if (step === 'prepared') throw new Error('stop here');
    };
    const pins = store.pins;
    await expect(rotateDataKey(disk, { identity, pins, onStep })).rejects.toThrow('stop here');
  }
  return readFileSync(path);
}

describe('a policy', () => {
  it('is asked when a disk is made', async () => {
    const rules = policy('minimumSlots: 2\nrecoverySlot: true\nkems: [ML-KEM-768, x-wing]');
    const make = (...argv: string[]) =>
      run('create', at('refused.sealed'), '16M', '--policy', rules, ...argv);
    const one = await make('--key', 'alice');
    expect(one.code).toBe(refused);
    expect(one.stderr).toMatch(/1 active slots, at least 2.*no active recovery slot/);
    const wide = await make('--key', 'alice', '--recovery-key', 'wide');
    expect(wide.stderr).toContain('uses ML-KEM-1024');
    expect(existsSync(at('refused.sealed'))).toBe(false);
    await disk('--key', 'alice', '--recovery-key', 'bob', '--policy', rules);
  });

  it('lets nothing get worse, and what is wrong be mended step by step', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const rules = ['--policy', policy('minimumSlots: 3\nrecoverySlot: true'), '--key', 'alice'];
    expect((await run('slot', 'revoke', path, 'bob', ...rules)).code).toBe(refused);
    const before = readFileSync(path);
    expect((await run('slot', 'retire', path, 'bob', ...rules)).code).toBe(refused);
    expect(readFileSync(path).equals(before)).toBe(true);
    await report('slot', 'add', path, 'carol', ...rules); // no recovery slot yet: as before
    await report('slot', 'add', path, 'hybrid', '--role', 'recovery', ...rules);
    await report('slot', 'revoke', path, 'bob', ...rules);
    expect((await run('slot', 'revoke', path, 'hybrid', ...rules)).code).toBe(refused);
  });

  it('refuses mixed KEMs, old keys, and keys out of date', async () => {
    const path = await disk('--key', 'alice');
    const mixed = ['--policy', policy('mixedKems: refuse'), '--key', 'alice'];
    const hybrid = await run('slot', 'add', path, 'hybrid', ...mixed);
    expect([hybrid.code, hybrid.stderr]).toEqual([refused, expect.stringContaining('hybrid')]);
    const pair = await disk('--key', 'alice', '--key', 'bob');
    const strict = ['--policy', policy('mixedKems: refuse\nminimumSlots: 2'), '--key', 'alice'];
    expect((await run('slot', 'add', pair, 'hybrid', ...strict)).code).toBe(refused);
    await report('rewrap', pair, 'bob', '--to', 'hybrid', ...strict);
    expect((await run('slot', 'add', pair, 'carol', ...strict)).code).toBe(refused);
    await report('rewrap', pair, 'alice', '--to', 'hybrid-2', ...strict);
    expect((await run('slot', 'list', pair)).stdout).not.toMatch(/active +ML-KEM/);
    const back = ['rewrap', pair, 'hybrid', '--to', 'carol', '--key', 'hybrid-2'];
    expect((await run(...back, ...strict.slice(0, 2))).code).toBe(refused);
    await report('slot', 'add', path, 'bob', '--not-after', '2001-01-01', '--key', 'alice');
    const late = policy('expiredSlots: refuse');
    const opened = await run('check', path, '--key', 'bob', '--policy', late);
    expect([opened.code, opened.stderr]).toEqual([
      exitCode('key_expired'),
      expect.stringContaining('past its date'),
    ]);
    expect((await run('check', path, '--key', 'alice', '--policy', late)).code).toBe(0);
    expect((await run('check', path, '--key', 'bob')).code).toBe(0);
    const age = [
      '--policy',
      policy('maximumKeyAgeDays: 0\nexpiredSlots: refuse'),
      '--key',
      'alice',
    ];
    expect((await run('check', path, ...age)).code).toBe(exitCode('key_expired'));
    expect((await run('slot', 'add', path, 'carol', ...age)).code).toBe(exitCode('key_expired'));
  });

  it('vouches for keys, and asks a second person who has a key of the same disk', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const rules = ['--policy', policy('twoPersons: [slot-revoke, rotate-master-key]')];
    const rotate = ['rotate-master-key', path, '--key', 'alice', ...rules];
    expect((await run(...rotate)).stderr).toContain('--approve');
    expect((await run(...rotate, '--approve', 'alice')).code).toBe(refused); // himself
    expect((await run(...rotate, '--approve', 'carol')).code).toBe(exitCode('no_slot'));
    expect((await run(...rotate, '--approve', 'bob')).code).toBe(0);
    expect((await run('rewrap', path, '--key', 'alice', ...rules)).code).toBe(0); // needs no second
  });

  it('asks the second person for what a change amounts to, whatever it is called', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const rules = ['--key', 'alice', '--policy', policy('twoPersons: [slot-revoke]')];
    const before = readFileSync(path);
    const moved = await run('rewrap', path, 'bob', '--to', 'carol', ...rules);
    expect([moved.code, moved.stderr]).toEqual([refused, expect.stringContaining('slot-revoke')]);
    expect(readFileSync(path).equals(before)).toBe(true);
    await report('slot', 'retire', path, 'bob', ...rules); // he still opens the disk
    expect((await run('rotate-master-key', path, ...rules)).code).toBe(refused);
    const self = await run('rotate-master-key', path, ...rules, '--approve', 'bob');
    expect([self.code, self.stderr]).toEqual([refused, expect.stringContaining('decrypt-only')]);
    await report('slot', 'retire', path, 'bob', '--undo', ...rules);
    await report('rewrap', path, 'alice', '--to', 'carol', ...rules, '--approve', 'bob');

    const adds = ['--key', 'bob', '--policy', policy('twoPersons: [slot-add, rotate-master-key]')];
    expect((await run('rewrap', path, 'carol', '--to', 'alice', ...adds)).code).toBe(refused);
    expect((await run('rewrap', path, 'bob', '--rotate-master-key', ...adds)).code).toBe(refused);
    expect((await run('rewrap', path, 'bob', ...adds)).code).toBe(0);
  });

  it('is missed where one person could become two', async () => {
    const path = await disk('--key', 'alice');
    const under = (twoPersons: string) => {
      const rules = ['--policy', policy(`twoPersons: [${twoPersons}]`), '--dry-run'];
      return program(...withStore(['slot', 'add', path, 'bob', '--key', 'alice', ...rules]));
    };
    expect(under('slot-revoke').stderr).toContain('not for slot-add');
    expect(under('').stderr).not.toContain('warning');
    const whole = under('slot-add, slot-revoke');
    expect([whole.code, whole.stderr]).toEqual([refused, expect.not.stringContaining('warning')]);
  });

  it('is named by the environment with an absolute path, or not at all', async () => {
    const path = await disk('--key', 'alice');
    process.env.PQBLK_POLICY = 'policy.yaml';
    try {
      expect((await run('check', path, '--key', 'alice')).code).toBe(exitCode('usage'));
    } finally {
      delete process.env.PQBLK_POLICY;
    }
  });

  it('is not done without because a variable was not set', async () => {
    const path = await disk('--key', 'alice');
    const { code, stderr } = await run('rewrap', path, '--key', 'alice', '--policy', '');
    expect([code, stderr]).toEqual([exitCode('usage'), expect.stringContaining('--policy')]);
  });

  it('lets nobody end all keys at once by making another disk in the place', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const before = readFileSync(path);
    const rules = ['--policy', policy('twoPersons: [slot-add, slot-revoke]')];
    const replace = ['create', path, '16M', '--key', 'carol', '--force', ...rules];
    const { code, stderr } = await run(...replace);
    expect([code, stderr]).toEqual([refused, expect.stringContaining('two persons')]);
    expect(readFileSync(path).equals(before)).toBe(true);
    writeFileSync(path, Buffer.alloc(4096, 1)); // no sealed disk any more
    expect((await run(...replace)).code).toBe(0);
  });

  it('excuses the key that is wrong already, and none that takes its place', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const rules = ['--key', 'alice', '--policy', policy('kems: [X-Wing]')];
    expect((await run('rewrap', path, 'bob', '--to', 'carol', ...rules)).code).toBe(refused);
    await report('rewrap', path, 'bob', ...rules);
    await report('rewrap', path, 'bob', '--to', 'hybrid', ...rules);
  });

  it('lets a key that is out of date open nothing, change nothing and approve nothing', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const late = ['--label', 'late', '--not-after', '2001-01-01'];
    await report('slot', 'add', path, 'carol', ...late, '--key', 'alice');
    const backup = at(`late-${made}.header`);
    expect((await pqblk('header', 'backup', path, backup)).code).toBe(0);
    await report('rewrap', path, '--key', 'alice');
    writeFileSync(at('empty.log'), '');
    const rules = ['--policy', policy('expiredSlots: refuse\ntwoPersons: [slot-revoke]')];
    const before = readFileSync(path);
    for (const argv of [
      ['slot', 'test', path],
      ['slot', 'add', path, 'hybrid'],
      ['rotate-master-key', path],
      ['rotate-data-key', path],
      ['fleet', 'rotate-master-key', '--run', `late-${made}`, path],
      ['header', 'restore', path, backup, '--allow-rollback'],
      ['audit', 'verify', path, '--audit', at('empty.log')],
    ]) {
      const { code } = await run(...argv, '--key', 'carol', ...rules);
      expect([argv[0], code]).toEqual([argv[0], exitCode('key_expired')]);
    }
    const revoke = ['slot', 'revoke', path, 'bob', '--key', 'alice', ...rules];
    expect((await run(...revoke, '--approve', 'carol')).code).toBe(exitCode('key_expired'));
    expect(readFileSync(path).equals(before)).toBe(true);
  });

  it('is asked before a rotation of the data key goes on or back, and so is the log', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const twice = ['--key', 'alice', '--policy', policy('twoPersons: [rotate-data-key]')];
    const halfway = await beginRotation(path);
    for (const argv of [
      twice,
      [...twice, '--abort'],
      ['--key', 'alice', '--audit', at('no/log')],
    ]) {
      const { code } = await run('rotate-data-key', path, ...argv);
      expect([refused, exitCode('audit_log')]).toContain(code);
      expect(readFileSync(path).equals(halfway)).toBe(true);
    }
    const log = at(`rotation-${made}.log`);
    const both = ['--approve', 'bob', '--audit', log];
    expect((await run('rotate-data-key', path, ...twice, ...both, '--abort')).code).toBe(0);
    expect((await run('rotate-data-key', path, ...twice, ...both)).code).toBe(0);
    const lines = readFileSync(log, 'utf8').trimEnd().split('\n');
    expect(lines.map((line) => (JSON.parse(line) as { rotation: object }).rotation)).toEqual([
      { step: 'aborted', fromEpoch: 2, toEpoch: 1 },
      { step: 'begun', fromEpoch: 1, toEpoch: 2 },
      { step: 'finished', fromEpoch: 1, toEpoch: 2 },
    ]);
  });

  it('is asked before a rotation opens a disk that was not closed', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const store = new KeyStore(at('keys'));
    using identity = await store.unlock('alice');
    const open = await openDisk(path, { format: 'sealed', identity, pins: store.pins });
    await open.write(Buffer.alloc(65536, 7), 0);
    await open.flush();
    const unclean = readFileSync(path); // as a host that crashes leaves it
    await open.close();
    writeFileSync(path, unclean);
    expect((await pqblk('info', path)).stdout).toMatch(/closed cleanly +no/);
    const rotate = ['rotate-data-key', path, '--key', 'alice'];
    const rules = ['--policy', policy('twoPersons: [rotate-data-key]')];
    expect((await run(...rotate, '--dry-run')).code).toBe(0);
    expect((await run(...rotate, ...rules)).code).toBe(refused);
    expect(readFileSync(path).equals(unclean)).toBe(true);
    expect((await run(...rotate, ...rules, '--approve', 'bob')).code).toBe(0);
    expect((await run('check', path, '--key', 'bob')).code).toBe(0);
  });

  it('keeps relative directories beside its file', async () => {
    mkdirSync(at('beside/logs'), { recursive: true });
    writeFileSync(at('beside/policy.yaml'), 'version: 1\nauditDirectory: logs\n');
    const path = await disk('--key', 'alice');
    await report('rewrap', path, '--key', 'alice', '--policy', at('beside/policy.yaml'));
    expect(readdirSync(at('beside/logs')).filter((name) => name.endsWith('.log'))).toHaveLength(1);
  });

  it('is refused itself when it says what nobody would check', async () => {
    const path = await disk('--key', 'alice');
    const wrong = {
      'minimumSlot: 2': 'unknown field',
      'minimumSlots: many': 'minimumSlots',
      'kems: [rot13]': 'found "rot13", expected names of KEMs',
      'twoPersons: [everything]': 'found "everything", expected slot-add, slot-retire,',
      'trusted: [abc]': 'found "abc", expected fingerprints',
      'mixedKems: maybe': 'mixedKems',
      'recoverySlot: 1': 'recoverySlot',
      '- : [': 'policy',
    };
    for (const [text, complaint] of Object.entries(wrong)) {
      const { code, stderr } = await run('rewrap', path, '--policy', policy(text));
      expect([code, stderr]).toEqual([
        exitCode('invalid_argument'),
        expect.stringContaining(complaint),
      ]);
    }
    // Nobody has a second key of a disk that is not there.
    const making = ['create', at('approved.sealed'), '16M', '--key', 'alice', '--policy'];
    const unapprovable = await run(...making, policy('twoPersons: [slot-add, create]'));
    expect([unapprovable.code, unapprovable.stderr]).toEqual([
      exitCode('invalid_argument'),
      expect.stringMatching(/found "create", expected slot-add, .*hint: leave it out/s),
    ]);
    expect((await run(...making, policy('twoPersons: [slot-add, slot-revoke]'))).code).toBe(0);
    const twice = '{"version": 1, "twoPersons": ["slot-revoke"],\n\t"twoPersons": []}';
    writeFileSync(at('twice.json'), twice);
    const said = await run('rewrap', path, '--policy', at('twice.json'));
    expect([said.code, said.stderr]).toEqual([
      exitCode('invalid_argument'),
      expect.stringContaining('unique'),
    ]);
    writeFileSync(at('later.json'), '{"version": 2}');
    const later = await run('rewrap', path, '--policy', at('later.json'));
    expect(later.code).toBe(exitCode('newer_version'));
    expect((await run('rewrap', path, '--policy', at('none.yaml'))).code).toBe(
      exitCode('not_found'),
    );
  });
});
