// Disks on a medium that does not give out a sector: what a check, a repair and a restore say and do then.
import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { beforeAll, expect, it } from 'vitest';
import type { CheckResult } from '../../src/index.js';
import {
  at,
  contested,
  damage,
  damageOneSector,
  disk,
  headerOf,
  places,
  requireContent,
  source,
} from './header-disks.js';
import { exitCode, MAIN, type Outcome, peer, pqblk, pqblkJson } from './helpers.js';

const failing = at('failing-medium');

beforeAll(() => {
  const source = fileURLToPath(new URL('failing-medium.c', import.meta.url));
  peer('cc', '-std=c11', '-D_GNU_SOURCE', '-Wall', '-Wextra', '-Werror', '-o', failing, source);
});

/** The program, on a medium that fails where this sector of the file is. */
function onFailingMedium(offset: number, ...argv: string[]): Outcome {
  const { status, stdout, stderr, error } = spawnSync(
    failing,
    [String(offset), '4096', process.execPath, MAIN, ...argv],
    { encoding: 'utf8' },
  );
  if (error) throw error;
  return { code: status ?? -1, stdout, stderr };
}

/** The position in the file of a sector with data. */
async function sectorIn(path: string, own: string[]): Promise<number> {
  const bytes = readFileSync(path);
  await damageOneSector(path, own);
  const at_ = readFileSync(path).findIndex((byte, index) => byte !== bytes[index]);
  writeFileSync(path, bytes);
  return at_ - (at_ % 4096);
}

it('a check names the sector, and ends like a medium that fails', async () => {
  const { path, own } = await disk();
  const check = ['check', path, '--key', 'alice', ...own];
  const { code, stdout, stderr } = onFailingMedium(await sectorIn(path, own), ...check);
  expect([code, stderr]).toEqual([
    exitCode('io_error'),
    expect.stringMatching(/1 sectors cannot be read\n.*the medium fails/),
  ]);
  expect(stdout).toMatch(/^sector \d+ \(byte \d+\) cannot be read$/m);
  expect(stdout).not.toContain('does not authenticate');
  expect((await pqblk(...check)).code).toBe(0);
});

/** Where the entries of sectors 256 to 383 lie: of the disk's data, the first page. */
function entryPage(path: string): number {
  const bytes = readFileSync(path);
  const hostAt = (at: number) => Number(bytes.readBigUInt64BE(at) & 0x00ff_ffff_ffff_fe00n);
  const dataSlots = 512 - 512 / 128; // of an L2 table in clusters of 4 KiB; entry slots follow
  return hostAt(hostAt(headerOf(path).l1Offset) + 8 * (dataSlots + 2));
}

it('a check and a rotation name the sectors whose entries cannot be read, and go on', async () => {
  const { path, own } = await disk();
  const page = entryPage(path);
  const all = await pqblkJson<CheckResult>('check', path, '--key', 'alice', ...own);
  const check = onFailingMedium(page, 'check', path, '--key', 'alice', '--json', ...own);
  expect([check.code, check.stderr]).toEqual([
    exitCode('io_error'),
    expect.stringContaining('128 sectors cannot be read'),
  ]);
  const result = JSON.parse(check.stdout) as CheckResult;
  expect(result).toMatchObject({ sectorsBad: 0, sectorsUnreadable: 128 });
  expect(result.unreadableSectors[0]).toBe(256);
  expect(result.sectorsVerified).toBe(all.sectorsVerified - 128);

  const rotate = ['rotate-data-key', path, '--key', 'alice', ...own];
  const { code, stderr } = onFailingMedium(page, ...rotate);
  expect([code, stderr]).toEqual([
    exitCode('io_error'),
    expect.stringMatching(/128 sectors .*cannot be read and cannot be written again: 256, 257, /),
  ]);
  expect((await pqblk(...rotate)).code).toBe(0); // as on a sound medium
  await requireContent(path, own);
});

