// `pqblk header backup|restore`: each thing that a backup brings back, what it opens again, and what it
// must never do: touch a header that can be read, or trust table positions that are no longer true.
import { copyFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { KeyStore, openDisk, type RestoredHeader, rotateDataKey } from '../../src/index.js';
import { KEY_AREA_COPY_BYTES, parseHeader } from '../reader/header.js';
import { exitCode, peer, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const withStore = (argv: string[]) => [...argv, '--store', at('keys')];
const run = (...argv: string[]) => pqblk(...withStore(argv));
const source = at('source.raw');
let pristine: string;

beforeAll(async () => {
  peer('qemu-img', 'create', '-q', '-f', 'raw', source, '16M');
  peer('qemu-io', '-f', 'raw', '-c', 'write -q -P 7 1M 3M', '-c', 'write -q -P 9 9M 70k', source);
  for (const name of ['alice', 'bob', 'carol']) {
    await run('key', 'gen', name, '--no-passphrase');
  }
  pristine = at('pristine.sealed');
  const keys = ['--key', 'alice', '--key', 'bob'];
  const small = ['--cluster-size', '4k', '--log-size', '8M'];
  await pqblkJson(...withStore(['import', source, pristine, ...keys, ...small]));
});

let made = 0;
/** A disk with content, its backup, and a key store that has never seen either. */
async function disk(): Promise<{ path: string; backup: string; own: string[] }> {
  made += 1;
  const path = at(`${made}.sealed`);
  const backup = at(`${made}.backup`);
  copyFileSync(pristine, path);
  await pqblkJson('header', 'backup', path, backup);
  const own = at(`keys-${made}`);
  peer('cp', '-a', at('keys'), own);
  peer('rm', '-rf', join(own, 'pins'));
  return { path, backup, own: ['--store', own] };
}

const headerOf = (path: string) => {
  const bytes = readFileSync(path);
  return parseHeader(bytes.subarray(0, 2 ** 21), bytes.length);
};

function damage(path: string, ...ranges: { offset: number; length: number }[]): void {
  const bytes = readFileSync(path);
  for (const { offset, length } of ranges) bytes.fill(0x5a, offset, offset + length);
  writeFileSync(path, bytes);
}

const places = (path: string) => {
  const { keyAreas, sessionTables } = headerOf(path);
  return {
    header: { offset: 0, length: 512 },
    keyAreas: keyAreas.map(({ offset }) => ({ offset, length: KEY_AREA_COPY_BYTES })),
    // All but the head: beside a header that is gone as well nothing else proves what lies there.
    sessions: sessionTables.map(({ offset }) => ({ offset: offset + 128, length: 1024 })),
    sessionTables: sessionTables.map(({ offset }) => ({ offset, length: 4096 })),
  };
};

const keyAreasOf = (path: string) =>
  places(path).keyAreas.map(({ offset, length }) =>
    readFileSync(path).subarray(offset, offset + length),
  );

/** A rotation of the data key that was begun, and no more. */
async function stopInRotation(path: string, own: string[]): Promise<void> {
  using identity = await new KeyStore(own[1] as string).unlock('alice');
  await using open = await openDisk(path, { format: 'sealed', identity });
  const onStep = async (step: string) => {
    if (step === 'begun') throw new Error('stop here');
  };
  await expect(rotateDataKey(open, { identity, onStep })).rejects.toThrow('stop here');
}

/** Both copies of the key area as they were in the beginning. Returns the disk's bytes. */
function putOldCopiesBack(path: string): Buffer {
  const bytes = readFileSync(path);
  for (const { offset, length } of places(path).keyAreas) {
    bytes.set(readFileSync(pristine).subarray(offset, offset + length), offset);
  }
  writeFileSync(path, bytes);
  return bytes;
}

async function requireContent(path: string, own: string[]): Promise<void> {
  const out = at(`out-${made}.raw`);
  const exported = await pqblk('export', path, out, '--key', 'alice', '--force', ...own);
  expect(exported).toMatchObject({ code: 0 });
  peer('cmp', source, out);
}

const restoredUuid = async (path: string) =>
  (await pqblkJson<{ sealed: { uuid: string } }>('info', path)).sealed.uuid;

/** Somewhere in the data of the disk, found by trying. */
async function damageOneSector(path: string, own: string[]): Promise<void> {
  const bytes = readFileSync(path);
  for (let offset = bytes.length - 2048; offset > 0; offset -= 4096) {
    if (bytes[offset] === 0) continue;
    const damaged = Buffer.from(bytes);
    damaged[offset] = (bytes[offset] ?? 0) ^ 1;
    writeFileSync(path, damaged);
    const { code, stdout } = await pqblk('check', path, '--key', 'alice', '--json', ...own);
    if (code === exitCode('integrity') && JSON.parse(stdout).sectorsBad === 1) return;
  }
  throw new Error('no sector of the disk found');
}

/** Without --force; nothing is written. */
async function requireRefused(path: string, backup: string, own: string[]): Promise<void> {
  const before = readFileSync(path);
  const ended = await pqblk(
    'header',
    'restore',
    path,
    backup,
    '--key',
    'alice',
    '--allow-rollback',
    ...own,
  );
  expect([ended.code, ended.stderr]).toEqual([
    exitCode('policy'),
    expect.stringContaining('--force'),
  ]);
  expect(readFileSync(path).equals(before)).toBe(true);
}

const restoreJson = async (path: string, backup: string, ...argv: string[]) =>
  await pqblkJson<RestoredHeader & { warnings: string[] }>(
    ...['header', 'restore', path, backup, '--key', 'alice', ...argv],
  );

describe('a backup brings back', () => {
  it.each(['header', 'keyAreas', 'sessions', 'sessionTables', 'all'] as const)(
    '%s',
    async (what) => {
      const { path, backup, own } = await disk();
      const known = places(path);
      const ranges =
        what === 'all'
          ? [known.header, ...known.keyAreas, ...known.sessions]
          : [known[what]].flat();
      damage(path, ...ranges);
      const broken = await pqblk('export', path, at('x.raw'), '--key', 'alice', '--force', ...own);
      expect(broken.code).not.toBe(0);
      const restored = await restoreJson(path, backup, ...own);
      expect(restored).toMatchObject({
        header: what === 'header' || what === 'all',
        keyArea: what === 'keyAreas' || what === 'all',
        sessions: ['sessions', 'sessionTables', 'all'].includes(what) ? 1 : 0,
      });
      await requireContent(path, own);
      expect((await pqblk('check', path, '--key', 'bob', ...own)).code).toBe(0);
      const again = await restoreJson(path, backup, ...own);
      expect(again).toMatchObject({ header: false, keyArea: false, sessions: 0 });
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
    const argv = command === 'check' ? [command, path, word] : [command, word, path, backup];
    expect(await pqblk(...argv, '--key', 'alice', ...own)).toMatchObject({ code: 0 });
    expect(readFileSync(path)[79]).toBe((bytes[79] ?? 0) & ~2);
    expect(await pieces(path, own)).toBe(0);
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
    await pqblkJson('resize', path, String(grownTo), '--key', 'alice', ...own);
    await using open = await openDisk(path, { format: 'sealed', identity });
    const found = new Uint8Array(4096);
    await open.read(found, 19 * 2 ** 20);
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
    const { path, backup, own } = await disk();
    const { vmkCheck } = await pqblkJson<{ vmkCheck: string }>(
      ...['slot', 'test', path, '--key', 'alice', ...own],
    );
    const elsewhere = at(`keys-${made}-elsewhere`);
    peer('cp', '-a', own[1] as string, elsewhere);
    await pqblkJson('slot', 'revoke', path, 'alice', '--key', 'bob', '--store', elsewhere);
    const bytes = readFileSync(path);
    const { header, keyAreas } = places(path);
    const { offset, length } = keyAreas[0] ?? { offset: 0, length: 0 };
    bytes.set(readFileSync(pristine).subarray(offset, offset + length), offset);
    writeFileSync(path, bytes);
    damage(path, header);
    const word = ['--confirm-vmk', vmkCheck];
    const restored = await restoreJson(path, backup, '--keep-key-area', ...word, ...own);
    expect(restored.after).toMatchObject([{ label: 'alice', state: 'active' }, { label: 'bob' }]);
    await requireContent(path, own);
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
    // The header that can be read is the truth, whatever an old backup says.
    writeFileSync(path, grown);
    expect(await restoreJson(path, backup, ...own)).toMatchObject({ header: false });
    expect(readFileSync(path).subarray(0, 4096).equals(grown.subarray(0, 4096))).toBe(true);
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

  it('on the word of somebody who was revoked since', async () => {
    const { path, backup, own } = await disk();
    const old = await pqblkJson<{ vmkCheck: string }>('slot', 'test', path, '--key', 'bob', ...own);
    await pqblkJson('slot', 'revoke', path, 'bob', '--key', 'alice', ...own);
    writeFileSync(at('two.yaml'), 'version: 1\ntwoPersons: [header-restore]\n');
    const accept = ['--allow-rollback', '--confirm-vmk', old.vmkCheck];
    const argv = ['header', 'restore', path, backup, '--policy', at('two.yaml'), ...accept, ...own];
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
  });

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
    for (let runs = 0; runs < 2; runs += 1) {
      const { code, stderr } = await pqblk(...restore, ...own);
      expect([code, stderr]).toEqual([
        exitCode('data_key_missing'),
        expect.stringContaining('restore a newer one'),
      ]);
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
