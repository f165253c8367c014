// `pqblk header backup|restore`: each thing that a backup brings back, what it opens again, and what it
// must never do: touch a header that can be read, or trust table positions that are no longer true.
import { copyFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import {
  at,
  damage,
  disk,
  headerOf,
  made,
  places,
  putOldCopiesBack,
  requireContent,
  restoreJson,
  source,
} from './header-disks.js';
import { exitCode, peer, pqblk, pqblkJson } from './helpers.js';

describe('a backup brings back', () => {
  type Part = 'header' | 'keyAreas' | 'sessions' | 'sessionTables';
  const parts = (what: string) => what.split(', ') as Part[];
  const damageParts = (path: string, what: string) => {
    const known = places(path);
    damage(path, ...parts(what).flatMap((part) => known[part]));
  };

  it.each([
    'header',
    'keyAreas',
    'sessions',
    'sessionTables',
    'header, keyAreas, sessions',
    'header, sessionTables',
    'header, keyAreas, sessionTables',
  ])('%s', async (what) => {
    const { path, backup, own } = await disk();
    damageParts(path, what);
    const broken = await pqblk('export', path, at('x.raw'), '--key', 'alice', '--force', ...own);
    expect(broken.code).not.toBe(0);
    const restored = await restoreJson(path, backup, ...own);
    expect(restored).toMatchObject({
      header: parts(what).includes('header'),
      keyArea: parts(what).includes('keyAreas'),
      sessions: what.includes('session') ? 1 : 0,
    });
    await requireContent(path, own);
    expect((await pqblk('check', path, '--key', 'bob', ...own)).code).toBe(0);
    const again = await restoreJson(path, backup, ...own);
    expect(again).toMatchObject({ header: false, keyArea: false, sessions: 0 });
  });

  it.each(['sessionTables', 'header, sessionTables'])(
    '%s of a disk that nobody has written',
    async (what) => {
      const { own } = await disk();
      const path = at(`${made}.fresh`);
      const backup = at(`${made}.fresh.backup`);
      await pqblkJson('create', path, '16M', '--key', 'alice', ...own);
      await pqblkJson('header', 'backup', path, backup);
      damageParts(path, what);
      await restoreJson(path, backup, ...own);
      expect((await pqblk('resize', path, '20M', '--key', 'alice', ...own)).code).toBe(0);
      expect((await pqblk('check', path, '--key', 'alice', ...own)).code).toBe(0);
    },
  );

  it('keys that were revoked since, and says so', async () => {
    const { path, backup, own } = await disk();
    const old = await pqblkJson<{ vmkCheck: string }>('slot', 'test', path, '--key', 'bob', ...own);
    await pqblkJson('slot', 'revoke', path, 'bob', '--key', 'alice', ...own);
    const argv = ['header', 'restore', path, backup, '--key', 'alice', ...own];
    expect((await pqblk(...argv)).code).toBe(exitCode('vmk_changed'));
    const confirm = ['--confirm-vmk', old.vmkCheck];
    expect((await pqblk(...argv, ...confirm)).code).toBe(exitCode('rollback'));
    const restored = await restoreJson(path, backup, ...own, ...confirm, '--allow-rollback');
    expect(restored.warnings).toEqual([expect.stringMatching(/"bob".*opens the disk again/)]);
    expect((await pqblk('slot', 'test', path, '--key', 'bob', ...own)).code).toBe(0);
  });
});

describe('a backup is refused', () => {
  it('while nobody can tell which copy of the key area is the right one', async () => {
    const { path, own } = await disk();
    damage(path, places(path).keyAreas[0] as { offset: number; length: number });
    const file = at(`${made}.refused`);
    const { code, stderr } = await pqblk('header', 'backup', path, file);
    expect([code, stderr]).toEqual([
      exitCode('key_area_damaged'),
      expect.stringContaining('check --repair'),
    ]);
    expect(existsSync(file)).toBe(false);
    expect((await pqblk('check', path, '--repair', '--key', 'alice', ...own)).code).toBe(0);
    expect((await pqblk('header', 'backup', path, file)).code).toBe(0);
  });
});

describe('a restore refuses', () => {
  it('to trust table positions that have changed since', async () => {
    const { path, backup, own } = await disk();
    const before = headerOf(path).l1Offset;
    expect((await pqblk('resize', path, '8G', '--key', 'alice', ...own)).code).toBe(0);
    expect(headerOf(path).l1Offset).not.toBe(before); // the L1 table had to move
    const grown = readFileSync(path);
    damage(path, places(path).header);
    const { code, stderr } = await pqblk(
      ...['header', 'restore', path, backup, '--key', 'alice', ...own],
    );
    expect([code, stderr]).toEqual([exitCode('corrupt'), expect.stringContaining('have moved')]);
    const resized = await pqblk('resize', path, '16G', '--key', 'alice', ...own);
    expect([resized.code, resized.stderr]).toEqual([
      exitCode('corrupt'),
      expect.stringContaining('marked corrupt'),
    ]);
    const checked = await pqblk('check', path, '--key', 'alice', ...own);
    expect(checked.stderr).toContain('`pqblk header restore` with a newer backup');
    // The header that can be read is the truth, whatever an old backup says.
    writeFileSync(path, grown);
    expect(await restoreJson(path, backup, ...own)).toMatchObject({ header: false });
    expect(readFileSync(path).subarray(0, 4096).equals(grown.subarray(0, 4096))).toBe(true);
  });

  it('to write a session table where only the log shows that it was, unless it is the newest', async () => {
    const { path, backup, own } = await disk();
    await pqblkJson('resize', path, '20M', '--key', 'alice', ...own); // in a session of its own
    const { header, sessionTables } = places(path);
    damage(path, header, ...sessionTables);
    const damaged = readFileSync(path);
    const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
    for (const more of [[], ['--force'], ['--keep-key-area']]) {
      const { code, stderr } = await pqblk(...restore, ...more);
      expect([code, stderr]).toEqual([
        exitCode('data_key_missing'),
        expect.stringMatching(/log's session.*\n.*restore a newer/),
      ]);
      expect(stderr).not.toContain('--force');
      expect(readFileSync(path).subarray(4096).equals(damaged.subarray(4096))).toBe(true);
    }
  });

  it('a file in which nothing shows that it is the disk', async () => {
    const { path, backup, own } = await disk();
    const { header, sessionTables, log } = places(path);
    damage(path, header, ...sessionTables, log);
    const damaged = readFileSync(path);
    const { code, stderr } = await pqblk(
      ...['header', 'restore', path, backup, '--key', 'alice', '--force', ...own],
    );
    expect([code, stderr]).toEqual([
      exitCode('integrity'),
      expect.stringContaining('nothing in this file shows that it is the disk of the backup'),
    ]);
    expect(readFileSync(path).equals(damaged)).toBe(true);
  });

  it('the backup of another disk, and a file that is no disk', async () => {
    const { path, backup, own } = await disk();
    const other = at(`other-${made}.sealed`);
    await pqblkJson('create', other, '16M', '--key', 'alice', '--log-size', '8M', ...own);
    const before = readFileSync(other);
    const restore = ['--key', 'alice', ...own];
    const wrong = await pqblk('header', 'restore', other, backup, ...restore);
    expect(wrong.code).toBe(exitCode('wrong_key'));
    expect(readFileSync(other).equals(before)).toBe(true);
    const raw = at(`raw-${made}.raw`);
    copyFileSync(source, raw);
    const nothing = await pqblk('header', 'restore', raw, backup, ...restore);
    expect(nothing.code).not.toBe(0);
    peer('cmp', source, raw);
    const stranger = ['header', 'restore', path, backup, '--key', 'carol', ...own];
    expect((await pqblk(...stranger)).code).toBe(exitCode('no_slot'));
  });

  it('a backup with any byte changed, and what is none', async () => {
    const { path, backup, own } = await disk();
    const bytes = readFileSync(backup);
    const before = readFileSync(path);
    const restore = ['header', 'restore', path, at('changed'), '--key', 'alice', ...own];
    for (let offset = 0; offset < bytes.length; offset += offset < 64 ? 7 : 9973) {
      const changed = Buffer.from(bytes);
      changed[offset] = (changed[offset] ?? 0) ^ 1;
      writeFileSync(at('changed'), changed);
      expect([exitCode('corrupt'), exitCode('newer_version')]).toContain(
        (await pqblk(...restore)).code,
      );
    }
    for (const text of [Buffer.alloc(0), bytes.subarray(1), bytes.subarray(0, 200)]) {
      writeFileSync(at('changed'), text);
      expect((await pqblk(...restore)).code).toBe(exitCode('corrupt'));
    }
    expect(readFileSync(path).equals(before)).toBe(true);
    const exists = await pqblk('header', 'backup', path, backup);
    expect(exists.code).toBe(exitCode('exists'));
  });

  it('without the second person that the policy asks for', async () => {
    const { path, backup, own } = await disk();
    writeFileSync(at('two.yaml'), 'version: 1\ntwoPersons: [header-restore]\n');
    const argv = ['header', 'restore', path, backup, '--key', 'alice', ...own];
    const rules = ['--policy', at('two.yaml')];
    expect((await pqblk(...argv, ...rules)).code).toBe(exitCode('policy'));
    expect((await pqblk(...argv, ...rules, '--approve', 'alice')).code).toBe(exitCode('policy'));
    expect((await pqblk(...argv, ...rules, '--approve', 'bob')).code).toBe(0);
  });

  // slot-add: what it amounts to, since he would open the disk again.
  it.each(['header-restore', 'slot-add'])(
    'on the word of somebody who was revoked since: %s',
    async (rule) => {
      const { path, backup, own } = await disk();
      const old = await pqblkJson<{ vmkCheck: string }>(
        'slot',
        'test',
        path,
        '--key',
        'bob',
        ...own,
      );
      await pqblkJson('slot', 'revoke', path, 'bob', '--key', 'alice', ...own);
      writeFileSync(at('two.yaml'), `version: 1\ntwoPersons: [${rule}]\n`);
      const accept = ['--allow-rollback', '--confirm-vmk', old.vmkCheck];
      const argv = [
        'header',
        'restore',
        path,
        backup,
        '--policy',
        at('two.yaml'),
        ...accept,
        ...own,
      ];
      const before = readFileSync(path);
      for (const [key, approver] of [
        ['alice', 'bob'],
        ['bob', 'alice'],
      ] as const) {
        const { code } = await pqblk(...argv, '--key', key, '--approve', approver);
        expect(code).toBe(exitCode('slot_revoked'));
      }
      expect(readFileSync(path).equals(before)).toBe(true);
      // Nor does he have a word again because he put the old copies back.
      const replayed = putOldCopiesBack(path);
      const { code } = await pqblk(...argv, '--key', 'alice', '--approve', 'bob');
      expect(code).toBe(exitCode('vmk_changed'));
      expect(readFileSync(path).equals(replayed)).toBe(true);
    },
  );
});
