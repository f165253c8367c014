// `pqblk header restore` takes away no data key: each way to lose the only copy of one, and what is no loss.
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { KeyStore, openDisk } from '../../src/index.js';
import {
  at,
  damage,
  disk,
  keyAreasOf,
  made,
  places,
  pristine,
  putOldCopiesBack,
  requireContent,
  requireRefused,
  restoreJson,
  source,
  stopInRotation,
} from './header-disks.js';
import { exitCode, peer, pqblk, pqblkJson } from './helpers.js';

describe('a restore refuses', () => {
  it('a backup without the data key of either copy', async () => {
    const { path, backup, own } = await disk();
    for (const word of ['rotate-data-key', 'rotate-master-key']) {
      await pqblkJson(word, path, '--key', 'alice', ...own);
    }
    // A copy of the former master key that says that it is the newest.
    const other = at(`${made}.other.sealed`);
    copyFileSync(pristine, other);
    const store = ['--store', at('keys')];
    for (let round = 0; round < 5; round += 1) {
      await pqblkJson('slot', 'retire', other, 'bob', '--key', 'alice', ...store);
      await pqblkJson('slot', 'retire', other, 'bob', '--undo', '--key', 'alice', ...store);
    }
    const bytes = readFileSync(path);
    const [{ offset, length } = { offset: 0, length: 0 }] = places(path).keyAreas;
    bytes.set(readFileSync(other).subarray(offset, offset + length), offset);
    writeFileSync(path, bytes);
    const argv = ['header', 'restore', path, backup, '--key', 'alice', '--allow-rollback', ...own];
    const { vmkCheck } = await pqblkJson<{ vmkCheck: string }>(
      ...['slot', 'test', other, '--key', 'bob', ...store],
    );
    const { code } = await pqblk(...argv, '--confirm-vmk', vmkCheck);
    expect(code).toBe(exitCode('policy'));
    expect(readFileSync(path).equals(bytes)).toBe(true);
  });

  it('the newest backup only with a word, when old copies were put into both places', async () => {
    const { path, own } = await disk();
    for (const word of ['rotate-data-key', 'rotate-master-key']) {
      await pqblkJson(word, path, '--key', 'alice', ...own);
    }
    const newest = at(`${made}.newest`);
    await pqblkJson('header', 'backup', path, newest);
    const bytes = putOldCopiesBack(path);
    const restore = ['header', 'restore', path, newest, '--key', 'alice', ...own];
    const refused = await pqblk(...restore);
    expect([refused.code, refused.stderr]).toEqual([
      exitCode('policy'),
      expect.stringContaining('the pin of this host knows the backup'),
    ]);
    expect(readFileSync(path).equals(bytes)).toBe(true);
    writeFileSync(at('two.yaml'), 'version: 1\ntwoPersons: [header-restore]\n');
    for (const more of [['--policy', at('two.yaml'), '--approve', 'bob'], []]) {
      writeFileSync(path, bytes);
      await restoreJson(path, newest, '--force', ...more, ...own);
      await requireContent(path, own);
    }
  });

  // Each of these lost the data key of what was written last.
  it('to believe a pin that is older than the disk', async () => {
    const { path, backup, own } = await disk();
    await pqblkJson('slot', 'test', path, '--key', 'alice', ...own);
    const elsewhere = at(`keys-${made}-elsewhere`);
    peer('cp', '-a', own[1] as string, elsewhere);
    for (const word of ['rotate-master-key', 'rotate-data-key']) {
      await pqblkJson(word, path, '--key', 'alice', '--store', elsewhere);
    }
    await requireRefused(path, backup, own);
  });

  it('to believe a pin that is of another copy of the disk', async () => {
    const one = await disk();
    const two = `${one.path}.copy`;
    copyFileSync(one.path, two);
    for (const path of [two, one.path]) {
      await pqblkJson('rotate-data-key', path, '--key', 'alice', '--allow-rollback', ...one.own);
    }
    await pqblkJson('slot', 'retire', one.path, 'bob', '--key', 'alice', ...one.own);
    const backup = at(`${made}.backup-of-one`);
    await pqblkJson('header', 'backup', one.path, backup);
    await requireRefused(two, backup, one.own);
  });

  it('to pass over a newer copy that may be true', async () => {
    const { path, backup, own } = await disk();
    await pqblkJson('slot', 'revoke', path, 'alice', '--key', 'bob', ...own);
    await pqblkJson('rotate-data-key', path, '--key', 'bob', ...own);
    const bytes = readFileSync(path);
    const [{ offset, length } = { offset: 0, length: 0 }] = places(path).keyAreas;
    bytes.set(readFileSync(pristine).subarray(offset, offset + length), offset);
    writeFileSync(path, bytes);
    await requireRefused(path, backup, ['--store', at('keys')]);
  });

  it('to replace a whole key area because the header is gone', async () => {
    const { path, backup, own } = await disk();
    await pqblkJson('rotate-data-key', path, '--key', 'alice', ...own);
    const { header } = places(path);
    const whole = keyAreasOf(path);
    damage(path, header);
    await requireRefused(path, backup, own);
    const restored = await restoreJson(path, backup, '--keep-key-area', ...own);
    expect(restored).toMatchObject({ header: true, keyArea: false, warnings: [] });
    expect(keyAreasOf(path)).toEqual(whole);
    await requireContent(path, own);
  });

  it('to call a disk restored that its data key is missing of', async () => {
    const { path, backup, own } = await disk();
    await pqblkJson('rotate-data-key', path, '--key', 'alice', ...own);
    const rotated = readFileSync(path);
    const restore = ['header', 'restore', path, backup, '--key', 'alice', '--allow-rollback'];
    expect((await pqblk(...restore, ...own)).code).toBe(exitCode('policy'));
    expect(readFileSync(path).equals(rotated)).toBe(true);
    const newest = at(`${made}.newest`);
    await pqblkJson('header', 'backup', path, newest);
    damage(path, ...places(path).keyAreas);
    const damaged = keyAreasOf(path);
    for (const more of [[], [], ['--force']]) {
      const { code, stderr } = await pqblk(...restore, ...more, ...own);
      expect([code, stderr]).toEqual([
        exitCode('data_key_missing'),
        expect.stringContaining('restore a newer one'),
      ]);
      expect(stderr).not.toContain('--force');
      expect(keyAreasOf(path)).toEqual(damaged);
    }
    await restoreJson(path, newest, ...own);
    await requireContent(path, own);
  });

  it('to overwrite a damaged copy, because an old one beside it opens', async () => {
    const { path, backup, own } = await disk();
    await pqblkJson('rotate-data-key', path, '--key', 'alice', ...own);
    const [first, second] = places(path).keyAreas;
    if (!first || !second) throw new Error('two copies');
    const bytes = readFileSync(path);
    bytes.set(
      readFileSync(pristine).subarray(first.offset, first.offset + first.length),
      first.offset,
    );
    bytes[second.offset + 5000] = (bytes[second.offset + 5000] ?? 0) ^ 1;
    writeFileSync(path, bytes);
    const argv = ['header', 'restore', path, backup, '--key', 'alice', '--allow-rollback', ...own];
    const before = keyAreasOf(path);
    expect((await pqblk(...argv)).code).toBe(exitCode('data_key_missing'));
    expect(keyAreasOf(path)).toEqual(before);
  });

  // A rotation that was given up leaves its number to the next one.
  it('a data key of the right number that is another one', async () => {
    const { path, own } = await disk();
    await stopInRotation(path, own);
    const { stdout } = await pqblk('info', path);
    expect(stdout).toContain('a rotation to epoch 2 is under way, or was stopped');
    expect(await pqblkJson('report', path)).toMatchObject({
      disks: [{ findings: [{ kind: 'unfinished' }] }],
    });
    const backup = at(`${made}.given-up`);
    await pqblkJson('header', 'backup', path, backup);
    for (const how of [['--abort'], []]) {
      await pqblkJson('rotate-data-key', path, '--key', 'alice', ...how, ...own);
    }
    const rotated = readFileSync(path);
    const restore = ['header', 'restore', path, backup, '--key', 'alice', '--allow-rollback'];
    const refused = await pqblk(...restore, ...own);
    expect([refused.code, refused.stderr]).toEqual([
      exitCode('policy'),
      expect.stringContaining('data key of epoch 2'),
    ]);
    expect(readFileSync(path).equals(rotated)).toBe(true);
    // With nothing to compare it is what the sectors say.
    damage(path, ...places(path).keyAreas);
    const { code, stderr } = await pqblk(...restore, ...own);
    expect([code, stderr]).toEqual([
      exitCode('data_key_missing'),
      expect.stringMatching(/\d+ of \d+ sectors do not open with the data keys/),
    ]);
  });

  it('to call a disk restored of which a part opens', async () => {
    const { path, own } = await disk();
    await stopInRotation(path, own);
    const backup = at(`${made}.given-up`);
    await pqblkJson('header', 'backup', path, backup);
    await pqblkJson('rotate-data-key', path, '--key', 'alice', '--abort', ...own);
    await stopInRotation(path, own);
    {
      using identity = await new KeyStore(own[1] as string).unlock('alice');
      await using open = await openDisk(path, { format: 'sealed', identity });
      await open.write(new Uint8Array(4096).fill(3), 5 * 2 ** 20); // under the second key of epoch 2
    }
    damage(path, ...places(path).keyAreas);
    const argv = ['header', 'restore', path, backup, '--key', 'alice', '--allow-rollback'];
    const { code, stderr } = await pqblk(...argv, ...own);
    expect([code, stderr]).toEqual([
      exitCode('data_key_missing'),
      expect.stringMatching(/: 1 of \d+ sectors do not open with the data keys/),
    ]);
  });

  it('not an overlay whose backing image nobody vouches for', async () => {
    const { own } = await disk();
    const path = at(`${made}.overlay`);
    const backing = ['--backing', source, '--backing-format', 'raw'];
    await pqblkJson('create', path, '16M', ...backing, '--key', 'alice', ...own);
    const backup = at(`${made}.overlay.backup`);
    await pqblkJson('header', 'backup', path, backup);
    damage(path, ...places(path).keyAreas);
    expect(await restoreJson(path, backup, ...own)).toMatchObject({ keyArea: true });
  });

  it('not a backup of the middle of a rotation, which has both keys', async () => {
    const { path, own } = await disk();
    await stopInRotation(path, own);
    const backup = at(`${made}.middle`);
    await pqblkJson('header', 'backup', path, backup);
    await restoreJson(path, backup, ...own);
    await requireContent(path, own);
  });
});
