// Copies of the key area that somebody without a key, or with a former one, wrote under a checksum that
// holds: the copy that counts is used, the other one is named and mended, and nobody is shut out for good.
import { createHash } from 'node:crypto';
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import {
  changeKeyArea,
  checkDisk,
  createDisk,
  diskInfo,
  type Identity,
  type KeyAreaEditor,
  KeyStore,
  keyAreaOf,
  openDisk,
  rotateDataKey,
} from '../../src/index.js';
import { createKeyArea, sealKeyArea, unlockKeyArea } from '../../src/keys/key-area.js';
import { Pins } from '../../src/keys/pins.js';
import { pqblk } from '../cli/helpers.js';
import { parseHeader } from '../reader/header.js';
import { errorOf, temporaryDirectory } from './support.js';

const HIGHEST = 2n ** 64n - 1n;
const [A, B] = [0, 1] as const;

let dir: string;
let store: KeyStore;
let pristine: string;
let alice: Identity;
let bob: Identity;
let made = 0;

beforeAll(async () => {
  dir = await temporaryDirectory();
  store = new KeyStore(join(dir, 'keys'));
  for (const name of ['alice', 'bob']) await store.generate(name, { noPassphrase: true });
  [alice, bob] = [await store.unlock('alice'), await store.unlock('bob')];
  pristine = join(dir, 'pristine.sealed');
  const recipients = [await store.recipient('alice'), await store.recipient('bob')];
  await createDisk(pristine, { format: 'sealed', size: 2 ** 24, recipients, logBytes: 2 ** 23 });
});

const fresh = () => {
  made += 1;
  const path = join(dir, `${made}.sealed`);
  copyFileSync(pristine, path);
  return { path, pins: new Pins(join(dir, `pins-${made}`)) };
};

const placeOf = (path: string, copy: 0 | 1) => {
  const bytes = readFileSync(path);
  return parseHeader(bytes.subarray(0, 2 ** 21), bytes.length).keyAreas[copy].offset;
};

const blobAt = (path: string, copy: 0 | 1) => {
  const at = placeOf(path, copy) + 4096;
  return Buffer.from(readFileSync(path).subarray(at, at + 65_536));
};

/** Writes a copy as whoever can write the file can: with the number and the checksum that he likes. */
function forge(path: string, copy: 0 | 1, number: bigint, blob: Uint8Array): void {
  const bytes = readFileSync(path);
  const at = placeOf(path, copy);
  bytes.writeBigUInt64BE(number, at + 8);
  bytes.set(blob, at + 4096);
  const sum = createHash('sha3-256')
    .update(bytes.subarray(at, at + 32))
    .update(blob)
    .digest();
  bytes.set(sum, at + 32);
  writeFileSync(path, bytes);
}

const withGeneration = (blob: Uint8Array, generation: bigint) => {
  const changed = Buffer.from(blob);
  changed.writeBigUInt64LE(generation, 16);
  return changed;
};

async function opens(path: string, identity: Identity, pins?: Pins): Promise<string> {
  try {
    await (await openDisk(path, { format: 'sealed', identity, pins })).close();
    return 'opens';
  } catch (error) {
    return (error as { kind: string }).kind;
  }
}

async function change(path: string, pins: Pins, edit: (editor: KeyAreaEditor) => void, more = {}) {
  const trusted = new Set((await store.list()).keys.map((key) => key.fingerprint));
  const operation = 'slot-revoke' as const;
  const place = keyAreaOf(path);
  return await changeKeyArea({ place, identity: alice, operation, trusted, pins, edit, ...more });
}
const revokeBob = (editor: KeyAreaEditor) => editor.revoke(1);

/** The check value of the only volume that was seen. */
const knownTo = async (pins: Pins) => (await pins.list())[0]?.vmkCheck as string;

