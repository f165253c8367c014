// Ends at any moment: processes, workers, thousands of opens. A disk is locked while it is open, so
// that opening it afterwards proves it was given back.
import { execFile, spawn } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { promisify } from 'node:util';
import { Worker } from 'node:worker_threads';
import { describe, expect, test } from 'vitest';
import { CHILD, DIST, OPENS, openRaw, rawFile, scratch } from './support.js';

const MIB = 1024 * 1024;
const directory = scratch();
const STEPS = ['loaded', 'opening', 'open', 'reading', 'writing', 'busy', 'batched', 'bench'];
const SERVER_STEPS = ['serving', 'served'];
const MORE_STEPS = ['resizing', 'closing', 'closed'];
const ALL_STEPS = [...STEPS, ...SERVER_STEPS, ...MORE_STEPS];

if (!existsSync(DIST)) throw new Error(`${DIST} is missing; run scripts/setup`);

interface Ended {
  code: number | null;
  signal: string | null;
  stderr: string;
}

function runChild(path: string, step: string, end: string): Promise<Ended> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, [CHILD, DIST, path, step, end], { timeout: 120_000 });
    let stderr = '';
    child.stderr.on('data', (text) => {
      stderr += text;
    });
    child.on('close', (code, signal) => resolve({ code, signal, stderr }));
  });
}

async function expectFree(path: string): Promise<void> {
  const disk = await openRaw(path);
  await disk.close();
}

describe('processes', () => {
  test.each(ALL_STEPS)('process.exit() when %s', async (step) => {
    const path = rawFile(directory, 16 * MIB);
    expect(await runChild(path, step, 'exit')).toEqual({ code: 7, signal: null, stderr: '' });
    await expectFree(path);
  });

  test.each(['open', 'writing', 'bench'])('an uncaught error when %s', async (step) => {
    const path = rawFile(directory, 16 * MIB);
    const ended = await runChild(path, step, 'throw');
    expect(ended.code).toBe(1);
    expect(ended.stderr).toContain('thrown on purpose');
    await expectFree(path);
  });

  test.each(['open', 'reading', 'writing', 'batched', 'served', 'closing', 'closed'])(
    'the process ends by itself when %s and nothing else is to do',
    async (step) => {
      const path = rawFile(directory, 16 * MIB);
      expect(await runChild(path, step, 'idle')).toEqual({ code: 0, signal: null, stderr: '' });
      await expectFree(path);
    },
  );
});

describe('workers', () => {
  const start = (path: string, step: string, end: string) =>
    new Worker(CHILD, { workerData: [DIST, path, step, end] });

  test.each([...ALL_STEPS, 'reporting'])('terminated when %s', async (step) => {
    const path = rawFile(directory, 16 * MIB);
    const worker = start(path, step, 'wait');
    await new Promise((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
    });
    await worker.terminate();
    await expectFree(path);
    expect([`${path}.nbd`, `${path}.vhost`].filter(existsSync)).toEqual([]);
  });

  test.each(['open', 'busy', 'bench', 'serving', 'closing'])(
    'exits by itself when %s',
    async (step) => {
      const path = rawFile(directory, 16 * MIB);
      const worker = start(path, step, 'exit');
      expect(await new Promise((resolve) => worker.once('exit', resolve))).toBe(7);
      await expectFree(path);
    },
  );

  test('several work at once, each with a disk of its own', async () => {
    const paths = Array.from({ length: 4 }, () => rawFile(directory, 16 * MIB));
    const workers = paths.map((path) => start(path, 'busy', 'wait'));
    await Promise.all(workers.map((w) => new Promise((resolve) => w.once('message', resolve))));
    await Promise.all(workers.map((w) => w.terminate()));
    for (const path of paths) await expectFree(path);
  });
});

describe('leaks', () => {
  const descriptors = () => readdirSync('/proc/self/fd').length;
  const threads = () => readdirSync('/proc/self/task').length;

  test('10,000 times open, read, close', async () => {
    const path = rawFile(directory, MIB);
    // One heap arena and a young generation of fixed size: neither grows while it warms up.
    const child = promisify(execFile)(
      process.execPath,
      ['--expose-gc', '--max-semi-space-size=1', OPENS, DIST, path, '10000'],
      { env: { ...process.env, MALLOC_ARENA_MAX: '1' } },
    );
    const { half, whole } = JSON.parse((await child).stdout);
    expect(whole.descriptors).toBeLessThanOrEqual(half.descriptors + 2);
    expect(whole.threads).toBeLessThanOrEqual(half.threads + 2);
    expect(whole.heapKiB - half.heapKiB).toBeLessThan(512);
    // 5,000 leaks of even 1 KiB would be 5,000.
    expect(whole.residentKiB - half.residentKiB).toBeLessThan(4096);
  }, 900_000);

  test('opens that fail leave nothing behind', async () => {
    const path = rawFile(directory, MIB);
    await using _holder = await openRaw(path);
    const fail = () => openRaw(`${path}.none`).catch(() => {});
    for (let i = 0; i < 50; i++) await fail();
    const before = { fds: descriptors(), threads: threads() };
    for (let i = 0; i < 500; i++) await fail();
    expect(descriptors()).toBeLessThanOrEqual(before.fds + 2);
    expect(threads()).toBeLessThanOrEqual(before.threads + 2);
  });
});
