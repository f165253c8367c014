// Locks between processes: one holder at a time, whatever becomes of him. The witness is a directory,
// which the kernel makes once.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { takeLock } from '../../src/keys/index.js';
import { errorOf, temporaryDirectory } from './support.js';

const CHILD = fileURLToPath(new URL('./child/lock.mjs', import.meta.url));

test('a second taker hears who has it, or waits for it', async () => {
  const of = join(await temporaryDirectory(), 'thing');
  const release = await takeLock(of, 'test');
  const error = await errorOf(() => takeLock(of, 'test'));
  expect(error.kind).toBe('locked');
  expect(error.message).toContain(String(process.pid));
  const waiting = takeLock(of, 'test', 30_000);
  await release();
  await (await waiting)();
});

test('a lock ends with its process, and what a file says of a holder binds nobody', async () => {
  const of = join(await temporaryDirectory(), 'thing');
  const { signal } = spawnSync(process.execPath, [CHILD, of, 'die'], { stdio: 'ignore' });
  expect(signal).toBe('SIGKILL');
  await (await takeLock(of, 'test'))();
  writeFileSync(`${of}.lock`, `elsewhere.example ${process.pid}\n`);
  await (await takeLock(of, 'test'))();
});

test('never two holders, among processes that take over from a dead one', async () => {
  const of = join(await temporaryDirectory(), 'thing');
  spawnSync(process.execPath, [CHILD, of, 'die'], { stdio: 'ignore' });
  const children = Array.from({ length: 4 }, () =>
    spawn(process.execPath, [CHILD, of, 'take', '50'], { stdio: ['ignore', 'ignore', 'inherit'] }),
  );
  const codes = await Promise.all(children.map((child) => once(child, 'exit')));
  expect(codes).toEqual(Array.from({ length: 4 }, () => [0, null]));
});
