// What a set is given: scratch places, programs, disks, and the comparison of contenders.
//
// A set is `export default { name, about, async run(bench) {} }` in bench/sets/. It prepares what it
// needs and calls
//
//   await bench.compare({
//     group: 'randread, RAM',              // unique within the set: one table, one plot
//     about: 'a sentence',                 // optional
//     unit: 'IOPS',                        // lib/units.mjs
//     better: 'more',                      // or 'less'
//     base: 'fio io_uring',                // the row that ratios are taken to; optional
//     x: { name: 'queue depth', values: [1, 2, 4], log: true },   // optional: a series and its axis
//     rounds: 1,                           // optional: fewer than the run's, for what takes long.
//                                          // Without it more, while a target is open. Quick: never
//                                          // more, and one where there is no target
//     contenders: [{ name, missing, call, run: async (x) => 123 }],  // or { value, p50, p99, … }
//     targets: [{ name, to, atLeast, atMost, x, about }],         // without `to`: of the value itself
//   });
//
// `missing` (a string) says why a contender cannot run: its row then says so. `call` (a string, or
// several) is what repeats a sample, for the report; programs and loads of open disks add their own.
// Other numbers beside `value` are kept; p50, p90, p99, p99_9 are latencies in microseconds and get a
// plot of their own where all four are there.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { KeyStore, openDisk } from '../../dist/index.js';
import { directIoWorks } from '../../scripts/demo/bench.mjs';
import { benchCommand, commandLine } from './commands.mjs';
import { groupOf, measure } from './compare.mjs';
import { undisturbed } from './host.mjs';
import * as processes from './processes.mjs';

export const KEY = 'bench';
/** How often a sample is taken at most when the host disturbs it. */
const TRIES = 6;
const TRIES_QUICK = 2;
/** How many times the rounds of a run are taken at most while they leave a target open. */
const ROUNDS_WHILE_OPEN = 3;
/** Command lines that are kept of a row. */
const COMMANDS_MAX = 8;

/** Somebody pressed Ctrl-C. */
export class Interrupted extends Error {}

export class Bench {
  /** Short samples, and little but rows that carry a target; not all of them. */
  quick;
  /** How often each contender is measured. */
  rounds;
  /** Of one sample. */
  seconds;
  /** Before a sample that needs it. */
  rampSeconds;
  /** Aborted by Ctrl-C. */
  signal;
  /** The checkout. */
  root;
  /** The built command line. */
  main;
  /** Scratch directories of this set, in memory and on a real disk; emptied after it. */
  ram;
  disk;
  /** Whether O_DIRECT works there. */
  direct;
  /** What they are called in the names of groups. */
  where;
  /** For child processes: the key store, which has one key without a passphrase, KEY. */
  env;

  #set;
  #progress;
  #groups;
  #store;
  #identity;
  #deferred = [];
  /** Disk → what it was opened with, but for the key. */
  #options = new WeakMap();
  #row;

  /** One for each set of a run; `shared` is made once for all of them. */
  constructor(set, settings, shared) {
    this.#set = set;
    Object.assign(this, settings);
    this.main = join(this.root, 'dist', 'cli', 'main.cjs');
    this.#groups = shared.groups;
    this.#progress = shared.progress;
    this.#store = new KeyStore(shared.keys);
    this.env = { PQBLK_KEYS: shared.keys };
    this.ram = mkdtempSync(join(shared.ram, `${set}-`));
    this.disk = mkdtempSync(join(shared.disk, `${set}-`));
    this.direct = { ram: directIoWorksIn(this.ram), disk: directIoWorksIn(this.disk) };
    this.where = { ram: 'RAM', disk: this.direct.disk ? 'disk' : 'disk, page cache' };
    for (const place of [this.ram, this.disk]) {
      this.defer(() => rmSync(place, { recursive: true, force: true }));
    }
  }

  async compare(plan) {
    const group = groupOf(plan, this.#set);
    this.#groups.push(group);
    const most = this.quick && group.targets.length === 0 ? 1 : this.rounds;
    const rounds = Math.min(most, plan.rounds ?? most);
    const further = this.quick || plan.rounds !== undefined ? 1 : ROUNDS_WHILE_OPEN;
    const step = (where, once) => this.#step(group, where, once);
    try {
      await measure(plan, group, { rounds, most: rounds * further, step });
    } finally {
      this.#progress.group(group);
    }
    return group;
  }

  /** Runs one contender once. Its failure is its row's; only an interruption is thrown. */
  async #step(group, where, once) {
    this.check();
    this.#progress.step(group, where);
    this.#row = where.row;
    try {
      const tries = this.quick ? TRIES_QUICK : TRIES;
      const { result, repeated, disturbed } = await undisturbed(
        () => {
          this.check();
          return once();
        },
        { tries },
      );
      group.host.repeated += repeated;
      if (disturbed) group.host.disturbed += 1;
      return { result };
    } catch (error) {
      this.check();
      return { error };
    } finally {
      this.#row = undefined;
    }
  }

