// The loads of the set `node`: what they count is what the disk's queue counted, percentiles are those
// of the sorted list, and a failing read ends them.
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
// @ts-expect-error: JavaScript without declarations
import { batched, calledBack, drawer, promised } from '../../bench/lib/node-loads.mjs';
// @ts-expect-error: JavaScript without declarations
import { Percentiles } from '../../bench/lib/percentiles.mjs';
import { createDisk, type Disk, openDisk } from '../../src/index.js';
import { randomNumbers, scratch } from '../node/support.js';

const KiB = 1024;
const SIZE = 256 * KiB;
const BYTES = 4 * KiB;
const DEPTH = 4;
const how = { bytes: BYTES, size: SIZE, seconds: 0.05 };
const buffers = Array.from({ length: DEPTH }, () => Buffer.alloc(BYTES));
const dir = scratch();
let disk: Disk;

beforeAll(async () => {
  const path = join(dir, 'disk.raw');
  await createDisk(path, { format: 'raw', size: SIZE });
  disk = await openDisk(path, { format: 'raw' });
});
afterAll(() => disk.close());

const reads = () => disk.stats().queues[0]?.reads ?? 0;

type Load = (how: object) => Promise<{ ops: number; iops: number; p50: number; max: number }>;
const loads: Record<string, Load> = {
  promised: (spec) => promised((b: Buffer, at: number) => disk.read(b, at), { buffers, ...spec }),
  calledBack: (spec) =>
    calledBack(
      (b: Buffer, at: number, done: (error?: unknown) => void) =>
        void disk.read(b, at).then(() => done(), done),
      { buffers, ...spec },
    ),
  batched: (spec) => batched(disk.queue(DEPTH), spec),
};

describe.each(Object.entries(loads))('%s', (_, load) => {
  it('counts what the queue counts', async () => {
    const before = reads();
    const { ops, iops, p50, max } = await load(how);
    const counted = reads() - before;
    expect(ops).toBeGreaterThan(0);
    expect(counted - ops).toBeGreaterThanOrEqual(0);
    expect(counted - ops).toBeLessThan(DEPTH);
    expect(iops).toBeLessThanOrEqual(ops / how.seconds);
    expect(p50).toBeGreaterThan(0);
    expect(max).toBeGreaterThanOrEqual(p50);
  });

  it('ends when a read fails', async () => {
    await expect(load({ ...how, size: 2 ** 40 })).rejects.toMatchObject({ kind: 'out_of_range' });
  });
});

it('every place is drawn, none beyond, and again the same', () => {
  const [draw, again] = [drawer(16, 3), drawer(16, 3)];
  const drawn = Array.from({ length: 1000 }, () => draw());
  expect(new Set(drawn)).toEqual(new Set(Array.from({ length: 16 }, (_, i) => i)));
  expect(Array.from({ length: 1000 }, () => again())).toEqual(drawn);
});

it('percentiles are at most 3 percent above those of the sorted list', () => {
  const below = randomNumbers(11);
  const percentiles = new Percentiles();
  const values = Array.from({ length: 20_000 }, () => (1 + below(1000)) * 10 ** below(5) * 0.01);
  for (const value of values) percentiles.add(value);
  values.sort((a, b) => a - b);
  for (const share of [0.001, 0.5, 0.9, 0.99, 0.999, 1]) {
    const exact = values[Math.ceil(share * values.length) - 1] as number;
    expect(percentiles.at(share)).toBeGreaterThanOrEqual(exact * (1 - 1e-9));
    expect(percentiles.at(share)).toBeLessThanOrEqual(exact * 1.03);
  }
  expect(percentiles.summary()).toMatchObject({ max: values.at(-1), p99_9: percentiles.at(0.999) });
});
