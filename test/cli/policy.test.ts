// Policies, the two-person rule and the audit log, as a security team uses them from the command line.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import {
  type AuditRecord,
  type AuditReport,
  type ChangedKeyArea,
  openDisk,
  rotateDataKey,
} from '../../src/index.js';
import { KeyStore, takeLock } from '../../src/keys/index.js';
import { exitCode, pqblk, pqblkJson, program, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const withStore = (argv: string[]) => [...argv, '--store', at('keys')];
const run = (...argv: string[]) => pqblk(...withStore(argv));
const report = (...argv: string[]) => pqblkJson<ChangedKeyArea>(...withStore(argv));
const refused = exitCode('policy');

beforeAll(async () => {
  for (const name of ['alice', 'bob', 'carol']) {
    await run('key', 'gen', name, '--no-passphrase');
  }
  await run('key', 'gen', 'hybrid', '--no-passphrase', '--kem', 'x-wing');
  await run('key', 'gen', 'wide', '--no-passphrase', '--kem', 'ml-kem-1024');
});

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

let made = 0;
async function disk(...argv: string[]): Promise<string> {
  made += 1;
  const path = at(`${made}.sealed`);
  await pqblkJson(...withStore(['create', path, '16M', '--log-size', '8M', ...argv]));
  return path;
}

function policy(text: string): string {
  made += 1;
  const path = at(`policy-${made}.yaml`);
  writeFileSync(path, `version: 1\n${text}\n`);
  return path;
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
      'kems: [rot13]': 'rot13',
      'twoPersons: [everything]': 'everything',
      'trusted: [abc]': 'abc',
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
    writeFileSync(at('later.json'), '{"version": 2}');
    const later = await run('rewrap', path, '--policy', at('later.json'));
    expect(later.code).toBe(exitCode('newer_version'));
    expect((await run('rewrap', path, '--policy', at('none.yaml'))).code).toBe(
      exitCode('not_found'),
    );
  });
});