it('a repair leaves a copy of the key area alone, and says which it is', async () => {
  const { path, own, repair } = await contested();
  const offset = await sectorIn(path, [...own, ...repair.slice(5, 7)]);
  const before = readFileSync(path);
  const left = onFailingMedium(offset, ...repair);
  expect(left.code).toBe(exitCode('corrupt'));
  expect(left.stdout).toMatch(/left alone: 1 sectors cannot be read, .*; those of the other copy/);
  expect(left.stdout).not.toContain('do not open');
  expect(readFileSync(path).equals(before)).toBe(true);
  expect((await pqblk(...repair)).code).toBe(0);
});

it('a restore believes nothing for what it could read, and says what a word would do', async () => {
  const { path, backup, own } = await disk();
  const offset = await sectorIn(path, own);
  const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
  const { header, keyAreas } = places(path);
  const whole = readFileSync(path);
  damage(path, ...keyAreas);
  const unread = expect.stringMatching(
    /: 1 of \d+ sectors cannot be read\nhint: .*nobody knows .*sound medium.*Should there be no other way, --force/,
  );
  expect(onFailingMedium(offset, ...restore)).toMatchObject({
    ...{ code: exitCode('io_error'), stderr: unread },
  });
  expect((await pqblk('check', path, '--key', 'alice', ...own)).code).toBe(
    exitCode('key_area_damaged'),
  );
  expect(onFailingMedium(offset, ...restore, '--force').code).toBe(0);

  writeFileSync(path, whole);
  damage(path, header);
  const ended = onFailingMedium(offset, ...restore);
  expect(ended).toMatchObject({ code: exitCode('io_error'), stderr: unread });
  expect(ended.stderr).toContain('the disk is read-only');
  damage(path, { offset, length: 4096 }); // as on another medium, where nothing could be copied
  const moved = await pqblk(...restore);
  expect([moved.code, moved.stderr]).toEqual([
    exitCode('integrity'),
    expect.stringContaining('all is put back'),
  ]);
});

it('a restore says first that the header is older than the disk, whatever cannot be read', async () => {
  const { path, backup, own } = await disk();
  const offset = await sectorIn(path, own);
  await pqblkJson('resize', path, '8G', '--key', 'alice', ...own);
  damage(path, places(path).header);
  const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
  const { code, stderr } = onFailingMedium(offset, ...restore);
  expect([code, stderr]).toEqual([
    exitCode('corrupt'),
    expect.stringMatching(/ 1 of \d+ sectors cannot be read\nhint: .*Should `pqblk export` find/),
  ]);
});

it.each([0, 1] as const)(
  'a change of keys names copy %i of the key area, which is not read back',
  async (copy) => {
    const { path, own } = await disk();
    const add = ['slot', 'add', path, 'carol', '--key', 'alice', ...own];
    const offset = Number(places(path).keyAreas[copy]?.offset) + 8192;
    const { code, stderr } = onFailingMedium(offset, ...add);
    expect([code, stderr]).toEqual([
      exitCode('io_error'),
      expect.stringMatching(
        new RegExp(`copy ${copy + 1} of the key area cannot be read back\nhint: the medium`),
      ),
    ]);
    const opens = ['slot', 'test', path, '--key', 'alice', ...own];
    expect(onFailingMedium(offset, ...opens).code).toBe(0);
    expect((await pqblk(...add)).code).toBe(0); // as on a sound medium
    await requireContent(path, own);
  },
);

it('a rotation names the sector, keeps the old key, and ends when the sector is back', async () => {
  const { path, own } = await disk();
  const rotate = ['rotate-data-key', path, '--key', 'alice', ...own];
  const offset = await sectorIn(path, own);
  for (const _ of [1, 2]) {
    const { code, stderr } = onFailingMedium(offset, ...rotate);
    expect([code, stderr]).toEqual([
      exitCode('io_error'),
      expect.stringMatching(
        /: 1 sectors \(of 4096 bytes\) cannot be read .*: \d+\nhint: .*the old key is kept/,
      ),
    ]);
  }
  const half = await pqblkJson('info', path);
  expect(half).toMatchObject({ sealed: { keyArea: { currentEpoch: 1, nextEpoch: 2 } } });
  expect((await pqblk(...rotate)).code).toBe(0);
  expect((await pqblk('check', path, '--key', 'alice', ...own)).code).toBe(0);
});