/** `check` names the damage, `check --repair` mends it, and then nothing is wrong. */
async function requireMended(
  path: string,
  pins: Pins,
  what: RegExp,
  confirmVmk?: string,
): Promise<void> {
  const options = { format: 'sealed' as const, identity: alice, pins, confirmVmk };
  const found = await checkDisk(path, options);
  expect(found).toMatchObject({ clean: false, corruptions: 1 });
  expect(found.messages.join('\n')).toMatch(what);
  expect(await checkDisk(path, { ...options, repair: true })).toMatchObject({ clean: true });
  await requireWhole(path);
}

async function requireWhole(path: string): Promise<void> {
  expect((await diskInfo(path, 'sealed')).sealed?.keyAreaFindings).toEqual([]);
  expect(blobAt(path, A).equals(blobAt(path, B))).toBe(true);
}

describe('without a key', () => {
  it('an old copy that calls itself the newest is passed over, named and mended', async () => {
    const { path, pins } = fresh();
    expect(await opens(path, alice, pins)).toBe('opens');
    const old = blobAt(path, A);
    await change(path, pins, revokeBob);
    forge(path, A, 99n, old);
    for (const remembered of [pins, undefined]) {
      expect(await opens(path, alice, remembered)).toBe('opens');
    }
    expect(await opens(path, bob)).toBe('slot_revoked');
    const report = await pqblk('report', path);
    expect(report.stdout).toMatch(/number 99 and generation 1[\s\S]*copies of the key area differ/);
    expect((await pqblk('info', path)).stdout).toMatch(/DAMAGE: copy 1 .* number 99/);
    await requireMended(path, pins, /number 99/);
    expect(await opens(path, bob)).toBe('slot_revoked');
  });

  it('the highest number there is stops no change, and repair begins the numbers anew', async () => {
    for (const repair of [false, true]) {
      const { path, pins } = fresh();
      expect(await opens(path, alice, pins)).toBe('opens');
      for (const copy of [A, B]) forge(path, copy, HIGHEST, blobAt(path, copy));
      expect((await pqblk('report', path)).stdout).toContain(`number ${HIGHEST}`);
      if (repair) await requireMended(path, pins, /number 18446744073709551615/);
      else await change(path, pins, revokeBob);
      await requireWhole(path);
      expect(await opens(path, alice, pins)).toBe('opens');
      expect(await opens(path, bob)).toBe(repair ? 'opens' : 'slot_revoked');
    }
  });

  it('a generation that the MAC does not know makes the copy a damaged one', async () => {
    const { path, pins } = fresh();
    expect(await opens(path, alice, pins)).toBe('opens');
    await change(path, pins, revokeBob);
    forge(path, B, 99n, withGeneration(blobAt(path, B), 99n));
    for (const remembered of [pins, undefined]) {
      expect(await opens(path, alice, remembered)).toBe('opens');
    }
    const { after } = await change(path, pins, (editor) => editor.rotateMasterKey());
    expect(after.generation).toBe(3);
    await requireWhole(path);
  });

  it('a copy that denies a key its slot is passed over where the host knows the other', async () => {
    const { path, pins } = fresh();
    expect(await opens(path, alice, pins)).toBe('opens');
    const denying = withGeneration(blobAt(path, A), 7n);
    denying[4096 + 512] = (denying[4096 + 512] ?? 0) ^ 1; // alice's encapsulation key
    forge(path, A, 7n, denying);
    expect(await opens(path, alice)).toBe('no_slot'); // for all that is known here it is true
    expect(await opens(path, alice, pins)).toBe('opens');
    const before = readFileSync(path);
    const error = await errorOf(() => change(path, pins, revokeBob));
    expect([error.kind, error.hint]).toEqual(['no_slot', expect.stringContaining('--repair')]);
    const unasked = { format: 'sealed' as const, identity: alice, pins, repair: true };
    expect((await errorOf(() => checkDisk(path, unasked))).kind).toBe('no_slot');
    expect(readFileSync(path).equals(before)).toBe(true);
    await requireMended(path, pins, /passed over: no slot/, await knownTo(pins));
    await change(path, pins, revokeBob);
    expect(await opens(path, bob)).toBe('slot_revoked');
  });

  it('no old copy is preferred: what the pin refuses stays refused', async () => {
    const { path, pins } = fresh();
    expect(await opens(path, alice, pins)).toBe('opens');
    const old = blobAt(path, A);
    await change(path, pins, (editor) => editor.rewrap(0));
    for (const copy of [A, B]) forge(path, copy, 99n, old);
    expect(await opens(path, alice, pins)).toBe('rollback');
    const options = { format: 'sealed' as const, identity: alice, pins, repair: true };
    expect((await errorOf(() => checkDisk(path, options))).kind).toBe('rollback');
    forge(path, A, 100n, withGeneration(old, 50n)); // and a false one does not help an old one
    expect(await opens(path, alice, pins)).toBe('rollback');
  });
});

