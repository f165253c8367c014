// What the soak decides by itself, without a disk: the shapes that it draws.
import { describe, expect, it } from 'vitest';
// @ts-expect-error: JavaScript without declarations
import { shapeOf } from './episode.mjs';
// @ts-expect-error: JavaScript without declarations
import { Random } from './random.mjs';
// @ts-expect-error: JavaScript without declarations
import { describe as inWords } from './report.mjs';

const MiB = 2 ** 20;

describe('shapes', () => {
  const drawn = (how: object) =>
    Array.from({ length: 400 }, (_, seed) => shapeOf(new Random(seed), how));

  it('follow from the seed', () => {
    expect(drawn({})).toEqual(drawn({}));
  });

  it('have small caches: the steady disk always, others often', () => {
    const some = drawn({}).filter(({ format }) => format === 'sealed');
    for (const { cacheBytes } of drawn({ steady: true })) {
      expect(cacheBytes.l2CacheBytes).toBeLessThan(MiB);
      expect(cacheBytes.entryCacheBytes).toBeLessThanOrEqual(MiB);
    }
    for (const name of ['l2CacheBytes', 'entryCacheBytes', 'pendingDataBytes']) {
      const share = some.filter(({ cacheBytes }) => cacheBytes[name]).length / some.length;
      expect(share, name).toBeGreaterThan(0.5);
      expect(share, name).toBeLessThan(0.7);
    }
  });

  // 64 shards of two slices of 4 KiB are the least that the L2 cache holds.
  it('have more L2 tables than fit in the smallest cache, now and then', () => {
    const slices = ({ cluster, size }: { cluster: string; size: number }) =>
      cluster === '4K' ? size / (512 * 4096) : 0;
    for (const how of [{}, { steady: true }]) {
      const all = drawn(how).filter(({ cacheBytes }) => cacheBytes?.l2CacheBytes);
      expect(all.filter((one) => slices(one) > 128).length).toBeGreaterThan(all.length * 0.3);
    }
  });

  it('are told in words', () => {
    const cacheBytes = { l2CacheBytes: 65536, entryCacheBytes: MiB };
    const words = inWords({ format: 'sealed', queues: 2, cacheBytes });
    expect(words).toBe('sealed, 2 queues, L2 cache 64K, entry cache 1M');
  });
});
