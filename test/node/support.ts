// Shared by the tests of the Node API: directories, disks to work on, a flat model.
import { randomBytes } from 'node:crypto';
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, expect } from 'vitest';
import { type ErrorKind, PqblkError } from '../../src/errors.js';
import { type Disk, type OpenDiskOptions, openDisk } from '../../src/index.js';

/** The built package, for child processes and workers. */
export const DIST = fileURLToPath(new URL('../../dist/index.js', import.meta.url));
export const CHILD = fileURLToPath(new URL('./child/steps.mjs', import.meta.url));
export const OPENS = fileURLToPath(new URL('./child/opens.mjs', import.meta.url));
export const WRITER = fileURLToPath(new URL('./child/writer.mjs', import.meta.url));

/** A directory for one test file, removed after it. */
export function scratch(where = tmpdir()): string {
  const path = mkdtempSync(join(where, 'pqblk-node-'));
  afterAll(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

let files = 0;

/** A new, sparse file. */
export function rawFile(directory: string, size: number): string {
  files += 1;
  const path = join(directory, `disk-${files}.raw`);
  const fd = openSync(path, 'wx', 0o600);
  ftruncateSync(fd, size);
  closeSync(fd);
  return path;
}

export function openRaw(path: string, options: Partial<OpenDiskOptions> = {}): Promise<Disk> {
  return openDisk(path, { format: 'raw', ...options });
}

export async function expectKind(promise: Promise<unknown>, kind: ErrorKind): Promise<PqblkError> {
  const error = await promise.then(
    () => undefined,
    (e: unknown) => e,
  );
  expect(error, `expected kind ${kind}`).toBeInstanceOf(PqblkError);
  expect((error as PqblkError).kind).toBe(kind);
  return error as PqblkError;
}

export function randomBuffer(size: number): Buffer {
  return randomBytes(size);
}

/** Small reproducible numbers (mulberry32); the seed belongs into the test's output. */
export function randomNumbers(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return Math.floor((((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * below);
  };
}