describe('with a master key that is no more', () => {
  /** A key area of generation 4 under the first master key, and a disk whose master key has changed. */
  async function forgedByBob() {
    const { path, pins } = fresh();
    const other = fresh();
    for (let round = 0; round < 3; round += 1) {
      await change(other.path, other.pins, (editor) => editor.rewrap(1));
    }
    expect(await opens(path, alice, pins)).toBe('opens');
    await change(path, pins, revokeBob);
    forge(path, A, 4n, blobAt(other.path, A));
    return { path, pins };
  }

  it('a copy is believed by nobody who has a pin; his word stays with the other, and takes it away', async () => {
    const { path, pins } = await forgedByBob();
    const confirmVmk = await knownTo(pins);
    const error = await errorOf(() => openDisk(path, { format: 'sealed', identity: alice, pins }));
    expect([error.kind, error.hint]).toEqual([
      'vmk_changed',
      expect.stringContaining(`check --repair --confirm-vmk ${confirmVmk}\` goes back to copy 2`),
    ]);
    const rotate = (editor: KeyAreaEditor) => editor.rotateMasterKey();
    expect((await errorOf(() => change(path, pins, rotate))).kind).toBe('vmk_changed');
    // His word opens the disk; a change waits for the repair, which looks at every sector first.
    const confirmed = await errorOf(() => change(path, pins, rotate, { confirmVmk }));
    expect([confirmed.kind, confirmed.hint]).toEqual([
      'vmk_changed',
      expect.stringContaining('check --repair'),
    ]);
    await requireMended(path, pins, /passed over: .* another master key/, confirmVmk);
    expect(await opens(path, bob)).toBe('slot_revoked');
    await change(path, pins, rotate);
  });

  // What was finished elsewhere, and an old copy put back beside it: neither is opened, nor mended away.
  it('a copy that this host knows does not hide a rotation', async () => {
    const { path, pins } = fresh();
    const elsewhere = new Pins(join(dir, `pins-elsewhere-${made}`));
    expect(await opens(path, alice, pins)).toBe('opens');
    const old = blobAt(path, A);
    await change(path, elsewhere, revokeBob);
    forge(path, A, 1n, old);
    const before = readFileSync(path);
    expect(await opens(path, alice, pins)).toBe('vmk_changed');
    const repair = { format: 'sealed' as const, identity: alice, pins, repair: true };
    expect((await errorOf(() => checkDisk(path, repair))).kind).toBe('vmk_changed');
    const asBob = { ...repair, identity: bob };
    expect((await errorOf(() => checkDisk(path, asBob))).kind).toBe('slot_revoked');
    expect(readFileSync(path).equals(before)).toBe(true);
    expect(await opens(path, alice, elsewhere)).toBe('opens');
  });

  it('without a pin the highest generation that is authentic counts', async () => {
    const { path } = await forgedByBob();
    expect(await opens(path, bob)).toBe('opens');
  });
});

