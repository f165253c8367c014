// The processes of a soak: commands that end, servers that are killed, clients that are told what to
// do. None of them is left behind.
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
export const MAIN = here('../../dist/cli/main.cjs');
const HOST = here('host.mjs');
const PEER = here('../../build/release/tests/soak_peer');
const PATIENCE_MS = 300_000;
/** Of a command that Ctrl-C ends: before it listens, interrupted, canceled (`pqblk exit-codes`). */
export const STOPPED = [null, 7, 30];

const children = new Set();

/** What the oracle found: wrong data, a process that died, a command that failed. */
export class Wrong extends Error {}

/** Kills whatever still runs. */
export function killAll() {
  for (const child of children) child.kill('SIGKILL');
}

function start(file, args, { env = {}, stdio = ['ignore', 'pipe', 'pipe'] } = {}) {
  // Detached: Ctrl-C is for the soak, which ends them in order.
  const child = spawn(file, args, { env: { ...process.env, ...env }, stdio, detached: true });
  children.add(child);
  child.said = '';
  child.complaint = '';
  child.on('error', (error) => {
    child.complaint += error.message;
  });
  child.stderr?.on('data', (text) => {
    child.complaint = (child.complaint + text).slice(-4000);
  });
  child.ended = new Promise((resolve) => {
    child.once('close', (code, signal) => {
      children.delete(child);
      resolve({ code, signal });
    });
  });
  return child;
}

/**
 * A command to its end: `{ code, stdout, stderr }`. One that takes too long is killed (code null).
 * `meanwhile` gets the process.
 */
export async function run(file, args, env, meanwhile) {
  const child = start(file, args, { env });
  meanwhile?.(child);
  const timer = setTimeout(() => child.kill('SIGKILL'), PATIENCE_MS);
  child.stdout.on('data', (text) => {
    child.said += text;
  });
  const { code } = await child.ended;
  clearTimeout(timer);
  return { code, stdout: child.said.trim(), stderr: child.complaint.trim() };
}

const LOCK_LOOKS = 200;
const LOCK_MS = 100;

/**
 * qemu-img on a disk whose server has just ended. The kernel takes down what a ring held after its process is
 * gone, the lock on the disk among it; pqblk waits for that, QEMU does not.
 */
export async function qemuImg(args) {
  for (let looks = 1; ; looks += 1) {
    const ended = await run('qemu-img', args);
    if (looks === LOCK_LOOKS || !ended.stderr.includes('Failed to lock')) return ended;
    await sleep(LOCK_MS);
  }
}

export const pqblk = (args, env, meanwhile) =>
  run(process.execPath, [MAIN, ...args], env, meanwhile);
export const peer = (...args) => run(PEER, args.map(String));

async function within(promise, what) {
  const timer = new AbortController();
  const late = sleep(PATIENCE_MS, undefined, { signal: timer.signal }).then(
    () => Promise.reject(new Error(`${what}: nothing for ${PATIENCE_MS / 1000} s`)),
    () => {},
  );
  try {
    return await Promise.race([promise, late]);
  } finally {
    timer.abort();
  }
}

/** A process that says JSON lines with an `event`, and takes orders. */
class Talker {
  constructor(file, args, env) {
    this.child = start(file, args, { env, stdio: ['pipe', 'pipe', 'pipe'] });
    this.child.stdin.on('error', () => {}); // it is gone: its end tells
    this.last = {};
    this.waiting = [];
    this.over = undefined;
    createInterface({ input: this.child.stdout }).on('line', (line) => this.#hear(line));
    this.ended = this.child.ended.then((end) => {
      this.over = end;
      this.#settle();
      return end;
    });
  }

  get pid() {
    return this.child.pid;
  }
  get alive() {
    return this.over === undefined;
  }

  #hear(line) {
    const said = JSON.parse(line);
    this.last[said.event] = said;
    this.onEvent?.(said);
    this.#settle(said);
  }

