// `pqblk header restore`: what becomes of a header that was put back, from the mark that it gets until
// the disk is in use again.
import { readFileSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { type Identity, KeyStore, openDisk } from '../../src/index.js';
import { native } from '../../src/native.js';
import {
  at,
  contested,
  damage,
  damageOneSector,
  disk,
  made,
  places,
  requireContent,
  restoredUuid,
  restoreJson,
} from './header-disks.js';
import { exitCode, pqblk, pqblkJson } from './helpers.js';

/** Who looks at the disk is told that its header is not believed, and what to do about it. */
async function requireNamed(path: string, own: string[], hint: string): Promise<void> {
  const reported = await pqblk('report', path, '--json');
  expect(reported.code).toBe(exitCode('corrupt'));
  expect(JSON.parse(reported.stdout)).toMatchObject({
    disks: [{ findings: [{ kind: 'unbelieved' }] }],
  });
  const check = ['check', path, '--key', 'alice', ...own];
  const checked = await pqblk(...check);
  expect(checked.code).toBe(exitCode('corrupt'));
  expect(checked.stdout).toContain('was put back, and is not believed: the disk is read-only');
  expect(checked.stderr).toContain(hint);
  expect(checked.stderr).not.toContain('--repair frees');
  const { stdout } = await pqblk(...check, '--json');
  expect(JSON.parse(stdout)).toMatchObject({ clean: false, headerPutBack: true });
}

/** Of a disk with data beyond its size: it opens to be read, and to be resized, which then comes first. */
async function takesNoWrite(path: string, identity: Identity): Promise<void> {
  const how = { format: 'sealed', identity } as const;
  const refused = { kind: 'corrupt', message: expect.stringContaining('comes first') };
  await expect(openDisk(path, how)).rejects.toMatchObject(refused);
  await using read = await openDisk(path, { ...how, readOnly: true });
  await expect(read.requireWithinSize()).rejects.toMatchObject(refused);
  await read.close();
  await using open = await openDisk(path, { ...how, toResize: true });
  await expect(open.write(new Uint8Array(4096), 0)).rejects.toMatchObject(refused);
  await expect(open.discard(0, open.size)).rejects.toMatchObject(refused);
  await expect(open.writeZeroes(0, open.size, { unmap: true })).rejects.toMatchObject(refused);
  await expect(open.resize(open.size)).rejects.toMatchObject(refused);
}

it('a mark is taken off the header that was checked, and off no other', async () => {
  const { path } = await disk();
  const bytes = readFileSync(path);
  bytes[79] = (bytes[79] ?? 0) | 2;
  const checked = Uint8Array.from(bytes.subarray(0, 512));
  bytes[300] = (bytes[300] ?? 0) ^ 1; // another one was put back meanwhile
  writeFileSync(path, bytes);
  await expect(native().clearCorrupt({ path, checked })).rejects.toMatchObject({ kind: 'locked' });
  expect(readFileSync(path).equals(bytes)).toBe(true);
  bytes[300] = (bytes[300] ?? 0) ^ 1;
  writeFileSync(path, bytes);
  await native().clearCorrupt({ path, checked });
  expect(readFileSync(path)[79]).toBe((bytes[79] ?? 0) & ~2);
});

describe('what a restore leaves', () => {
  const pieces = async (path: string, own: string[]) => {
    const { code } = await pqblk('resize', path, '20M', '--key', 'alice', ...own);
    return code;
  };

  it.each([
    ['by the same command', ['header', 'restore']],
    ['by a repair', ['check', '--repair']],
  ])('is finished %s, when it was stopped', async (_, [command = '', word = '']) => {
    const { path, backup, own } = await disk();
    const bytes = readFileSync(path);
    bytes[79] = (bytes[79] ?? 0) | 2; // the mark of a header that nobody has checked
    writeFileSync(path, bytes);
    expect(await pieces(path, own)).toBe(exitCode('corrupt'));
    const rotate = ['rotate-data-key', path, '--dry-run', '--key', 'alice', ...own];
    expect((await pqblk(...rotate)).code).toBe(exitCode('corrupt'));
    await requireNamed(path, own, 'check --repair` believes it');
    const argv = command === 'check' ? [command, path, word] : [command, word, path, backup];
    expect(await pqblk(...argv, '--key', 'alice', ...own)).toMatchObject({ code: 0 });
    expect(readFileSync(path)[79]).toBe((bytes[79] ?? 0) & ~2);
    expect(await pieces(path, own)).toBe(0);
    expect((await pqblk('report', path)).code).toBe(0);
    const { clean, headerPutBack } = await pqblkJson('check', path, '--key', 'alice', ...own);
    expect([clean, headerPutBack]).toEqual([true, false]);
  });

  it('is mended by a newer backup, when the older one was put back first', async () => {
    const { path, backup, own } = await disk();
    await pqblkJson('resize', path, '8G', '--key', 'alice', ...own);
    {
      using identity = await new KeyStore(own[1] as string).unlock('alice');
      await using open = await openDisk(path, { format: 'sealed', identity });
      for (let at = 1; at < 40; at += 1) await open.write(new Uint8Array(4096), at * 2 ** 27);
      await open.write(new Uint8Array(4096).fill(3), 7 * 2 ** 30);
    }
    const newer = at(`${made}.newer`);
    await pqblkJson('header', 'backup', path, newer);
    damage(path, places(path).header);
    for (const argv of [
      ['header', 'restore', path, backup],
      ['check', '--repair', path], // would free what that header does not refer to
    ]) {
      const refused = await pqblk(...argv, '--key', 'alice', ...own);
      expect([refused.code, refused.stderr]).toEqual([
        exitCode('corrupt'),
        expect.stringMatching(/[1-9]\d* clusters that it does not refer to/),
      ]);
    }
    await requireNamed(path, own, '`pqblk header restore` with a newer backup');
    expect(await restoreJson(path, newer, ...own)).toMatchObject({ header: true, warnings: [] });
    expect((await pqblk('check', path, '--key', 'alice', ...own)).code).toBe(0);
  });

  it('is said to be smaller than the disk was, and grows again', async () => {
    const { own } = await disk();
    const path = at(`${made}.grows`);
    const backup = at(`${made}.grows.backup`);
    await pqblkJson('create', path, '16M', '--key', 'alice', ...own);
    await pqblkJson('header', 'backup', path, backup);
    await pqblkJson('resize', path, '20M', '--key', 'alice', ...own);
    const content = new Uint8Array(4096).fill(3);
    using identity = await new KeyStore(own[1] as string).unlock('alice');
    {
      await using open = await openDisk(path, { format: 'sealed', identity });
      await open.write(content, 19 * 2 ** 20);
    }
    damage(path, places(path).header);
    const { grownTo, warnings } = await restoreJson(path, backup, ...own);
    expect([grownTo, warnings]).toEqual([
      19 * 2 ** 20 + 65536,
      [expect.stringContaining('has data beyond the size in it: `pqblk resize')],
    ]);
    const bytes = readFileSync(path);
    bytes[79] = (bytes[79] ?? 0) | 2; // as a restore leaves it that was stopped
    writeFileSync(path, bytes);
    const repaired = await pqblk('check', path, '--repair', '--key', 'alice', ...own);
    expect(repaired).toMatchObject({ code: 0, stderr: expect.stringContaining(`DISK ${grownTo}`) });
    const smaller = await pqblkJson('check', path, '--key', 'alice', ...own);
    expect(smaller).toMatchObject({ grownTo, warnings });
    // What is beyond would be lost by a write, and keep the key that a rotation forgets.
    const early = {
      code: exitCode('corrupt'),
      stderr: expect.stringContaining(`\`pqblk resize DISK ${grownTo}\` comes first`),
    };
    const rotate = ['rotate-data-key', path, '--key', 'alice', ...own];
    for (const argv of [rotate, [...rotate, '--dry-run'], [...rotate, '--abort']]) {
      expect(await pqblk(...argv)).toMatchObject(early);
    }
    const socket = ['--nbd', at('grown.sock')];
    expect(await pqblk('serve', path, ...socket, '--key', 'alice', ...own)).toMatchObject(early);
    await takesNoWrite(path, identity);
    expect(await pqblkJson('info', path)).toMatchObject({ sealed: { keyAreaGeneration: 1 } });
    await pqblkJson('resize', path, String(grownTo), '--key', 'alice', ...own);
    const whole = await pqblkJson('check', path, '--key', 'alice', ...own);
    expect(whole).toMatchObject({ grownTo: 0, warnings: [] });
    await pqblkJson('rotate-data-key', path, '--key', 'alice', ...own);
    await using open = await openDisk(path, { format: 'sealed', identity });
    const found = new Uint8Array(4096);
    await open.read(found, 19 * 2 ** 20);
    expect(found).toEqual(content);
  });

  it('is said to be smaller by a part of a cluster as well', async () => {
    const { own } = await disk();
    const path = at(`${made}.part`);
    const backup = at(`${made}.part.backup`);
    await pqblkJson('create', path, '10272K', '--key', 'alice', ...own);
    await pqblkJson('header', 'backup', path, backup);
    await pqblkJson('resize', path, '10304K', '--key', 'alice', ...own);
    const content = new Uint8Array(4096).fill(3);
    using identity = await new KeyStore(own[1] as string).unlock('alice');
    {
      await using open = await openDisk(path, { format: 'sealed', identity });
      await open.write(content, 10272 * 1024);
    }
    damage(path, places(path).header);
    const { grownTo, warnings } = await restoreJson(path, backup, ...own);
    expect([grownTo, warnings]).toEqual([10276 * 1024, [expect.stringContaining(`${grownTo}`)]]);
    await takesNoWrite(path, identity);
    expect((await pqblk('check', path, '--repair', '--key', 'alice', ...own)).code).toBe(0);
    await pqblkJson('resize', path, '10304K', '--key', 'alice', ...own);
    await using open = await openDisk(path, { format: 'sealed', identity });
    await open.writeZeroes(0, 10272 * 1024, { unmap: true });
    const found = new Uint8Array(4096);
    await open.read(found, 10272 * 1024);
    expect(found).toEqual(content);
  });

  it('is right where one bit of the UUID in the header was wrong', async () => {
    const { path, backup, own } = await disk();
    const bytes = readFileSync(path);
    const uuid = bytes.indexOf(Buffer.from((await restoredUuid(path)).replaceAll('-', ''), 'hex'));
    bytes[uuid] = (bytes[uuid] ?? 0) ^ 1;
    writeFileSync(path, bytes);
    expect(await restoreJson(path, backup, ...own)).toMatchObject({ header: true });
    await requireContent(path, own);
  });

  it('without its header is in use again, but for a sector that is damaged', async () => {
    const { path, backup, own } = await disk();
    await damageOneSector(path, own);
    damage(path, places(path).header);
    const ended = await pqblk('header', 'restore', path, backup, '--key', 'alice', ...own);
    expect([ended.code, ended.stderr]).toEqual([
      exitCode('integrity'),
      expect.stringMatching(/: 1 of \d+ sectors do not open .*\n.*all is put back/),
    ]);
    expect(await pieces(path, own)).toBe(0);
  });

  it('is in use again by a word, whatever the check found', async () => {
    const { own } = await disk();
    const path = at(`${made}.tiny`);
    const backup = at(`${made}.tiny.backup`);
    const tiny = at('tiny.raw');
    writeFileSync(tiny, Buffer.alloc(16384, 5));
    await pqblkJson('import', tiny, path, '--key', 'alice', ...own);
    await pqblkJson('header', 'backup', path, backup);
    await damageOneSector(path, own);
    damage(path, places(path).header);
    const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
    expect((await pqblk(...restore)).code).toBe(exitCode('corrupt')); // 1 of 4 sectors
    expect((await pqblk(...restore, '--force')).code).toBe(exitCode('integrity'));
    expect(await pieces(path, own)).toBe(0);
  });

  it('without its key area is in use again, though a sector be damaged, with a word', async () => {
    const { path, backup, own } = await disk();
    await damageOneSector(path, own);
    damage(path, ...places(path).keyAreas);
    const restore = ['header', 'restore', path, backup, '--key', 'alice', ...own];
    expect(await pqblk(...restore)).toMatchObject({
      code: exitCode('data_key_missing'),
      stderr: expect.stringMatching(/: 1 of \d+ sectors do not open .*\n.*should these sectors be/),
    });
    expect((await pqblk(...restore, '--force')).code).toBe(0);
    expect(await pieces(path, own)).toBe(0);
  });

  it('opens with the word that was given for its key area', async () => {
    const { path, backup, own, word } = await contested();
    damage(path, places(path).header);
    const restored = await restoreJson(path, backup, '--keep-key-area', ...word, ...own);
    expect(restored.after).toMatchObject([{ label: 'alice', state: 'active' }, { label: 'bob' }]);
    await requireContent(path, own);
  });
});
