// Rotation of the data key: killed at every step, under load, over the control socket. The oracles are
// a copy of what was written and the second reader, which knows the format from its description only.
import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { copyFileSync, mkdirSync, openSync, readFileSync, readSync, writeSync } from 'node:fs';
import type { Socket } from 'node:net';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { findControl } from '../../src/disk/control-place.js';
import {
  ControlClient,
  changeKeyArea,
  checkDisk,
  createDisk,
  type Disk,
  describeKeyArea,
  formatUuid,
  type Identity,
  type KeyAreaEditor,
  KeyStore,
  keyAreaOf,
  openDisk,
  ROTATION_STEPS,
  type RotateDataKeyOptions,
  rotateDataKey,
  Secret,
  serveControl,
} from '../../src/index.js';
import { Pins, takeLock } from '../../src/keys/index.js';
import { openWithPrivateKey } from '../reader/reader.js';
import { DIST, expectKind, randomBuffer, randomNumbers, scratch } from './support.js';

const ROTATE = fileURLToPath(new URL('./child/rotate.mjs', import.meta.url));
const MAIN = join(dirname(DIST), 'cli', 'main.cjs');
const MiB = 2 ** 20;
const SIZE = 12 * MiB;
const dir = scratch();
const at = (name: string) => join(dir, name);
let store: KeyStore;
let alice: Identity;
const template = at('template.sealed');
/** What the template holds: whole clusters, single sectors, and parts never written. */
const content = Buffer.alloc(SIZE);

beforeAll(async () => {
  store = new KeyStore(at('keys'));
  await store.generate('alice', { noPassphrase: true });
  alice = await store.unlock('alice');
  const recipients = [await store.recipient('alice')];
  await createDisk(template, { format: 'sealed', size: SIZE, recipients });
  await using disk = await open(template);
  const random = randomNumbers(7);
  const write = async (offset: number, bytes: number) => {
    const data = randomBuffer(bytes);
    data.copy(content, offset);
    await disk.write(data, offset);
  };
  await write(0, 5 * MiB);
  for (let i = 0; i < 60; i++) await write(6 * MiB + random(1200) * 4096, 4096);
});
afterAll(() => alice[Symbol.dispose]());

const open = (path: string) => openDisk(path, { format: 'sealed', identity: alice });

function privateKey(): Uint8Array {
  const file = JSON.parse(readFileSync(at('keys/alice.key'), 'utf8'));
  return Buffer.from(file.private.decapsulationKey, 'base64');
}

function fresh(name: string): string {
  const path = at(name);
  copyFileSync(template, path);
  return path;
}

async function contentOf(disk: Disk): Promise<Buffer> {
  const all = Buffer.alloc(SIZE);
  await disk.read(all, 0);
  return all;
}

/** The epochs that sectors are of, by the second reader, which opens every one of them. */
function epochsIn(path: string): number[] {
  const epochs = new Set<number>();
  const key = privateKey();
  const image = openWithPrivateKey(path, key, { aead: 'fast' });
  try {
    for (const view of image.walk()) {
      expect(view.state, view.reason).not.toBe('damaged');
      if (view.state === 'data') epochs.add(view.epoch as number);
    }
    for (const { epoch } of image.sessions.sessions.values()) epochs.add(epoch);
  } finally {
    image.close();
  }
  return [...epochs].sort();
}

