// The batched queue: data through shared memory, tags, bounds, closing.
import { describe, expect, test } from 'vitest';
import type { Disk, DiskQueue } from '../../src/index.js';
import { openRaw, randomBuffer, randomNumbers, rawFile, scratch } from './support.js';

const MIB = 1024 * 1024;
const directory = scratch();

async function drain(queue: DiskQueue): Promise<Map<number, string | undefined>> {
  const seen = new Map<number, string | undefined>();
  while (queue.inFlight > 0) {
    await queue.wait();
    queue.reap((tag, error) => {
      expect(seen.has(tag)).toBe(false);
      seen.set(tag, error?.kind);
    });
  }
  return seen;
}

describe('batched queue', () => {
  test('moves data both ways, agreeing with the promise API', async () => {
    await using disk = await openRaw(rawFile(directory, MIB), { queues: 2 });
    const queue = disk.queue(64, { queue: 1 });
    const data = randomBuffer(64 * 4096);
    data.copy(queue.arena);
    for (let i = 0; i < 64; i++) {
      expect(queue.write(i * 4096 + 100, 4096, i * 4096, i)).toBe(true);
    }
    expect(queue.write(0, 1, 0)).toBe(false); // full
    expect(queue.submit()).toBe(64);
    expect((await drain(queue)).size).toBe(64);
    const found = Buffer.alloc(data.length);
    await disk.read(found, 100);
    expect(found.equals(data)).toBe(true);

    queue.arena.fill(0);
    for (let i = 0; i < 64; i++) queue.read(i * 4096 + 100, 4096, (63 - i) * 4096, i);
    queue.submit();
    await drain(queue);
    for (let i = 0; i < 64; i++) {
      const at = (63 - i) * 4096;
      const expected = data.subarray(i * 4096, i * 4096 + 4096);
      expect(queue.arena.subarray(at, at + 4096).equals(expected)).toBe(true);
    }
    // The promise API began with queue 0.
    expect(disk.stats().queues[1]).toMatchObject({ writes: 64, reads: 64 });
  });

  test('errors come back under the tag of their request', async () => {
    await using disk = await openRaw(rawFile(directory, MIB));
    const queue = disk.queue(8);
    queue.read(0, 512, 0, 10);
    queue.read(MIB, 512, 512, 11);
    queue.discard(MIB - 1, 5, 12);
    queue.flush(13);
    queue.writeZeroes(0, 4096, 14, true);
    queue.submit();
    expect([...(await drain(queue))].sort()).toEqual([
      [10, undefined],
      [11, 'out_of_range'],
      [12, 'out_of_range'],
      [13, undefined],
      [14, undefined],
    ]);
  });

  test('bad arguments are refused before anything is submitted', async () => {
    await using disk = await openRaw(rawFile(directory, MIB));
    const queue = disk.queue(4, { arenaBytes: 8192 });
    expect(queue.arena.length).toBe(8192);
    expect(() => queue.read(0, 4096, 4097)).toThrow(/arena/);
    expect(() => queue.read(-1, 1, 0)).toThrow(/integers/);
    expect(() => queue.write(Number.NaN, 1, 0)).toThrow(/integers/);
    expect(queue.inFlight).toBe(0);
    expect(queue.submit()).toBe(0);
    await queue.wait(); // nothing in flight
    expect(() => disk.queue(-1)).toThrow();
    expect(() => disk.queue(1e9)).toThrow();
    expect(() => disk.queue(4, { queue: 7 })).toThrow(TypeError);
  });

  test('offsets beyond 4 GiB are whole', async () => {
    const size = 2 ** 41;
    await using disk = await openRaw(rawFile(directory, size), {});
    const queue = disk.queue(4);
    queue.arena.write('far away');
    queue.write(size - 8, 8, 0);
    queue.submit();
    await drain(queue);
    const found = Buffer.alloc(8);
    await disk.read(found, size - 8);
    expect(found.toString()).toBe('far away');
  });

  test('a long run with callbacks keeps every completion', async () => {
    await using disk = await openRaw(rawFile(directory, MIB));
    const total = 50_000;
    const queue = disk.queue(32);
    const random = randomNumbers(99);
    const free = Array.from({ length: queue.depth }, (_, i) => i);
    let issued = 0;
    let completed = 0;
    await new Promise<void>((resolve, reject) => {
      const fill = () => {
        while (free.length > 0 && issued < total) {
          const slot = free.pop() as number;
          queue.read(random(256) * 4096, 4096, slot * 4096, slot);
          issued += 1;
        }
        queue.submit();
      };
      queue.onCompletions = () => {
        queue.reap((slot, error) => {
          if (error) reject(error);
          free.push(slot);
          completed += 1;
        });
        if (completed === total) resolve();
        else fill();
      };
      fill();
    });
    expect(disk.stats().queues[0]?.reads).toBe(total);
  });

  test('closing the disk completes what is in flight and refuses more', async () => {
    const disk: Disk = await openRaw(rawFile(directory, MIB));
    const queue = disk.queue(64);
    for (let i = 0; i < 64; i++) queue.write(i * 4096, 4096, i * 4096, i);
    queue.submit();
    await disk.close();
    expect([...(await drain(queue)).values()].every((kind) => kind === undefined)).toBe(true);
    queue.read(0, 512, 0);
    expect(() => queue.submit()).toThrow(/closed/);
    expect(() => disk.queue(4)).toThrow(/closed/);
  });
});
