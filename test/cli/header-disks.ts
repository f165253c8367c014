// What the tests of header backups share: a small disk with content, ways to damage it, and restores.
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, expect } from 'vitest';
import { KeyStore, openDisk, type RestoredHeader, rotateDataKey } from '../../src/index.js';
import { KEY_AREA_COPY_BYTES, parseHeader } from '../reader/header.js';
import { exitCode, peer, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
export const at = (name: string) => join(dir, name);
const withStore = (argv: string[]) => [...argv, '--store', at('keys')];
const run = (...argv: string[]) => pqblk(...withStore(argv));
export const source = at('source.raw');
export const pristine = at('pristine.sealed');

beforeAll(async () => {
  peer('qemu-img', 'create', '-q', '-f', 'raw', source, '16M');
  peer('qemu-io', '-f', 'raw', '-c', 'write -q -P 7 1M 3M', '-c', 'write -q -P 9 9M 70k', source);
  for (const name of ['alice', 'bob', 'carol']) {
    await run('key', 'gen', name, '--no-passphrase');
  }
  const keys = ['--key', 'alice', '--key', 'bob'];
  const small = ['--cluster-size', '4k', '--log-size', '8M'];
  await pqblkJson(...withStore(['import', source, pristine, ...keys, ...small]));
});

export let made = 0;
/** A disk with content, its backup, and a key store that has never seen either. */
export async function disk(): Promise<{ path: string; backup: string; own: string[] }> {
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

export const headerOf = (path: string) => {
  const bytes = readFileSync(path);
  return parseHeader(bytes.subarray(0, 2 ** 21), bytes.length);
};

export function damage(path: string, ...ranges: { offset: number; length: number }[]): void {
  const bytes = readFileSync(path);
  for (const { offset, length } of ranges) bytes.fill(0x5a, offset, offset + length);
  writeFileSync(path, bytes);
}

export const places = (path: string) => {
  const { keyAreas, sessionTables, log } = headerOf(path);
  return {
    header: { offset: 0, length: 512 },
    keyAreas: keyAreas.map(({ offset }) => ({ offset, length: KEY_AREA_COPY_BYTES })),
    // All but the head: beside a header that is gone as well nothing else proves what lies there.
    sessions: sessionTables.map(({ offset }) => ({ offset: offset + 128, length: 1024 })),
    sessionTables: sessionTables.map(({ offset }) => ({ offset, length: 4096 })),
    log: { offset: log.offset, length: 8192 }, // its header, twice
  };
};

export const keyAreasOf = (path: string) =>
  places(path).keyAreas.map(({ offset, length }) =>
    readFileSync(path).subarray(offset, offset + length),
  );

/** A rotation of the data key that was begun, and no more. */
export async function stopInRotation(path: string, own: string[]): Promise<void> {
  using identity = await new KeyStore(own[1] as string).unlock('alice');
  await using open = await openDisk(path, { format: 'sealed', identity });
  const onStep = async (step: string) => {
    if (step === 'begun') throw new Error('stop here');
  };
  await expect(rotateDataKey(open, { identity, onStep })).rejects.toThrow('stop here');
}

/** Both copies of the key area as they were in the beginning. Returns the disk's bytes. */
export function putOldCopiesBack(path: string): Buffer {
  const bytes = readFileSync(path);
  for (const { offset, length } of places(path).keyAreas) {
    bytes.set(readFileSync(pristine).subarray(offset, offset + length), offset);
  }
  writeFileSync(path, bytes);
  return bytes;
}

/** Copy B ends alice's key, says another host; copy A is of before. */
export async function contested() {
  const { path, backup, own } = await disk();
  const { vmkCheck } = await pqblkJson<{ vmkCheck: string }>(
    ...['slot', 'test', path, '--key', 'alice', ...own],
  );
  const elsewhere = at(`keys-${made}-elsewhere`);
  peer('cp', '-a', own[1] as string, elsewhere);
  await pqblkJson('slot', 'revoke', path, 'alice', '--key', 'bob', '--store', elsewhere);
  const bytes = readFileSync(path);
  const [{ offset, length } = { offset: 0, length: 0 }] = places(path).keyAreas;
  bytes.set(readFileSync(pristine).subarray(offset, offset + length), offset);
  writeFileSync(path, bytes);
  const word = ['--confirm-vmk', vmkCheck]; // for alice's
  const repair = ['check', path, '--repair', '--key', 'alice', ...word, ...own];
  return { path, backup, own, word, repair };
}

export async function requireContent(path: string, own: string[]): Promise<void> {
  const out = at(`out-${made}.raw`);
  const exported = await pqblk('export', path, out, '--key', 'alice', '--force', ...own);
  expect(exported).toMatchObject({ code: 0 });
  peer('cmp', source, out);
}

export const restoredUuid = async (path: string) =>
  (await pqblkJson<{ sealed: { uuid: string } }>('info', path)).sealed.uuid;

/** Somewhere in the data of the disk, found by trying. */
export async function damageOneSector(path: string, own: string[]): Promise<void> {
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

/** Without --force; nothing is written. What the hint says of --force is so. */
export async function requireRefused(path: string, backup: string, own: string[]): Promise<void> {
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
    expect.stringContaining('--keep-key-area'),
  ]);
  expect(readFileSync(path).equals(before)).toBe(true);
  const helps = ended.stderr.includes('--force');
  const forced = `${path}.forced`;
  copyFileSync(path, forced);
  const store = `${own[1]}.forced`;
  peer('cp', '-a', own[1] as string, store);
  const restore = ['header', 'restore', forced, backup, '--key', 'alice', '--allow-rollback'];
  const { code } = await pqblk(...restore, '--force', '--store', store);
  const opens = (await pqblk('check', forced, '--key', 'alice', '--store', store)).code;
  if (helps) expect([code, opens]).toEqual([0, exitCode('integrity')]);
  else
    expect([code, readFileSync(forced).equals(before)]).toEqual([
      exitCode('data_key_missing'),
      true,
    ]);
}

export const restoreJson = async (path: string, backup: string, ...argv: string[]) =>
  await pqblkJson<RestoredHeader & { warnings: string[] }>(
    ...['header', 'restore', path, backup, '--key', 'alice', ...argv],
  );
