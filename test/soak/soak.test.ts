// What the soak decides by itself, without a disk: its arguments, the shapes that it draws, events
// that do not come off.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, describe, expect, it } from 'vitest';
// @ts-expect-error: JavaScript without declarations
import { EVENTS } from './events.mjs';
// @ts-expect-error: JavaScript without declarations
import { MOVES } from './moves.mjs';
// @ts-expect-error: JavaScript without declarations
import { Random } from './random.mjs';
// @ts-expect-error: JavaScript without declarations
import { describe as inWords } from './report.mjs';
// @ts-expect-error: JavaScript without declarations
import { shapeOf } from './shape.mjs';

const MAIN = fileURLToPath(new URL('main.mjs', import.meta.url));
const MiB = 2 ** 20;
const scratch = mkdtempSync(join(tmpdir(), 'pqblk-soak-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

describe('arguments', () => {
  const refused = (...words: string[]) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, ...words], {
      encoding: 'utf8',
    });
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' });
    expect(stderr).toMatch(/^soak: .*\n$/); // one line
    return stderr;
  };

  it.each([
    [['--only', 'bogus'], "--only takes load or suites, not 'bogus'"],
    [['--episode', 'x'], "--episode takes a whole number from 0, not 'x'"],
    [['--episode', '1.5'], "--episode takes a whole number from 0, not '1.5'"],
    [['--seed', ''], "--seed takes a whole number from 0, not ''"],
    [['--minutes', '0'], "--minutes takes a number above 0, not '0'"],
    [['--minutes', 'Infinity'], "--minutes takes a number above 0, not 'Infinity'"],
    [['--bogus'], "Unknown option '--bogus'"],
    [['--minutes'], '--minutes'],
    [['bogus'], "Unexpected argument 'bogus'"],
  ])('%j are refused', (words, message) => {
    expect(refused(...words)).toContain(message);
  });

  it('name a place where a report can be written', () => {
    const file = join(scratch, 'file');
    writeFileSync(file, '');
    expect(refused('--out', join(file, 'below'))).toContain(
      'the report cannot be written: ENOTDIR',
    );
  });
});

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

describe('a device that stands still', () => {
  const event = EVENTS.find(({ name }: { name: string }) => name === 'device stands still');
  const stalled = async (problem: string) => {
    const skipped: string[] = [];
    const happened = await event.run({
      place: { stall: async () => problem },
      random: new Random(1),
      soak: { skip: (reason: string) => skipped.push(reason) },
    });
    return { happened, skipped };
  };

  it('counts when it did', async () => {
    expect(await stalled('')).toEqual({ happened: true, skipped: [] });
  });

  it('is a skip with its reason when it could not be frozen', async () => {
    const { happened, skipped } = await stalled('fsfreeze: Operation not permitted');
    expect(happened).toBe(false);
    expect(skipped).toEqual(['the device did not stand still: fsfreeze: Operation not permitted']);
  });
});

describe('an internal snapshot', () => {
  const move = MOVES.find(({ name }: { name: string }) => name === 'internal snapshot');
  const disk = join(scratch, 'snapshot.qcow2');
  const episode: { snapshot: { digest: string } | undefined; [name: string]: unknown } = {
    ...{ disk, at: (name: string) => join(scratch, name) },
    ...{ snapshot: undefined, shape: { size: MiB } },
  };
  const must = (...words: string[]) => {
    const { status, stderr } = spawnSync(words[0] as string, words.slice(1), { encoding: 'utf8' });
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  };
  const take = async () => {
    must('qemu-img', 'create', '-q', '-f', 'qcow2', disk, '1M');
    must('qemu-io', '-c', 'write -q -P 17 0 64k', disk);
    await move.run(episode);
    expect(episode.snapshot?.digest).toMatch(/^[0-9a-f]{64}$/);
  };

  it('is deleted again when the disk was written to', async () => {
    await take();
    must('qemu-io', '-c', 'write -q -P 34 0 64k', disk);
    await move.run(episode);
    expect(episode.snapshot).toBeUndefined();
  });

  // As by an engine that does not ask who else refers to a cluster.
  it('that was written over is noticed', async () => {
    await take();
    const bytes = readFileSync(disk);
    const cluster = bytes.indexOf(Buffer.alloc(65_536, 17));
    bytes.fill(34, cluster, cluster + 65_536);
    writeFileSync(disk, bytes);
    await expect(move.run(episode)).rejects.toThrow('is not what was taken');
  });
});
