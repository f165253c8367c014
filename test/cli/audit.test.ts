// The audit log of a disk, as a security team uses it from the command line.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { describe, expect, it } from 'vitest';
import type { ErrorKind } from '../../src/errors.js';
import {
  AuditLog,
  type AuditRecord,
  type AuditReport,
  openDisk,
  rotateDataKey,
} from '../../src/index.js';
import { KeyStore, takeLock } from '../../src/keys/index.js';
import { exitCode, pqblkJson } from './helpers.js';
import { at, disk, made, policy, refused, report, run, withStore } from './key-disks.js';

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

  it('is not there for a disk that was not made, and what was there is as it was', async () => {
    const log = at('of-no-disk.log');
    const there = await disk('--key', 'alice');
    const raw = at('source.raw');
    writeFileSync(raw, Buffer.alloc(2 ** 20, 1));
    const [path, key] = [at('never.sealed'), ['--key', 'alice']];
    const failures: [kind: ErrorKind, argv: string[]][] = [
      ['not_found', ['create', at('no/such/place.sealed'), '8M', ...key]],
      ['exists', ['create', there, '8M', ...key]],
      ['slot_exists', ['create', path, '8M', ...key, ...key]],
      ['invalid_argument', ['create', path, '8M', ...key, '--cluster-size', '3000']],
      ['out_of_range', ['import', raw, path, '--size', '512K', ...key]], // when there is a disk already
    ];
    for (const before of [undefined, '', 'notes, and no end of line', 'notes\n']) {
      if (before === undefined) rmSync(log, { force: true });
      else writeFileSync(log, before, { mode: 0o640 });
      for (const [kind, argv] of failures) {
        const { code, stderr } = await run(...argv, '--audit', log);
        const expected = before ? 'audit_broken' : kind;
        expect([stderr, code]).toEqual([expect.stringMatching(/^pqblk: /m), exitCode(expected)]);
        expect([existsSync(log), existsSync(path)]).toEqual([before !== undefined, false]);
        if (before !== undefined) expect(readFileSync(log, 'utf8')).toBe(before);
      }
    }
    rmSync(log);
    await pqblkJson(...withStore(['import', raw, path, ...key, '--audit', log]));
    expect((await verify(path, log)).code).toBe(0);
    const taken = readFileSync(log);
    expect((await run('create', at('2.sealed'), '8M', ...key, '--audit', log)).code).toBe(
      exitCode('audit_broken'),
    );
    expect(readFileSync(log).equals(taken)).toBe(true);
  });

  /** A line that anybody can make, chained to the last one. */
  function append(log: string, fields: Record<string, unknown>): void {
    const lines = readFileSync(log, 'utf8').trimEnd().split('\n');
    const last = lines.at(-1) as string;
    const previous = createHash('sha3-256').update(last).digest('hex');
    const record = { ...(JSON.parse(last) as object), line: lines.length + 1, previous };
    appendFileSync(log, `${JSON.stringify({ ...record, ...fields })}\n`);
  }

  const standingsIn = async (path: string, log: string) => {
    const { records, standings } = JSON.parse(
      (await verify(path, log, '--json')).stdout,
    ) as AuditReport;
    return records.map(({ operation }, line) => `${operation} ${standings[line]}`);
  };

  it('takes nothing over with a header backup that the disk does not know', async () => {
    const { path, log } = await audited();
    const backup = at(`${made}.backup`);
    await pqblkJson('header', 'backup', path, backup);
    const before = ['slot-add counted', 'slot-revoke counted', 'rotate-master-key counted'];
    const options = ['--key', 'alice', '--audit', log];
    const restore = ['header', 'restore', path, backup, '--allow-rollback', ...options];
    await report('slot', 'add', path, 'hybrid', ...options);
    append(log, { operation: 'slot-revoke', user: 'carol', generation: 6 });
    await report(...restore);
    const undone = ['slot-add undone', 'slot-revoke uncounted', 'header-restore counted'];
    expect(await standingsIn(path, log)).toEqual([...before, ...undone]);
    expect((await verify(path, log)).stdout).toMatch(/carol@.* did not come about/);
    append(log, { operation: 'slot-revoke', generation: 77 });
    expect((await run(...restore)).code).toBe(exitCode('audit_broken'));
  });

  it('misses no line that only the backup does not count', async () => {
    const { path, log } = await audited();
    const backup = at(`${made}.backup`);
    await pqblkJson('header', 'backup', path, backup);
    const counted = readFileSync(log);
    const options = ['--key', 'alice', '--audit', log];
    await report('slot', 'add', path, 'hybrid', ...options);
    writeFileSync(log, counted); // and nothing was ever done to the disk since
    const restore = ['header', 'restore', path, backup, '--allow-rollback', ...options];
    expect((await run(...restore)).code).toBe(exitCode('audit_broken'));
  });

  it('says that it does not know what came about where no key area is left', async () => {
    const { path, log } = await audited();
    const backup = at(`${made}.backup`);
    await pqblkJson('header', 'backup', path, backup);
    const options = ['--key', 'alice', '--audit', log];
    await report('slot', 'add', path, 'hybrid', ...options);
    const newer = at(`${made}.newer`);
    await pqblkJson('header', 'backup', path, newer);
    append(log, { operation: 'slot-revoke', generation: 6 });
    const bytes = readFileSync(path);
    for (let found = bytes.indexOf('PQBLKKEY'); found >= 0; found = bytes.indexOf('PQBLKKEY')) {
      bytes.fill(0, found, found + 8);
    }
    writeFileSync(path, bytes);
    await report('header', 'restore', path, backup, '--allow-rollback', ...options);
    const later = ['slot-add unknown', 'slot-revoke unknown', 'header-restore counted'];
    expect((await standingsIn(path, log)).slice(3)).toEqual(later);
    expect((await verify(path, log)).stdout).toContain('or did not come about');
    // What a newer backup counts was done; of the rest nobody has found out more.
    await report('header', 'restore', path, newer, '--allow-rollback', ...options);
    const again = ['slot-add counted', 'slot-revoke unknown', 'header-restore undone'];
    expect((await standingsIn(path, log)).slice(3, 6)).toEqual(again);
  });

  it('says what is undone now, and not what was for a while', async () => {
    const { path, log } = await audited();
    const [older, newer] = [at(`${made}.older`), at(`${made}.newer`)];
    const options = ['--key', 'alice', '--audit', log];
    await pqblkJson('header', 'backup', path, older);
    await report('slot', 'add', path, 'hybrid', ...options);
    await pqblkJson('header', 'backup', path, newer);
    for (const backup of [older, newer]) {
      await report('header', 'restore', path, backup, '--allow-rollback', ...options);
    }
    const back = ['slot-add counted', 'header-restore undone', 'header-restore counted'];
    expect((await standingsIn(path, log)).slice(3)).toEqual(back);
  });

  it('goes on after a header backup that could not be put back', async () => {
    const { path, log } = await audited();
    const backup = at(`${made}.backup`);
    await pqblkJson('header', 'backup', path, backup);
    const options = ['--key', 'alice', '--audit', log];
    await report('slot', 'add', path, 'hybrid', ...options);
    append(log, { operation: 'header-restore', generation: 5, restoredFrom: 3, uncounted: 0 });
    append(log, { result: 'failed: PQBLK_INTERRUPTED' });
    expect((await verify(path, log)).code).toBe(0);
    await report('slot', 'add', path, 'wide', ...options);
    const [failed, last] = ['header-restore uncounted', 'slot-add counted'];
    expect((await standingsIn(path, log)).slice(3)).toEqual([last, failed, failed, last]);
  });

  it('can be shown on paper: whose slots, who approved, which step', async () => {
    const { path, log } = await audited();
    const { fingerprint } = await pqblkJson<{ fingerprint: string }>(
      ...withStore(['key', 'show', 'carol']),
    );
    await report('rotate-data-key', path, '--key', 'alice', '--audit', log);
    append(log, { operation: 'rewrap', user: `\u001b[2J`, generation: 7 });
    const { stdout } = await verify(path, log);
    const short = fingerprint.slice(0, 16);
    expect(stdout).toMatch(new RegExp(`slot-add .*counted +\\d "carol" ${short}: empty to active`));
    expect(stdout).toMatch(
      new RegExp(`slot-revoke .* ${short} +counted .*active to revoked$`, 'm'),
    );
    expect(stdout).toMatch(/rotate-data-key begun, 1 to 2 /);
    expect(stdout).toMatch(/rotate-data-key finished, 1 to 2 /);
    expect(stdout).not.toContain('\u001b');
    append(log, { slots: [null] });
    expect((await verify(path, log)).stdout).toContain('FINDING: line 7 is no record');
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

  it('is restarted once, however many lines a command writes and however often it is run', async () => {
    const { path, log } = await audited();
    renameSync(log, `${log}.old`);
    const rotate = ['rotate-data-key', path, '--key', 'alice', '--audit', log, '--restart-audit'];
    const store = new KeyStore(at('keys'));
    {
      using identity = await store.unlock('alice');
      await using open = await openDisk(path, { format: 'sealed', identity, pins: store.pins });
      const audit = new AuditLog(log, { restart: true });
      const onStep = () => Promise.reject(new Error('stop here'));
      const stopped = rotateDataKey(open, { identity, pins: store.pins, audit, onStep });
      await expect(stopped).rejects.toThrow('stop here');
    }
    expect((await run(...rotate, '--dry-run')).code).toBe(0);
    const done = await run(...rotate);
    expect([done.code, done.stderr]).toEqual([0, '']);
    const lines = readFileSync(log, 'utf8').trimEnd().split('\n');
    const records = lines.map((line) => JSON.parse(line) as AuditRecord);
    expect(records.map(({ formerLines, rotation }) => [formerLines, rotation?.step])).toEqual([
      [3, 'begun'],
      [undefined, 'finished'],
    ]);
    expect((await verify(path, log)).code).toBe(0);
    renameSync(log, `${log}.older`);
    expect((await run(...rotate)).code).toBe(0); // both lines by one run
    expect((await verify(path, log)).stdout).toMatch(/WARNING.* 2 lines .*lost/);
  });

  it('is restarted in the place of no other file', async () => {
    const { path, log } = await audited();
    const restart = ['rewrap', path, '--key', 'alice', '--audit', log, '--restart-audit'];
    const before = readFileSync(path);
    const [first = ''] = readFileSync(log, 'utf8').split('\n');
    for (const text of ['notes, and no end of line', `${first}\n`]) {
      writeFileSync(log, text);
      const { code, stderr } = await run(...restart);
      expect([code, stderr]).toEqual([
        exitCode('audit_broken'),
        expect.stringContaining('out of the way'),
      ]);
      expect((await run(...restart, '--dry-run')).code).toBe(code);
      expect(readFileSync(log, 'utf8')).toBe(text);
    }
    expect(readFileSync(path).equals(before)).toBe(true);
    writeFileSync(log, ''); // as a restart leaves it that was killed, or found no room
    await report(...restart);
    expect((await verify(path, log)).stdout).toMatch(/WARNING.* 3 lines .*lost/);
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
