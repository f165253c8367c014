// Pins: an older key area or another master key is noticed, and accepted only when told to.
import { chmod, mkdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { createKeyArea, formatUuid, KeyStore, openKeyArea, toHex } from '../../src/keys/index.js';
import type { Observed, PinOptions } from '../../src/keys/pins.js';
import { errorOf, person, temporaryDirectory } from './support.js';

const UUID = new Uint8Array(16).fill(0xab);
const CHECK = new Uint8Array(32).fill(1);
const OTHER = new Uint8Array(32).fill(2);

const seen = (generation: number, currentEpoch = 1, vmkCheck = CHECK): Observed => ({
  volumeUuid: UUID,
  generation,
  currentEpoch,
  vmkCheck,
});

async function pinned(observed: Observed) {
  const store = new KeyStore(join(await temporaryDirectory(), 'keys'));
  expect(await store.pins.record(observed)).toBe('new');
  return store.pins;
}

test('first use is trusted, the same and newer open, and newer moves the pin', async () => {
  const pins = await pinned(seen(5));
  expect(await pins.check(seen(5))).toBe('same');
  expect(await pins.record(seen(5))).toBe('same');
  expect(await pins.check(seen(6))).toBe('newer');
  expect(await pins.get(UUID)).toEqual({ generation: 5, epoch: 1, vmkCheck: toHex(CHECK) });
  expect(await pins.record(seen(7, 2))).toBe('newer');
  expect(await pins.get(UUID)).toMatchObject({ generation: 7, epoch: 2 });
  expect(await pins.check({ ...seen(1), volumeUuid: new Uint8Array(16) })).toBe('new');
});

test('a store that takes no pin says what it is for, and is asked only when there is news', async () => {
  const directory = join(await temporaryDirectory(), 'keys');
  const { pins } = new KeyStore(directory);
  await pins.record(seen(5));
  const lock = join(directory, 'pins', `${formatUuid(UUID)}.lock`);
  await rm(lock);
  await mkdir(lock); // cannot be opened to be locked, not even by root
  expect(await pins.record(seen(5))).toBe('same');
  const error = await errorOf(() => pins.record(seen(6)));
  expect(error).toMatchObject({
    operation: 'remember key area',
    hint: expect.stringContaining('pin import'),
  });
});

test('older in generation or epoch is a rollback, unless allowed', async () => {
  const pins = await pinned(seen(5, 3));
  for (const older of [seen(4, 3), seen(5, 2), seen(9, 2)]) {
    for (const action of [() => pins.check(older), () => pins.record(older)]) {
      const error = await errorOf(action);
      expect(error.code).toBe('PQBLK_ROLLBACK');
      expect(error.hint).toContain('--allow-rollback');
    }
  }
  expect(await pins.get(UUID)).toMatchObject({ generation: 5, epoch: 3 });
  expect(await pins.check(seen(4, 3), { allowRollback: true })).toBe('rolled-back');
  expect(await pins.record(seen(4, 3), { allowRollback: true })).toBe('rolled-back');
  expect(await pins.get(UUID)).toMatchObject({ generation: 4, epoch: 3 });
});

test('another master key must be confirmed by its check value', async () => {
  const pins = await pinned(seen(5));
  const changed = seen(99, 9, OTHER);
  const full = toHex(OTHER);
  const refused: PinOptions[] = [
    {},
    { allowRollback: true },
    { confirmVmk: toHex(CHECK) },
    { confirmVmk: '' },
    { confirmVmk: full.slice(0, 15) },
    { confirmVmk: `${full}00` },
  ];
  for (const options of refused) {
    const error = await errorOf(() => pins.record(changed, options));
    expect(error.code).toBe('PQBLK_VMK_CHANGED');
    expect(error.message).toContain(full);
  }
  expect(await pins.check(changed, { confirmVmk: full.slice(0, 16).toUpperCase() })).toBe(
    'confirmed',
  );
  const older = seen(4, 1, OTHER);
  expect((await errorOf(() => pins.record(older, { confirmVmk: full }))).kind).toBe('rollback');
  expect(await pins.record(older, { confirmVmk: full, allowRollback: true })).toBe('confirmed');
  expect(await pins.get(UUID)).toEqual({ generation: 4, epoch: 1, vmkCheck: full });
});

test('an opened key area is what a pin observes', async () => {
  const store = new KeyStore(join(await temporaryDirectory(), 'keys'));
  const alice = await person('alice');
  const [one, two] = [
    await createKeyArea({ volumeUuid: UUID, recipients: [alice.recipient] }),
    await createKeyArea({ volumeUuid: UUID, recipients: [alice.recipient] }),
  ];
  expect(await store.pins.record(one)).toBe('new');
  const opened = await openKeyArea(one.blob, alice.identity);
  expect(await store.pins.check(opened)).toBe('same');
  const replaced = await openKeyArea(two.blob, alice.identity);
  expect((await errorOf(() => store.pins.check(replaced))).kind).toBe('vmk_changed');
  expect((await store.list()).keys).toEqual([]); // pins are no keys
});

test('pin files are private, and a damaged one is an error, not a first use', async () => {
  const directory = await temporaryDirectory();
  const { pins } = new KeyStore(join(directory, 'keys'));
  await pins.record(seen(5));
  const path = join(directory, 'keys', 'pins', `${formatUuid(UUID)}.json`);
  expect((await stat(path)).mode & 0o777).toBe(0o600);
  const text = await readFile(path, 'utf8');
  for (const bad of [
    '',
    'null',
    '[]',
    text.replace('"generation": 5', '"generation": 0'),
    text.replace('"generation": 5', '"generation": "5"'),
    text.replace('"epoch": 1', '"epoch": 1.5'),
    text.replace('0101', 'xxxx'),
    text.replace('abab', 'cdcd'),
    text.replace('"version": 1', '"version": 2'),
  ]) {
    await writeFile(path, bad);
    expect((await errorOf(() => pins.check(seen(5)))).kind, bad).toBe('bad_key');
  }
  await writeFile(path, text);
  await chmod(path, 0o644);
  expect((await errorOf(() => pins.check(seen(5)))).kind).toBe('permission');
});