it.each(['sessionTables', 'logHeaders', 'keyAreas'] as const)(
  'one of the two %s that cannot be read keeps nobody out, and the disaster tool works',
  async (what) => {
    const { path, backup, own } = await disk();
    const { sessionTables, keyAreas, log } = places(path);
    const logHeaders = [log, { ...log, offset: log.offset + 4096 }];
    const key = ['--key', 'alice', ...own];
    const before = readFileSync(path);
    // A backup is made of a key area that is whole in both copies: see its hint.
    const backedUp = what === 'keyAreas' ? exitCode('key_area_damaged') : 0;
    for (const [index, { offset }] of { sessionTables, keyAreas, logHeaders }[what].entries()) {
      const to = `${path}.${what}.${index}`;
      for (const [expected, ...argv] of [
        [0, 'info', path],
        [0, 'export', path, `${to}.raw`, ...key],
        [backedUp, 'header', 'backup', path, `${to}.backup`],
        [0, 'header', 'restore', path, backup, ...key],
      ] as [number, ...string[]][]) {
        const { code, stderr } = onFailingMedium(offset, ...argv);
        expect([argv, code, stderr]).toEqual([argv, expected, expect.anything()]);
      }
      writeFileSync(path, before);
    }
  },
);

it('a header that cannot be read is one that a restore puts back', async () => {
  const { path, backup, own } = await disk();
  const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
  const { code, stderr } = onFailingMedium(8192, ...restore);
  expect([code, stderr]).toEqual([0, expect.anything()]);
});

/** A disk whose header has a cluster of many pages, of which it needs the first. */
async function roomyDisk() {
  const { path: small, own } = await disk();
  const [path, backup] = [`${small}.roomy`, `${small}.roomy-backup`];
  const how = ['--cluster-size', '64k', '--log-size', '8M'];
  await pqblkJson('import', source, path, '--key', 'alice', ...how, ...own);
  await pqblkJson('header', 'backup', path, backup);
  return { path, backup, own };
}

it.each([4096, 61_440])(
  'a bad block at %i, behind the header, is nothing to a reader',
  async (bad) => {
    const { path, own } = await roomyDisk();
    const withKey = ['--key', 'alice', ...own];
    const out = at('behind.raw');
    const copy = at(`behind-${bad}.backup`);
    for (const argv of [
      ['info', path],
      ['check', path, ...withKey],
      ['header', 'backup', path, copy],
      ['export', path, out, '--force', ...withKey],
    ]) {
      expect(onFailingMedium(bad, ...argv), argv[0]).toMatchObject({ code: 0 });
    }
    peer('cmp', source, out);
  },
);

it('a restore never overwrites a header that can be read, whatever lies behind it', async () => {
  const { path, backup, own } = await roomyDisk();
  await pqblkJson('resize', path, '1200M', '--key', 'alice', ...own); // the L1 table moves
  const before = readFileSync(path);
  const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
  expect(onFailingMedium(8192, ...restore)).toMatchObject({ code: 0 });
  expect(readFileSync(path).subarray(0, 65_536).equals(before.subarray(0, 65_536))).toBe(true);
  expect((await pqblk('check', path, '--key', 'alice', ...own)).code).toBe(0);
  expect(await pqblkJson('info', path)).toMatchObject({ size: 1200 * 2 ** 20 });
});

it('a damaged header is put back although the medium withholds a page behind it', async () => {
  const { path, backup, own } = await roomyDisk();
  damage(path, { offset: 29, length: 1 }); // of the size
  const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
  expect(onFailingMedium(8192, ...restore)).toMatchObject({ code: 0 });
  await requireContent(path, own);
});