describe('an audit log', () => {
  const verify = (path: string, log: string, ...argv: string[]) =>
    run('audit', 'verify', path, '--audit', log, '--key', 'alice', ...argv);

  async function audited(): Promise<{ path: string; log: string }> {
    const path = await disk('--key', 'alice', '--key', 'bob');
    const log = at(`audit-${made}.log`);
    const options = ['--key', 'alice', '--audit', log];
    await report('slot', 'add', path, 'carol', ...options);
    await report('slot', 'revoke', path, 'bob', '--approve', 'carol', ...options);
    await report('rotate-master-key', path, ...options);
    return { path, log };
  }

  it('says who did what to which keys, and holds no secret', async () => {
    const { path, log } = await audited();
    const { code, stdout } = await verify(path, log, '--json');
    expect(code).toBe(0);
    const { records, lines, beyond } = JSON.parse(stdout) as AuditReport;
    expect([lines, beyond]).toEqual([3, 0]);
    const [added, revoked] = records;
    const { fingerprint } = await pqblkJson<{ fingerprint: string }>(
      ...withStore(['key', 'show', 'carol']),
    );
    expect(added?.slots).toEqual([
      expect.objectContaining({ label: 'carol', fingerprint, from: 'empty', to: 'active' }),
    ]);
    expect(revoked).toMatchObject({ operation: 'slot-revoke', approvedBy: [fingerprint] });
    expect(revoked?.slots.map(({ label, to }) => [label, to])).toEqual([['bob', 'revoked']]);
    expect((await run('audit', 'verify', path, '--audit', log, '--unauthenticated')).code).toBe(0);
    const secrets = Object.keys(JSON.parse(readFileSync(log, 'utf8').split('\n')[0] as string));
    // Whoever runs the tests by sudo is behind them.
    const fields = secrets.filter((name) => !['loginUid', 'sudoUser'].includes(name));
    expect(fields.sort()).toEqual(
      ...[
        [
          'approvedBy',
          'generation',
          'host',
          'line',
          'operation',
          'previous',
          'result',
          'slots',
        ].concat(['time', 'unlockedBy', 'user', 'volume']),
      ],
    );
  });

  it('is found out when a line was removed, changed, moved or put in', async () => {
    const { path, log } = await audited();
    const lines = readFileSync(log, 'utf8').trimEnd().split('\n');
    const [a = '', b = '', c = ''] = lines;
    const forged = b.replace('"slot-revoke"', '"slot-add"');
    expect(forged).not.toBe(b);
    for (const tampered of [
      [a, b],
      [a, c],
      [b, c],
      [a, c, b],
      [a, forged, c],
      [a, b, c.replace('begun', 'BEGUN')],
      [a, b, c, c],
      [a, a, b, c],
      [],
      [a, b, c, '{}'],
    ]) {
      writeFileSync(log, tampered.map((line) => `${line}\n`).join(''));
      const { code, stdout } = await verify(path, log);
      expect([code, stdout]).toEqual([
        exitCode('audit_broken'),
        expect.stringContaining('FINDING'),
      ]);
    }
    writeFileSync(log, `${lines.join('\n')}\n`);
    expect((await verify(path, log)).code).toBe(0);
  });

  it('allows for a change that did not come about, and goes on from there', async () => {
    const { path, log } = await audited();
    const whole = readFileSync(path);
    await report('rewrap', path, '--key', 'alice', '--audit', log);
    const after = readFileSync(path);
    writeFileSync(path, whole); // as if the host had crashed between the log and the disk
    const rollback = ['--allow-rollback'];
    const { code, stdout } = await verify(path, log, ...rollback);
    expect([code, stdout]).toEqual([0, expect.stringContaining('did not come about')]);
    appendFileSync(log, '{"line": 5, "torn');
    expect((await verify(path, log, ...rollback)).code).toBe(0);
    await report('rewrap', path, '--key', 'alice', '--audit', log, ...rollback);
    expect((await verify(path, log)).code).toBe(0);
    expect(readFileSync(log, 'utf8')).not.toContain('torn');
    expect(after.equals(whole)).toBe(false);
    writeFileSync(path, whole); // an older key area is told apart from that
    const older = await verify(path, log, ...rollback);
    expect(older.code).toBe(0); // both attempts made the same generation
    await report('rewrap', path, '--key', 'alice', '--audit', log, ...rollback);
    await report('rewrap', path, '--key', 'alice', '--audit', log);
    writeFileSync(path, whole);
    expect((await verify(path, log, ...rollback)).stdout).toContain('older than the log');
  });

  it('never says that something came about which did not', async () => {
    const { path, log } = await audited();
    const whole = readFileSync(path);
    await report('slot', 'add', path, 'wide', '--key', 'alice', '--audit', log);
    writeFileSync(path, whole); // as if the host had crashed between the log and the disk
    const rollback = ['--allow-rollback', '--key', 'alice', '--audit', log];
    await report('slot', 'add', path, 'hybrid', ...rollback);
    const { records, standings } = JSON.parse(
      (await verify(path, log, '--json')).stdout,
    ) as AuditReport;
    expect(records.map(({ slots }, at_) => [slots[0]?.label, standings[at_]]).slice(3)).toEqual([
      ['wide', 'uncounted'],
      ['hybrid', 'counted'],
    ]);
  });

  it('takes no line over that somebody else wrote into the file', async () => {
    const { path, log } = await audited();
    const lines = readFileSync(log, 'utf8').trimEnd().split('\n');
    const last = lines.at(-1) as string;
    const forged = (generation: number) =>
      JSON.stringify({
        ...(JSON.parse(last) as object),
        line: 4,
        operation: 'header-restore',
        generation,
        previous: createHash('sha3-256').update(last).digest('hex'),
      });
    const change = ['rewrap', path, '--key', 'alice', '--audit', log];
    writeFileSync(log, `${[...lines, forged(77)].join('\n')}\n`);
    expect((await run(...change)).code).toBe(exitCode('audit_broken'));
    writeFileSync(log, `${[...lines, forged(5)].join('\n')}\n`); // as a change cut short would look
    expect((await run(...change)).code).toBe(0);
    const { stdout } = await verify(path, log, '--json');
    const { standings } = JSON.parse(stdout) as AuditReport;
    expect(standings).toEqual(['counted', 'counted', 'counted', 'uncounted', 'counted']);
  });

  it('begins with the disk, and goes on when a header is put back', async () => {
    const log = at(`from-the-start-${made}.log`);
    const path = await disk('--key', 'alice', '--key', 'bob', '--audit', log);
    const first = JSON.parse(readFileSync(log, 'utf8')) as Record<string, unknown>;
    expect(first).toMatchObject({ line: 1, operation: 'create', generation: 1, result: 'begun' });
    expect(first.slots).toEqual([
      expect.objectContaining({ label: 'alice', from: 'empty', to: 'active' }),
      expect.objectContaining({ label: 'bob', from: 'empty', to: 'active' }),
    ]);
    expect((await verify(path, log)).code).toBe(0);
    await pqblkJson('header', 'backup', path, at(`${made}.backup`));
    const options = ['--key', 'alice', '--audit', log];
    await report('slot', 'add', path, 'carol', ...options);
    const restore = ['header', 'restore', path, at(`${made}.backup`), '--allow-rollback'];
    expect((await run(...restore, '--key', 'alice')).code).toBe(refused); // a log is kept
    await report(...restore, ...options);
    const { stdout } = await verify(path, log, '--json');
    const { records, standings } = JSON.parse(stdout) as AuditReport;
    expect(records.map(({ operation }) => operation)).toEqual([
      'create',
      'slot-add',
      'header-restore',
    ]);
    expect(standings).toEqual(['counted', 'undone', 'counted']);
    await report('slot', 'add', path, 'carol', ...options);
    expect((await verify(path, log)).code).toBe(0);
  });

  it('that was lost is missed for ever', async () => {
    const { path, log } = await audited();
    const last = readFileSync(log, 'utf8').trimEnd().split('\n').at(-1) as string;
    renameSync(log, `${log}.old`);
    const change = ['rewrap', path, '--key', 'alice', '--audit', log];
    const missing = await run(...change);
    expect([missing.code, missing.stderr]).toEqual([
      exitCode('audit_log'),
      expect.stringContaining('--restart-audit'),
    ]);
    const rules = ['--policy', policy('twoPersons: [audit-restart]')];
    expect((await run(...change, '--restart-audit', ...rules)).code).toBe(refused);
    await report(...change, '--restart-audit', ...rules, '--approve', 'carol');
    await report(...change);
    const { code, stdout } = await verify(path, log);
    expect([code, stdout]).toEqual([0, expect.stringMatching(/WARNING.* 3 lines .*lost/)]);
    const begin = JSON.parse(readFileSync(log, 'utf8').split('\n')[0] as string) as AuditRecord;
    expect(begin.previous).toBe(createHash('sha3-256').update(last).digest('hex'));
  });

  it('is written or nothing is done', async () => {
    const { path, log } = await audited();
    const before = readFileSync(path);
    const rotate = ['rotate-master-key', path, '--key', 'alice'];
    expect((await run(...rotate)).code).toBe(refused); // a log is kept
    const elsewhere = await run(...rotate, '--audit', at('other.log'));
    expect(elsewhere.code).toBe(exitCode('audit_log'));
    expect((await run(...rotate, '--audit', at('no/such/dir.log'))).code).toBe(
      exitCode('audit_log'),
    );
    const release = await takeLock(log, 'test');
    expect((await run(...rotate, '--audit', log)).code).toBe(exitCode('locked'));
    await release();
    appendFileSync(log, 'x\n');
    expect((await run(...rotate, '--audit', log)).code).toBe(exitCode('audit_broken'));
    expect(readFileSync(path).equals(before)).toBe(true);
    const fresh = at(`fresh-${made}.log`);
    expect((await run(...rotate, '--audit', fresh, '--restart-audit')).code).toBe(0);
    expect(JSON.parse(readFileSync(fresh, 'utf8'))).toMatchObject({ line: 1, formerLines: 3 });
    expect((await verify(path, fresh)).code).toBe(0);
  });

  it('is looked at by a dry run, and a file that is none is no log', async () => {
    const { path, log } = await audited();
    const fresh = await disk('--key', 'alice');
    const other = (await audited()).log;
    symlinkSync(log, at('link.log'));
    expect(spawnSync('mkfifo', [at('pipe.log')]).status).toBe(0);
    const add = (on: string, to: string) => [
      'slot',
      'add',
      on,
      'bob',
      '--key',
      'alice',
      '--audit',
      to,
    ];
    const bytes = readFileSync(log);
    for (const [on, to] of [
      [path, other],
      [path, at('gone.log')],
      [path, at('link.log')],
      [path, at('pipe.log')],
      [fresh, at('none/x.log')],
      [fresh, log],
    ] as const) {
      const planned = await run(...add(on, to), '--dry-run');
      const done = await run(...add(on, to));
      expect([to, planned.code]).toEqual([to, done.code]);
      expect(done.code).not.toBe(0);
    }
    expect((await run(...add(fresh, at('fresh.log')), '--dry-run')).code).toBe(0);
    expect(existsSync(at('fresh.log'))).toBe(false);
    expect((await run(...add(path, log), '--dry-run')).code).toBe(0);
    expect(readFileSync(log).equals(bytes)).toBe(true);
    expect((await verify(path, '/dev/full')).code).toBe(exitCode('audit_log'));
  });

  it('is kept where the policy says, for each disk its own', async () => {
    const path = await disk('--key', 'alice', '--key', 'bob');
    mkdirSync(at('logs'), { mode: 0o700 });
    const rules = ['--policy', policy(`auditDirectory: ${at('logs')}`), '--key', 'alice'];
    await report('rewrap', path, ...rules);
    expect((await run('audit', 'verify', path, ...rules)).code).toBe(0);
    const gone = ['--policy', policy(`auditDirectory: ${at('gone')}`), '--key', 'alice'];
    expect((await run('rewrap', path, ...gone)).code).toBe(exitCode('audit_log'));
  });
});