describe('a rotation of the data key', () => {
  it('leaves nothing of the old epoch, and the old key area opens nothing', async () => {
    const path = fresh('plain.sealed');
    {
      await using disk = await open(path);
      const done = await rotateDataKey(disk, { identity: alice, pins: store.pins });
      expect(done).toMatchObject({ changed: true, fromEpoch: 1, toEpoch: 2, resumed: false });
      expect(done.sectors).toBeGreaterThanOrEqual((5 * MiB) / 4096);
      expect((await contentOf(disk)).equals(content)).toBe(true);
    }
    expect(epochsIn(path)).toEqual([2]);
    expect(await checkDisk(path, { format: 'sealed', identity: alice })).toMatchObject({
      clean: true,
    });
    // Whoever kept the old key area and puts it back has the old data key: of nothing.
    copyRanges(template, path, placesOf(path));
    await expectKind(open(path), 'data_key_missing');
  });

  it('does nothing when the epoch is not the one that was named, and nothing in a dry run', async () => {
    const path = fresh('named.sealed');
    await using disk = await open(path);
    await expectKind(rotateDataKey(disk, { identity: alice, fromEpoch: 5 }), 'invalid_argument');
    const plan = await rotateDataKey(disk, { identity: alice, dryRun: true });
    expect(plan).toMatchObject({ changed: true, dryRun: true, fromEpoch: 1, toEpoch: 2 });
    await expectKind(rotateDataKey(disk, { identity: alice, abort: true }), 'not_found');
    expect(await epochsAfterClose(disk, path)).toEqual([1]);
  });

  it('stops on request, goes on, and can go back', async () => {
    const path = fresh('stopped.sealed');
    await using disk = await open(path);
    const stop = new AbortController();
    const stopped = rotateDataKey(disk, {
      identity: alice,
      bytesPerSecond: 16 * MiB,
      signal: stop.signal,
      onProgress: (done) => done > MiB && stop.abort(),
    });
    expect(await expectKind(stopped, 'interrupted')).toMatchObject({
      hint: expect.stringContaining('--abort'),
    });
    expect((await contentOf(disk)).equals(content)).toBe(true);
    const back = await rotateDataKey(disk, { identity: alice, abort: true });
    expect(back).toMatchObject({ aborted: true, toEpoch: 1, resumed: true });
    expect(back.sectors).toBeGreaterThan(0);
    expect((await contentOf(disk)).equals(content)).toBe(true);
    expect(await epochsAfterClose(disk, path)).toEqual([1]);
  });

  it('is given up from the epoch that was named, and from no other', async () => {
    const path = fresh('meant.sealed');
    await using disk = await open(path);
    await rotateDataKey(disk, { identity: alice });
    const abort = async (fromEpoch: number) =>
      await rotateDataKey(disk, { identity: alice, abort: true, fromEpoch });
    await expectKind(abort(1), 'not_found');
    await stopAtOnce(disk);
    const { state } = await disk.keyArea.read();
    const { message } = await expectKind(abort(1), 'not_found'); // it has ended; the one from 2 is another's
    expect(message).toMatch('from epoch 1 is under way; the disk is of epoch 2');
    await expectKind(abort(3), 'invalid_argument');
    await expectKind(abort(0), 'invalid_argument');
    expect((await disk.keyArea.read()).state).toEqual(state);
    expect(await abort(2)).toMatchObject({ aborted: true, fromEpoch: 3, toEpoch: 2 });
    await expectKind(abort(2), 'not_found');
    expect((await contentOf(disk)).equals(content)).toBe(true);
    expect(await epochsAfterClose(disk, path)).toEqual([2]);
  });

  /** Begins a rotation and writes little of it. */
  async function stopAtOnce(disk: Disk): Promise<void> {
    const stop = new AbortController();
    const signal = stop.signal;
    const onProgress = () => stop.abort();
    const how = { identity: alice, bytesPerSecond: 16 * MiB, signal, onProgress };
    await expectKind(rotateDataKey(disk, how), 'interrupted');
  }

  it.each([...ROTATION_STEPS, 'rewriting'])(
    'killed when %s: the disk opens with its content, and running it again completes it',
    async (step) => {
      const path = fresh(`${step}.sealed`);
      const child = spawnSync(process.execPath, [ROTATE, DIST, path, at('keys'), step], {
        encoding: 'utf8',
        timeout: 120_000,
      });
      expect({ signal: child.signal, stderr: child.stderr }).toEqual({
        signal: 'SIGKILL',
        stderr: '',
      });
      await using disk = await open(path);
      expect((await contentOf(disk)).equals(content)).toBe(true);
      const again = await rotateDataKey(disk, { identity: alice, fromEpoch: 1 });
      const completed = step === 'forgotten';
      expect(again).toMatchObject({ changed: !completed, resumed: !completed, toEpoch: 2 });
      expect((await contentOf(disk)).equals(content)).toBe(true);
      expect(await epochsAfterClose(disk, path)).toEqual([2]);
    },
  );
});