it('a rotation elsewhere that was cut short is completed by who confirms it', async () => {
  const { path, pins } = fresh();
  const elsewhere = new Pins(join(dir, `pins-elsewhere-${made}`));
  expect(await opens(path, alice, pins)).toBe('opens');
  const before = blobAt(path, A);
  const { after } = await change(path, elsewhere, (editor) => editor.rotateMasterKey());
  forge(path, A, 1n, before); // the second copy was never reached
  expect(await opens(path, alice, pins)).toBe('vmk_changed');
  const edit = (editor: KeyAreaEditor) => editor.revoke(1);
  expect((await errorOf(() => change(path, pins, edit))).kind).toBe('vmk_changed');
  const confirmVmk = after.vmkCheck as string;
  const done = await change(path, pins, edit, { confirmVmk });
  expect([done.before.generation, done.after.generation]).toEqual([2, 3]);
  await requireWhole(path);
});

it('a generation that cannot grow: a new master key begins to count anew', async () => {
  const { path, pins } = fresh();
  const generation = Number.MAX_SAFE_INTEGER;
  const { area, table, vmk, master } = await unlockKeyArea(blobAt(path, A), bob, {});
  const last = sealKeyArea(master, { ...area.head, generation }, area.slots, table);
  vmk.wipe();
  for (const copy of [A, B]) forge(path, copy, BigInt(generation), last);
  expect(await opens(path, alice, pins)).toBe('opens');
  const error = await errorOf(() => change(path, pins, (editor) => editor.rewrap(0)));
  expect([error.kind, error.hint]).toEqual(['out_of_range', expect.stringContaining('rotate')]);
  const { after } = await change(path, pins, revokeBob);
  expect(after.generation).toBe(1);
  await requireWhole(path);
  expect(await opens(path, alice, pins)).toBe('opens');
  expect(await opens(path, bob)).toBe('slot_revoked');
});

it('a copy for strangers does not hide whom its sister is for', async () => {
  const { path } = fresh();
  const own = ['--store', store.path];
  expect((await pqblk('check', path, ...own)).code).toBe(0); // this host knows it now
  const strangers = new KeyStore(join(dir, 'strangers'));
  await strangers.generate('carol', { noPassphrase: true });
  const { volumeUuid } = await keyAreaOf(path).read();
  const recipients = [await strangers.recipient('carol')];
  const { blob } = await createKeyArea({ volumeUuid, recipients });
  forge(path, A, 99n, withGeneration(blob, 99n));
  expect(await pqblk('slot', 'test', path, ...own)).toMatchObject({ code: 0 }); // no --key: one that fits
  const confirm = ['--confirm-vmk', await knownTo(store.pins)];
  expect((await pqblk('check', path, '--repair', ...confirm, ...own)).code).toBe(0);
  await requireWhole(path);
});

it('no repair takes the data key away that the sectors want', async () => {
  const { path, pins } = fresh();
  const elsewhere = new Pins(join(dir, `pins-elsewhere-${made}`));
  const rotate = async (more: object) => {
    await using disk = await openDisk(path, { format: 'sealed', identity: alice, pins: elsewhere });
    await disk.write(new Uint8Array(4096).fill(7), 0);
    return await rotateDataKey(disk, { identity: alice, pins: elsewhere, ...more });
  };
  const onStep = async (step: string) => {
    if (step === 'begun') throw new Error('stop here');
  };
  await expect(rotate({ onStep })).rejects.toThrow('stop here');
  const old = blobAt(path, A);
  expect(await opens(path, alice, pins)).toBe('opens');
  await rotate({ abort: true });
  await rotate({}); // under the same number, another key
  await change(path, elsewhere, (editor) => editor.rotateMasterKey());
  forge(path, A, 2n, old);
  const [before, confirmVmk] = [blobAt(path, B), await knownTo(pins)];
  const options = { format: 'sealed' as const, identity: alice, pins, repair: true };
  const found = await checkDisk(path, { ...options, confirmVmk });
  expect(found).toMatchObject({ clean: false, sectorsBad: 1 });
  expect(found.messages.join('\n')).toMatch(/left alone: 1 sectors do not open .*keys; those/);
  expect(blobAt(path, B).equals(before)).toBe(true);
  expect(await opens(path, alice, elsewhere)).toBe('opens');
});
