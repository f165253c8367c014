// Child processes of a demo or a test with a guest: their lines as they come, and none of them, nor
// the working directory, left behind.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { MAIN } from './pqblk.mjs';

const children = new Set();

const MEMORY = existsSync('/dev/shm') ? '/dev/shm' : tmpdir();

/** A directory, in memory unless told otherwise; it and all children go when this process does. */
export function workplace(name, where = MEMORY) {
  const dir = mkdtempSync(join(where, name));
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));
  process.on('exit', () => {
    for (const child of children) child.kill('SIGKILL');
    rmSync(dir, { recursive: true, force: true });
  });
  return dir;
}

/** A process with `lines`, `complaint` (its stderr so far) and `ended`, a promise. */
export function start(file, args, env = {}) {
  const stdio = ['ignore', 'pipe', 'pipe'];
  const child = spawn(file, args, { env: { ...process.env, ...env }, stdio });
  children.add(child);
  child.lines = createInterface({ input: child.stdout });
  child.complaint = '';
  child.stderr.on('data', (text) => {
    child.complaint += text;
  });
  child.on('error', (error) => {
    child.complaint += error.message;
  });
  child.ended = once(child, 'close').then(() => children.delete(child));
  return child;
}

/** `pqblk WORDS`, once it has said its first line. */
export async function startPqblk(words, env) {
  const child = start(process.execPath, [MAIN, ...words], env);
  const ready = await Promise.race([once(child.lines, 'line'), child.ended]);
  if (!Array.isArray(ready)) throw new Error(`pqblk ${words[0]} did not start: ${child.complaint}`);
  return child;
}