it('writes nothing under a key that one copy of the key area alone holds', async () => {
  const path = fresh('half.sealed');
  const data = randomBuffer(MiB);
  {
    await using disk = await open(path);
    let writes = 0;
    const place = disk.keyArea;
    const killed = {
      keyArea: {
        ...place,
        write: async (...change: Parameters<typeof place.write>) => {
          writes += 1;
          if (writes === 2) throw new Error('killed between the copies');
          await place.write(...change);
        },
      },
      beginEpoch: () => Promise.reject(new Error('never')),
      rekey: () => Promise.reject(new Error('never')),
      finishEpoch: () => Promise.reject(new Error('never')),
    };
    await expect(rotateDataKey(killed, { identity: alice })).rejects.toThrow('between the copies');
  }
  {
    await using disk = await open(path);
    await disk.write(data, MiB);
  }
  const lost = at('lost.sealed');
  copyFileSync(path, lost);
  copyRanges(template, lost, placesOf(lost)); // the copy that had the next key is gone
  for (const one of [lost, path]) {
    await using disk = await open(one);
    const holds = await contentOf(disk);
    expect(holds.subarray(MiB, 2 * MiB).equals(data)).toBe(true);
  }
  await using disk = await open(path);
  expect(await rotateDataKey(disk, { identity: alice })).toMatchObject({ resumed: true });
  expect((await contentOf(disk)).subarray(MiB, 2 * MiB).equals(data)).toBe(true);
  expect(await epochsAfterClose(disk, path)).toEqual([2]);
});

describe('keys that were read before the lock of the disk was held', () => {
  /** A process with pins of its own gives the rotation up, at the latest moment at which the lock is free. */
  function givingUp(path: string) {
    let unlocks = 0;
    const others = `${path}.keys`;
    mkdirSync(others, { mode: 0o700 });
    copyFileSync(at('keys/alice.key'), join(others, 'alice.key'));
    return {
      unlocks: () => unlocks,
      onSlot: () => {
        unlocks += 1;
        if (unlocks > 1) return;
        const abort = ['rotate-data-key', path, '--abort', '--key', 'alice', '--store', others];
        const { status, stderr } = spawnSync(process.execPath, [MAIN, ...abort], {
          encoding: 'utf8',
        });
        expect({ status, stderr }).toMatchObject({ status: 0 });
      },
    };
  }

  it('are read anew when one of them was given up: nothing is written under it', async () => {
    const path = begunRotation('withdrawn.sealed');
    const race = givingUp(path);
    {
      await using disk = await openDisk(path, {
        format: 'sealed',
        identity: alice,
        onSlot: race.onSlot,
      });
      await disk.write(content.subarray(0, MiB), 0);
    }
    await using disk = await open(path);
    expect((await contentOf(disk)).equals(content)).toBe(true);
    expect(await epochsAfterClose(disk, path)).toEqual([1]);
    expect(race.unlocks()).toBe(2);
  });

  it('nor does a check use them', async () => {
    const path = begunRotation('checked.sealed');
    const race = givingUp(path);
    const checked = await checkDisk(path, {
      format: 'sealed',
      identity: alice,
      repair: true,
      onSlot: race.onSlot,
    });
    expect(checked).toMatchObject({ clean: true });
    expect(race.unlocks()).toBe(2);
  });

  /** A disk whose rotation was killed when the next epoch had begun. */
  function begunRotation(name: string): string {
    const path = fresh(name);
    const { signal } = spawnSync(process.execPath, [ROTATE, DIST, path, at('keys'), 'begun']);
    expect(signal).toBe('SIGKILL');
    return path;
  }
});