  #settle(said) {
    this.waiting = this.waiting.filter(({ events, resolve }) => {
      if (said && events.includes(said.event)) resolve(said);
      else if (this.over) resolve({ event: 'dead', ...this.over });
      else return true;
      return false;
    });
  }

  order(line) {
    this.child.stdin.write(`${line}\n`);
  }

  /** The next of these events; `dead` when the process ends before. */
  heard(...events) {
    if (this.over) return Promise.resolve({ event: 'dead', ...this.over });
    const next = new Promise((resolve) => this.waiting.push({ events, resolve }));
    return within(next, `${this.name}: ${events}`);
  }

  async told(line, ...events) {
    const answer = this.heard(...events);
    this.order(line);
    return await answer;
  }

  kill(signal = 'SIGKILL') {
    this.child.kill(signal);
  }
}

/** A client of the native program: random requests on slots of its own. */
export class Client extends Talker {
  constructor(name, board, first, slots, seed, way) {
    super(PEER, ['client', board, first, slots, seed, ...way].map(String));
    Object.assign(this, { name, way });
    this.state = 'idle'; // running, gone
    this.wrong = [];
    this.counts = {};
    this.onEvent = ({ event, ...more }) => {
      if (event === 'running') this.state = 'running';
      if (event === 'gone') this.state = 'gone';
      if (!more.wrong) return;
      const { wrong, error, ...counts } = more;
      this.counts = counts;
      this.wrong = error ? [...wrong, `${name} ended with: ${error}`] : wrong;
    };
  }
}

/** `pqblk serve`, with the options that it takes. */
export class Serve {
  constructor(args, env) {
    this.child = start(process.execPath, [MAIN, 'serve', ...args], { env });
    this.ended = this.child.ended;
    this.ready = new Promise((resolve, reject) => {
      createInterface({ input: this.child.stdout }).on('line', (line) => {
        if (line.startsWith('sandbox: ')) resolve();
      });
      this.ended.then(() => reject(new Error(`pqblk serve ended: ${this.child.complaint}`)));
    });
    this.ready.catch(() => {});
  }
  get pid() {
    return this.child.pid;
  }
  async started() {
    await within(this.ready, 'pqblk serve');
  }
  kill(signal = 'SIGKILL') {
    this.child.kill(signal);
  }
  async end() {
    this.kill('SIGTERM');
    const { code } = await within(this.ended, 'pqblk serve after SIGTERM');
    return code === 0 ? '' : `pqblk serve ended with ${code}: ${this.child.complaint}`;
  }
}

/** A process of ours that opens the disk by the Node API and serves it, every way. */
export class Host extends Talker {
  constructor(options) {
    super(process.execPath, ['--expose-gc', HOST, JSON.stringify(options)]);
    this.name = 'host';
  }
  async started() {
    const { event } = await this.heard('ready');
    if (event !== 'ready') throw new Error(`the host ended: ${this.child.complaint}`);
  }
  async end() {
    this.order('end');
    const { code } = await within(this.ended, 'the host at its end');
    return code === 0 ? '' : `the host ended with ${code}: ${this.child.complaint}`;
  }
}

/** What a process holds now; undefined when it is gone. */
export function held(pid) {
  try {
    const status = readFileSync(`/proc/${pid}/status`, 'utf8');
    const number = (name) => Number(new RegExp(`^${name}:\\s+(\\d+)`, 'm').exec(status)[1]);
    return {
      residentKiB: number('VmRSS'),
      threads: number('Threads'),
      descriptors: readdirSync(`/proc/${pid}/fd`).length,
    };
  } catch {
    return undefined;
  }
}

/** Kills the process of this name that `parent` has started. False: there is none (any more). */
export function killChild(parent, name) {
  for (const pid of readdirSync('/proc')) {
    if (!/^\d+$/.test(pid)) continue;
    try {
      const [, command, rest] = /\((.*)\) \S (\d+) /.exec(
        readFileSync(`/proc/${pid}/stat`, 'utf8'),
      );
      if (command === name && Number(rest) === parent) return process.kill(Number(pid), 'SIGKILL');
    } catch {
      // it ended meanwhile
    }
  }
  return false;
}
