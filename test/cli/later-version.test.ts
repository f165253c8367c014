// A rotation that a later pqblk has begun, in a key area that this one can read: it opens the disk, and
// replaces nothing of it, since what is not known here would be dropped (docs/keys.md, "Key area").
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { expect, it } from 'vitest';
import { KeyStore, keyAreaOf } from '../../src/index.js';
import { gcmSeal, hmacSha3 } from '../../src/keys/kdf.js';
import { sealKeyArea, unlockKeyArea } from '../../src/keys/key-area.js';
import { encodeKeyTable, macInput, setMac, tableAad } from '../../src/keys/key-area-codec.js';
import { at, disk, requireContent, stopInRotation } from './header-disks.js';
import { exitCode, pqblk, pqblkJson } from './helpers.js';

// docs/keys.md, the head.
const VERSION = 8;
const NONCE = 128;
const TAG = 140;
const TABLE = 160;

const hashOf = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');

/** The same keys and slots under a later version, sealed as its writer would. */
async function later(former: Uint8Array, store: string): Promise<Uint8Array> {
  using identity = await new KeyStore(store).unlock('alice');
  const { area, table, master, vmk } = await unlockKeyArea(former, identity, {});
  const blob = sealKeyArea(master, area.head, area.slots, table);
  blob[VERSION] = 2;
  using plain = encodeKeyTable(table);
  const nonce = blob.slice(NONCE, NONCE + 12);
  const sealed = plain.use((bytes) => gcmSeal(master.wrap, nonce, tableAad(blob), bytes));
  blob.set(sealed.subarray(0, plain.length), TABLE);
  blob.set(sealed.subarray(plain.length), TAG);
  setMac(blob, hmacSha3(master.mac, macInput(blob)));
  vmk.wipe();
  return blob;
}

it('a rotation that a later version began is left as it is, and the disk opens', async () => {
  const { path, own } = await disk();
  await stopInRotation(path, own);
  const place = keyAreaOf(path);
  const blob = await later((await place.read()).blob, own[1] as string);
  for (const copy of [0, 1] as const) await place.write(copy, blob, (await place.read()).state);

  const before = hashOf(path);
  const withKey = ['--key', 'alice', ...own];
  for (const argv of [
    ['rotate-data-key', path, ...withKey],
    ['rotate-data-key', path, '--abort', ...withKey],
    ['rotate-master-key', path, ...withKey],
    ['rewrap', path, ...withKey],
    ['slot', 'add', path, 'carol', ...withKey],
    ['slot', 'revoke', path, 'bob', ...withKey],
  ]) {
    const { code, stderr } = await pqblk(...argv);
    expect([code, stderr], argv.join(' ')).toEqual([
      exitCode('newer_version'),
      expect.stringMatching(/version 2; this pqblk can read but not change it\nhint: use a newer/),
    ]);
    expect(hashOf(path), argv.join(' ')).toBe(before);
  }
  expect(await pqblkJson('slot', 'test', path, ...withKey)).toMatchObject({ path });
  await pqblkJson('export', path, at('later.raw'), ...withKey);
  await requireContent(path, own);
});