  /** Throws when the run was interrupted; for preparations that take long. */
  check() {
    if (this.signal.aborted) throw new Interrupted('interrupted');
  }

  /** Says what is being prepared. */
  say(text) {
    this.check();
    this.#progress.say(`${this.#set}: ${text}`);
  }

  /** A command line that repeats the contender being measured, for the report; once for all seeds. */
  command(text) {
    const commands = this.#row?.commands;
    const known = commands?.some((each) => withoutSeed(each) === withoutSeed(text));
    if (commands && !known && commands.length < COMMANDS_MAX) commands.push(text);
  }

  /** What `disk.bench(spec)` is: as a load of `pqblk bench`, or as calls. */
  loadCommand(disk, spec) {
    this.command(benchCommand(disk.facts, this.#options.get(disk) ?? {}, spec, KEY));
  }

  /** Why one of these programs cannot be run; undefined when all can. */
  needs(...programs) {
    const absent = programs.filter((program) => !processes.isInstalled(program));
    return absent.length > 0 ? `${absent.join(', ')} not installed` : undefined;
  }

  /** What a program printed. Throws when it fails. */
  async run(file, args, { env = {}, ...options } = {}) {
    this.check();
    this.command(commandLine([file, ...args]));
    const all = { cwd: this.root, signal: this.signal, env: { ...this.env, ...env } };
    return await processes.run(file, args, { ...all, ...options });
  }

  /** `pqblk ARGS`, and what it reported where ARGS have --json. */
  async pqblk(...args) {
    const output = await this.run(process.execPath, [this.main, ...args]);
    return args.includes('--json') ? JSON.parse(output) : output.trim();
  }

  /** A program that stays until `stop`, at the latest until the set ends. */
  start(file, args, { env = {}, ...options } = {}) {
    this.check();
    this.command(commandLine([file, ...args]));
    const all = { cwd: this.root, env: { ...this.env, ...env }, ...options };
    const child = processes.start(file, args, all);
    this.defer(() => processes.stop(child));
    return child;
  }

  stop(child, signal) {
    return processes.stop(child, signal);
  }

  /** `pqblk serve …` and its like, ready when it says so. */
  async startPqblk(...args) {
    const child = this.start(process.execPath, [this.main, ...args]);
    await processes.firstLine(child, `pqblk ${args[0]}`);
    return child;
  }

  /** Builds a native program (bench_disk, …) and returns its path. */
  async build(target) {
    const dir = join(this.root, 'build', 'release');
    const lock = join(this.root, 'build', 'stamps', 'lock');
    const jobs = `${availableParallelism()}`;
    await this.run('flock', [lock, 'cmake', '-S', this.root, '-B', dir, '-DPQBLK_BUILD_TESTS=ON']);
    await this.run('flock', [
      ...[lock, 'cmake', '--build', dir, '--target', target, '--parallel', jobs],
    ]);
    return join(dir, target);
  }

  /** The private key, and the public half of it, for disks of this run. */
  async identity() {
    if (!this.#identity) {
      this.#identity = await this.#store.unlock(KEY);
      this.defer(() => this.#identity[Symbol.dispose]());
    }
    return this.#identity;
  }

  recipient() {
    return this.#store.recipient(KEY);
  }

  /** Opens a disk in this process. Sealed: with the key. Closed at the latest when the set ends. */
  async open(path, format, options = {}) {
    this.check();
    const keys = format === 'sealed' ? { identity: await this.identity() } : {};
    const disk = await openDisk(path, { format, ...keys, ...options });
    this.#options.set(disk, options);
    this.defer(() => disk.close());
    return disk;
  }

  /** `undo` is called when the set ends, however it ends; the last one first. */
  defer(undo) {
    this.#deferred.push(undo);
  }

  /** Undoes what the set did. A failure is said and stops nothing. */
  async finish() {
    for (let undo = this.#deferred.pop(); undo; undo = this.#deferred.pop()) {
      try {
        await undo();
      } catch (error) {
        this.#progress.say(`${this.#set}: cleaning up: ${error.message}`);
      }
    }
  }

  /** The same in a process that ends now: what can be undone without waiting. */
  abandon() {
    for (let undo = this.#deferred.pop(); undo; undo = this.#deferred.pop()) {
      try {
        Promise.resolve(undo()).catch(() => {});
      } catch {
        // The next ones still get their turn.
      }
    }
  }
}

/** Each sample has a seed of its own; one of them is enough to see. */
const withoutSeed = (text) => text.replace(/seed:? \d+/, '');

function directIoWorksIn(directory) {
  const probe = mkdtempSync(join(directory, 'probe-'));
  try {
    const file = join(probe, 'file');
    writeFileSync(file, Buffer.alloc(4096));
    return directIoWorks(file);
  } finally {
    rmSync(probe, { recursive: true });
  }
}