describe('the control socket of a serving process', () => {
  it('rotates under guests that write', async () => {
    const path = fresh('served.sealed');
    const holds = Buffer.from(content);
    await using disk = await open(path);
    const control = await serveControl(disk);
    const random = randomNumbers(11);
    const guest = { stop: false, writes: 0 };
    const work = (async () => {
      while (!guest.stop) {
        const offset = random(SIZE / 4096 - 4) * 4096;
        const data = randomBuffer(4096 * (1 + random(4)));
        await disk.write(data, offset);
        data.copy(holds, offset);
        guest.writes += 1;
      }
    })();
    {
      using client = (await ControlClient.open(path)) as ControlClient;
      const progress: number[] = [];
      const done = await rotateDataKey(client, {
        identity: alice,
        share: 0.5,
        onProgress: (at_) => progress.push(at_),
      });
      expect(done).toMatchObject({ changed: true, toEpoch: 2 });
      expect(progress.at(-1)).toBe(SIZE);
    }
    guest.stop = true;
    await work;
    expect(guest.writes).toBeGreaterThan(10);
    await control.close();
    expect(await ControlClient.open(path)).toBeUndefined();
    expect((await contentOf(disk)).equals(holds)).toBe(true);
    expect(await epochsAfterClose(disk, path)).toEqual([2]);
  });

  it('stops a pass when its asker has gone, and a second process never writes', async () => {
    const path = fresh('gone.sealed');
    await using disk = await open(path);
    const control = await serveControl(disk);
    const client = (await ControlClient.open(path)) as ControlClient;
    const rotation = rotateDataKey(client, {
      identity: alice,
      bytesPerSecond: 2 * MiB,
      onProgress: () => client.close(),
    });
    await expectKind(rotation, 'closed');
    const { keyArea } = disk;
    const { state, blob } = await keyArea.read();
    state[40] = (state[40] ?? 0) ^ 1;
    await expectKind(keyArea.write(0, blob, state), 'locked');
    using again = (await ControlClient.open(path)) as ControlClient;
    expect(await rotateDataKey(again, { identity: alice })).toMatchObject({ resumed: true });
    await control.close();
    expect(await epochsAfterClose(disk, path)).toEqual([2]);
  });

  it('has one driver: who would go back while another ends his rotation is refused', async () => {
    const path = fresh('drivers.sealed');
    await using disk = await open(path);
    const control = await serveControl(disk);
    using forward = (await ControlClient.open(path)) as ControlClient;
    using backward = (await ControlClient.open(path)) as ControlClient;
    let refused: unknown;
    const done = await rotateDataKey(forward, {
      identity: alice,
      onStep: async (step) => {
        if (step !== 'finished') return;
        refused = await expectKind(
          rotateDataKey(backward, { identity: alice, abort: true }),
          'locked',
        );
      },
    });
    expect(refused).toBeDefined();
    expect(done).toMatchObject({ changed: true, toEpoch: 2 });
    await control.close();
    expect(await epochsAfterClose(disk, path)).toEqual([2]);
    await using again = await open(path);
    expect((await contentOf(again)).equals(content)).toBe(true);
  });

  it('begins its epoch while another change of keys waits, and both come about', async () => {
    const path = fresh('waits.sealed');
    const pins = new Pins(at('pins-waits'));
    const keyArea = keyAreaOf(path);
    await using disk = await open(path);
    const control = await serveControl(disk, { pins });
    using client = (await ControlClient.open(path)) as ControlClient;
    using other = (await ControlClient.open(path)) as ControlClient;
    const bob = await store.generate('bob', { noPassphrase: true });
    const recipient = await store.recipient('bob');
    let adding: Promise<unknown> | undefined;
    const { beginEpoch } = client;
    client.beginEpoch = async (...begin) => {
      const { volumeUuid } = await keyArea.read();
      const lock = join(at('pins-waits'), formatUuid(volumeUuid));
      await expectKind(takeLock(lock, 'test'), 'locked');
      const edit = (editor: KeyAreaEditor) => void editor.add(recipient);
      const change = { operation: 'slot-add', identity: alice, pins, edit } as const;
      adding = changeKeyArea({ ...change, place: other.keyArea });
      return await beginEpoch.apply(client, begin);
    };
    const done = await rotateDataKey(client, { identity: alice, pins });
    expect(done).toMatchObject({ changed: true, toEpoch: 2 });
    expect(await adding).toMatchObject({ changed: true });
    const { slots } = describeKeyArea((await keyArea.read()).blob);
    expect(slots.map(({ fingerprint }) => fingerprint)).toContain(bob.fingerprint);
    await control.close();
    expect(await epochsAfterClose(disk, path)).toEqual([2]);
  });

  it('begins no epoch that the key area has lost since the asker read it', async () => {
    const path = fresh('late.sealed');
    await using disk = await open(path);
    const control = await serveControl(disk);
    const client = async () => (await ControlClient.open(path)) as ControlClient;
    const starter = await client();
    const first = rotateDataKey(starter, {
      identity: alice,
      onStep: async (step) => {
        if (step === 'begun') throw new Error('stop here');
      },
    });
    await expect(first).rejects.toThrow('stop here');
    starter.close();
    using late = await client();
    const back = rotateDataKey(late, {
      identity: alice,
      abort: true,
      onStep: async (step) => {
        if (step !== 'prepared') return;
        using other = await client();
        expect(await rotateDataKey(other, { identity: alice })).toMatchObject({ toEpoch: 2 });
      },
    });
    await expectKind(back, 'locked');
    using key = Secret.random(32);
    const { state } = await late.keyArea.read();
    await expectKind(late.beginEpoch(1, key, state), 'locked'); // whatever the asker has checked
    await control.close();
    expect((await contentOf(disk)).equals(content)).toBe(true);
    expect(await epochsAfterClose(disk, path)).toEqual([2]);
  });

  it('begins no epoch under a key that was given up, though another one has its number', async () => {
    const path = fresh('suspended.sealed');
    await using disk = await open(path);
    const control = await serveControl(disk);
    const rotate = async (more: Partial<RotateDataKeyOptions>) => {
      using client = (await ControlClient.open(path)) as ControlClient;
      return await rotateDataKey(client, { identity: alice, ...more });
    };
    using suspended = (await ControlClient.open(path)) as ControlClient;
    // It has read its key; meanwhile that is given up, and another rotation begun, and killed.
    const { beginEpoch } = suspended;
    suspended.beginEpoch = async (...begin) => {
      expect(await rotate({ abort: true })).toMatchObject({ aborted: true, toEpoch: 1 });
      const onStep = () => Promise.reject(new Error('killed when prepared'));
      await expect(rotate({ onStep })).rejects.toThrow('killed when prepared');
      return await beginEpoch.apply(suspended, begin);
    };
    await expectKind(rotateDataKey(suspended, { identity: alice }), 'locked');
    suspended.close();
    await disk.write(content.subarray(0, MiB), 0);
    expect(await rotate({})).toMatchObject({ resumed: true, toEpoch: 2 });
    await control.close();
    expect(await epochsAfterClose(disk, path)).toEqual([2]);
    await using again = await open(path);
    expect((await contentOf(again)).equals(content)).toBe(true);
  });

  it('survives whatever it is sent', async () => {
    const path = fresh('hostile.sealed');
    await using disk = await open(path);
    const control = await serveControl(disk);
    const frame = (json: string, binary = 0) => {
      const head = Buffer.alloc(8);
      head.writeUInt32LE(json.length, 0);
      head.writeUInt32LE(binary, 4);
      return Buffer.concat([head, Buffer.from(json), Buffer.alloc(binary)]);
    };
    const garbage = [
      randomBuffer(4096),
      frame('no json'),
      frame('[1,2]'),
      frame('null'),
      Buffer.from('ffffffffffffffff', 'hex'),
    ];
    for (const bytes of garbage) {
      const socket = await connected(path);
      socket.on('error', () => {});
      socket.write(bytes);
      socket.end();
      await once(socket, 'close');
    }
    const wrong = [
      '{"id":1}',
      '{"id":2,"op":"begin-epoch","epoch":-1}',
      '{"id":3,"op":"begin-epoch","epoch":7}',
      '{"id":4,"op":"finish-epoch"}',
      '{"id":5,"op":"replace-key-area","generation":1}',
      '{"id":6,"op":"rekey","share":7}',
    ];
    for (const json of wrong) {
      const socket = await connected(path);
      socket.write(frame(json));
      const [answer] = (await once(socket, 'data')) as [Buffer];
      expect(answer.toString('utf8', 8)).toContain('"error":{"kind":"');
      socket.destroy();
    }
    using client = (await ControlClient.open(path)) as ControlClient;
    expect(await rotateDataKey(client, { identity: alice })).toMatchObject({ changed: true });
    await control.close();
    expect((await contentOf(disk)).equals(content)).toBe(true);
  });
});

async function connected(path: string): Promise<Socket> {
  const { socket } = await findControl(path);
  if (!socket) throw new Error(`nobody serves ${path}`);
  return socket;
}

async function epochsAfterClose(disk: Disk, path: string): Promise<number[]> {
  await disk.close();
  return epochsIn(path);
}

/** Where the two copies of the key area lie: in the header extension (docs/format.md section 2). */
function placesOf(path: string): readonly { offset: number; length: number }[] {
  const key = privateKey();
  const image = openWithPrivateKey(path, key);
  try {
    return image.header.keyAreas;
  } finally {
    image.close();
  }
}

function copyRanges(
  from: string,
  to: string,
  ranges: readonly { offset: number; length: number }[],
): void {
  const [source, target] = [openSync(from, 'r'), openSync(to, 'r+')];
  for (const { offset, length } of ranges) {
    const bytes = Buffer.alloc(length);
    readSync(source, bytes, 0, length, offset);
    writeSync(target, bytes, 0, length, offset);
  }
}
