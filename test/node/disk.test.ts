// The promise API of a disk: data, errors with codes, closing.
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { createDisk, openDisk } from '../../src/index.js';
import { expectKind, openRaw, randomBuffer, randomNumbers, rawFile, scratch } from './support.js';

const KIB = 1024;
const MIB = 1024 * KIB;
const directory = scratch();

describe('data', () => {
  test('reads and writes of any alignment agree with a flat buffer', async () => {
    const size = 4 * MIB + 512;
    await using disk = await openRaw(rawFile(directory, size), { queues: 2 });
    const model = Buffer.alloc(size);
    const random = randomNumbers(4711);
    for (let round = 0; round < 60; round++) {
      const writes: Promise<void>[] = [];
      for (let at = random(size / 2); at < size && writes.length < 40; ) {
        const length = Math.min(1 + random(random(10) === 0 ? MIB : 6000), size - at);
        const data = randomBuffer(length);
        if (random(3) === 0) {
          const cut = random(length + 1);
          writes.push(disk.writev([data.subarray(0, cut), data.subarray(cut)], at));
        } else {
          writes.push(disk.write(data, at, { fua: random(10) === 0 }));
        }
        data.copy(model, at);
        at += length + random(300);
      }
      await Promise.all(writes);
      const from = random(size);
      const some = Buffer.alloc(1 + random(size - from));
      const cut = random(some.length + 1);
      await disk.readv([some.subarray(0, cut), some.subarray(cut)], from);
      expect(some.equals(model.subarray(from, from + some.length))).toBe(true);
    }
    const all = Buffer.alloc(size);
    await disk.read(all, 0);
    expect(all.equals(model)).toBe(true);
    await disk.flush();
  });

  test('zeroes and discards read as zeros, neighbours stay', async () => {
    await using disk = await openRaw(rawFile(directory, MIB));
    await disk.write(Buffer.alloc(MIB, 0xaa), 0);
    await disk.writeZeroes(1000, 5000);
    await disk.writeZeroes(100 * KIB, 64 * KIB, { unmap: true, fua: true });
    await disk.discard(512 * KIB, 128 * KIB);
    const expected = Buffer.alloc(MIB, 0xaa);
    expected.fill(0, 1000, 6000);
    expected.fill(0, 100 * KIB, 164 * KIB);
    expected.fill(0, 512 * KIB, 640 * KIB);
    const found = Buffer.alloc(MIB);
    await disk.read(found, 0);
    expect(found.equals(expected)).toBe(true);
  });

  test('more requests than slots wait for their turn', async () => {
    await using disk = await openRaw(rawFile(directory, MIB));
    const data = Array.from({ length: 2000 }, (_, i) => Buffer.alloc(512, i % 251));
    await Promise.all(data.map((buffer, i) => disk.write(buffer, i * 512)));
    const found = data.map(() => Buffer.alloc(512));
    await Promise.all(found.map((buffer, i) => disk.read(buffer, i * 512)));
    expect(found.every((buffer, i) => buffer.equals(data[i] as Buffer))).toBe(true);
    expect(disk.stats().queues[0]).toMatchObject({ reads: 2000, writes: 2000, errors: 0 });
  });

  test('extents tell holes from data, joined and without gaps', async () => {
    await using disk = await openRaw(rawFile(directory, 8 * MIB));
    await disk.write(Buffer.alloc(3 * MIB, 1), 2 * MIB);
    await disk.flush();
    const extents = [];
    for await (const extent of disk.extents()) extents.push(extent);
    expect(extents).toEqual([
      { offset: 0, length: 2 * MIB, kind: 'hole' },
      { offset: 2 * MIB, length: 3 * MIB, kind: 'data' },
      { offset: 5 * MIB, length: 3 * MIB, kind: 'hole' },
    ]);
  });

  test('a disk grows while it is read', async () => {
    await using disk = await openRaw(rawFile(directory, MIB));
    const reads = Array.from({ length: 100 }, () => disk.read(Buffer.alloc(4096), 0));
    await disk.resize(3 * MIB);
    await Promise.all(reads);
    expect(disk.size).toBe(3 * MIB);
    expect(disk.facts.size).toBe(3 * MIB);
    await disk.write(Buffer.from('end'), 3 * MIB - 3);
    await expectKind(disk.resize(MIB), 'invalid_argument');
  });

  test('places a power of two apart share the whole L2 cache', async () => {
    const path = join(directory, 'wide.qcow2');
    await createDisk(path, { format: 'qcow2', size: 2 ** 40 });
    await using disk = await openDisk(path, { format: 'qcow2' });
    const stride = 2 ** 31; // 512 places, each in an L2 slice of its own: 2 of the cache's 32 MiB
    await disk.bench({ rw: 'write', stride });
    await disk.bench({ rw: 'read', stride });
    const { l2Misses } = disk.stats().backend;
    expect((await disk.bench({ rw: 'read', stride })).read.ops).toBe(512);
    expect(disk.stats().backend.l2Misses).toBe(l2Misses);
  });

  test('the bench reports what it did and can be stopped', async () => {
    await using disk = await openRaw(rawFile(directory, MIB));
    const result = await disk.bench({ rw: 'randread', iodepth: 4 });
    expect(result.read.ops).toBe(256);
    expect(result.read.latencyMicroseconds.p50).toBeGreaterThan(0);
    const stop = new AbortController();
    const long = disk.bench({ rw: 'read', runtimeMs: 60_000 }, { signal: stop.signal });
    setTimeout(() => stop.abort(), 50);
    await expectKind(long, 'canceled');
    // Closing a disk ends its bench too.
    const other = disk.bench({ rw: 'read', runtimeMs: 60_000 });
    const failed = expectKind(other, 'closed');
    await disk.close();
    await failed;
  });
});

