// Child processes of a benchmark run: awaited, so that an interruption is heard meanwhile, and none
// left behind. A program's own process group keeps a terminal's Ctrl-C for the run alone to handle.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';

const OUTPUT_MAX = 64 * 2 ** 20;
const STOP_MS = 10_000;
const children = new Set();

function track(child) {
  children.add(child);
  child.ended = new Promise((resolve) => {
    child.on('error', (error) => {
      child.complaint += error.message;
      children.delete(child);
      resolve();
    });
    child.on('close', () => {
      children.delete(child);
      resolve();
    });
  });
}

function spawned(file, args, { env = {}, cwd } = {}) {
  const child = spawn(file, args, {
    env: { ...process.env, ...env },
    cwd,
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  });
  child.complaint = '';
  child.stderr.setEncoding('utf8').on('data', (text) => {
    child.complaint = (child.complaint + text).slice(-OUTPUT_MAX);
  });
  track(child);
  return child;
}

/** A program that stays: its `lines`, `complaint` (stderr so far), `ended` (a promise). */
export function start(file, args, options) {
  const child = spawned(file, args, options);
  child.lines = createInterface({ input: child.stdout });
  return child;
}

/** A program that ends: what it printed. Throws what it complained of when it fails or hangs. */
export async function run(file, args, options = {}) {
  const { timeoutMs = 600_000, signal } = options;
  const child = spawned(file, args, options);
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text) => {
    output = (output + text).slice(-OUTPUT_MAX);
  });
  const kill = () => end(child);
  const timer = setTimeout(kill, timeoutMs);
  signal?.addEventListener('abort', kill, { once: true });
  if (signal?.aborted) kill();
  await child.ended;
  clearTimeout(timer);
  signal?.removeEventListener('abort', kill);
  if (child.exitCode !== 0) {
    const how = child.exitCode === null ? `ended by ${child.signalCode}` : `exit ${child.exitCode}`;
    throw new Error(`${file}: ${how}\n${child.complaint.slice(-2000)}`);
  }
  return output;
}

/** Asks a program to end, waits, and insists after a while. */
export async function stop(child, signal = 'SIGTERM') {
  if (!children.has(child)) return;
  child.kill(signal);
  const timer = setTimeout(() => end(child), STOP_MS);
  await child.ended;
  clearTimeout(timer);
}

function end(child) {
  try {
    process.kill(-child.pid, 'SIGKILL');
  } catch {
    // It went by itself.
  }
}

export function killAll() {
  for (const child of children) end(child);
}

/** The first line of a server's output: it is ready. Throws what it complained of otherwise. */
export async function firstLine(child, what) {
  const line = await Promise.race([once(child.lines, 'line'), child.ended]);
  if (!Array.isArray(line)) throw new Error(`${what} did not start: ${child.complaint}`);
  return line[0];
}

export function isInstalled(program) {
  return spawnSync('sh', ['-c', 'command -v -- "$1"', 'sh', program]).status === 0;
}