describe('errors', () => {
  test('each has a kind and a code of its own', async () => {
    const path = rawFile(directory, MIB);
    await using disk = await openRaw(path);
    const buffer = Buffer.alloc(4096);
    expect((await expectKind(disk.read(buffer, MIB - 1), 'out_of_range')).code).toBe(
      'PQBLK_OUT_OF_RANGE',
    );
    await expectKind(disk.write(buffer, MIB), 'out_of_range');
    await expectKind(disk.discard(MIB, 1), 'out_of_range');
    await expectKind(disk.read(buffer, -1), 'invalid_argument');
    await expectKind(disk.read(buffer, 0.5), 'invalid_argument');
    await expectKind(disk.read(buffer, Number.NaN), 'invalid_argument');
    const swapped = disk.write(0 as unknown as Uint8Array, buffer.fill(7) as unknown as number);
    await expect(swapped).rejects.toThrow(/not a value of type object$/);
    // @ts-expect-error: what a caller without types might do
    await expect(disk.read('text', 0)).rejects.toBeInstanceOf(TypeError);
    // @ts-expect-error
    await expect(disk.readv([buffer, 5], 0)).rejects.toBeInstanceOf(TypeError);
    await disk.read(buffer, 0);
    const locked = await expectKind(openRaw(path), 'locked');
    expect(locked.message).toContain(String(process.pid));
    await expectKind(openRaw(`${path}.none`), 'not_found');
    await expectKind(openRaw(directory), 'invalid_argument');
    await expectKind(openRaw(rawFile(directory, 512), { queues: 65 }), 'invalid_argument');
  });

  test('a read-only disk can be shared and is not written', async () => {
    const path = rawFile(directory, MIB);
    await using one = await openRaw(path, { readOnly: true });
    await using two = await openRaw(path, { readOnly: true });
    await expectKind(one.write(Buffer.alloc(512), 0), 'read_only');
    await expectKind(two.writeZeroes(0, 512), 'read_only');
    await one.flush();
    await expectKind(one.resize(2 * MIB), 'read_only');
  });

  test('handles are made by openDisk only', async () => {
    const { native } = await import('../../src/native.js');
    const handle = await native().openDisk({ path: rawFile(directory, 512), format: 'raw' });
    const Handle = handle.constructor as new () => unknown;
    expect(() => new Handle()).toThrow(TypeError);
    // A method on a foreign object must not reach native memory.
    const token = new (native().JobToken)();
    expect(() => handle.close.call(token as never)).toThrow(TypeError);
    expect(() => handle.facts.call({} as never)).toThrow(TypeError);
    const channel = handle.channel({ queue: 0, slots: 4, arenaBytes: 0 }, () => {});
    expect(() => channel.add(4, 0, 0, 0, Buffer.alloc(1))).toThrow(TypeError);
    channel.add(1, 0, 0, 0, Buffer.alloc(512));
    expect(() => channel.add(1, 0, 0, 0, Buffer.alloc(1))).toThrow(/in use/);
    await handle.close();
    expect(() => native().openDisk({ path: 5, format: 'raw' })).toThrow(TypeError);
    expect(() => native().openDisk({ path: 'x', format: 'vmdk' })).toThrow(TypeError);
  });
});

describe('closing', () => {
  test('waits for what is in flight, refuses what comes later, and can be repeated', async () => {
    const path = rawFile(directory, 16 * MIB);
    const disk = await openRaw(path);
    const buffers = Array.from({ length: 400 }, (_, i) => Buffer.alloc(32 * KIB, i % 256));
    const settled = Promise.allSettled(buffers.map((b, i) => disk.write(b, i * 32 * KIB)));
    const closing = disk.close();
    expect(disk.closed).toBe(true);
    await expectKind(disk.read(Buffer.alloc(1), 0), 'closed');
    await expectKind(disk.flush(), 'closed');
    await expectKind(disk.resize(MIB), 'closed');
    expect(() => disk.stats()).toThrow(/closed/);
    await closing;
    await disk.close();
    const results = await settled;
    const written = results.filter((r) => r.status === 'fulfilled').length;
    expect(written).toBeGreaterThanOrEqual(256); // those that had a slot
    for (const r of results) {
      if (r.status === 'rejected') expect(r.reason).toMatchObject({ kind: 'closed' });
    }
    await using again = await openRaw(path);
    const found = Buffer.alloc(32 * KIB);
    await again.read(found, 0);
    expect(found.equals(buffers[0] as Buffer)).toBe(true);
  });

  test('a disk that was forgotten is closed once it is collected', async () => {
    const { setFlagsFromString } = await import('node:v8');
    setFlagsFromString('--expose-gc');
    const gc = (await import('node:vm')).runInNewContext('gc') as () => void;
    const path = rawFile(directory, MIB);
    await (async () => {
      const disk = await openRaw(path);
      await disk.read(Buffer.alloc(512), 0);
    })();
    for (let i = 0; i < 3000; i++) {
      gc();
      await new Promise((resolve) => setTimeout(resolve, 20));
      const again = await openRaw(path).catch(() => undefined);
      if (again) return await again.close();
    }
    expect.fail('the lock of a collected disk was never given back');
  });
});
