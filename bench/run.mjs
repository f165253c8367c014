// `npm run bench`: pqblk beside what one would pick instead, on this machine, in one run.
//
//   node bench/run.mjs [--quick] [SET ...] [--rounds N] [--seconds S] [--out DIR] [--disk DIR]
//   node bench/run.mjs --list
//   node bench/run.mjs --table FILE      the targets of a finished run (its JSON) as Markdown rows
//   node bench/run.mjs --figures FILE    all its figures as Markdown tables
//   node bench/run.mjs --report FILE     its HTML report once more
//
// Writes DATE.json and DATE.html to bench/out/. Ctrl-C stops, cleans up, and writes what there is; a
// second one only cleans up. The exit code is 0 also when targets are missed: a benchmark reports.
// It is 1 when a contender failed or the results did not go to --out, 130 after an interruption.
import { setMaxListeners } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Command, InvalidArgumentError } from 'commander';
import { KeyStore } from '../dist/index.js';
import { Bench, Interrupted, KEY } from './lib/bench.mjs';
import { commandLine } from './lib/commands.mjs';
import {
  REPORT_VERSION,
  readReport,
  Unusable,
  writableDirectory,
  writeReportOf,
  writeResults,
} from './lib/files.mjs';
import { load, machineFacts } from './lib/machine.mjs';
import { markdownFigures, markdownRows } from './lib/markdown.mjs';
import { killAll } from './lib/processes.mjs';
import { loadSet, setNames } from './lib/sets.mjs';
import { line, printTargets, progress } from './lib/terminal.mjs';

const root = fileURLToPath(new URL('..', import.meta.url)).replace(/\/$/, '');

function above(least, what) {
  return (text) => {
    const value = Number(text);
    if (Number.isFinite(value) && value >= least) return value;
    throw new InvalidArgumentError(`expected ${what}.`);
  };
}

function readArguments() {
  const command = new Command('bench')
    .description('Measures pqblk beside its peers: a table, JSON and an HTML report.')
    .argument('[sets...]', `which sets (default: all): ${setNames.join(', ')}`)
    .option('--quick', 'short samples of most rows that carry a target: two minutes for all')
    .option(
      '--rounds <n>',
      'samples of each contender; more while they leave a target open',
      above(1, 'a number of rounds'),
    )
    .option('--seconds <s>', 'length of a sample', above(0.01, 'seconds'))
    .option('--out <dir>', 'where the results go', join(root, 'bench', 'out'))
    .option('--disk <dir>', 'a directory on a real disk, for scratch files', join(root, 'build'))
    .option('--list', 'list the sets')
    .option('--table <file>', "print a finished run's targets as rows of Markdown")
    .option('--figures <file>', 'print all figures of a finished run as Markdown')
    .option('--report <file>', "make a finished run's HTML report again")
    .parse();
  const unknown = command.args.filter((name) => !setNames.includes(name));
  if (unknown.length > 0) command.error(`bench: no such set: ${unknown.join(', ')}`);
  return { ...command.opts(), sets: command.args.length > 0 ? command.args : setNames };
}

/** Scratch places and a key for all sets; they go when this process does. */
async function prepare(options) {
  const memory = statDirectory('/dev/shm') ? '/dev/shm' : tmpdir();
  const disk = writableDirectory('--disk', options.disk);
  const shared = {
    ...{ groups: [], progress },
    ram: mkdtempSync(join(memory, 'pqblk-bench-')),
    disk: mkdtempSync(join(disk, 'pqblk-bench-')),
  };
  process.on('exit', () => {
    killAll();
    for (const place of [shared.ram, shared.disk]) rmSync(place, { recursive: true, force: true });
  });
  shared.keys = join(shared.ram, 'keys');
  await new KeyStore(shared.keys).generate(KEY, { noPassphrase: true });
  return shared;
}

function statDirectory(path) {
  try {
    return readFileSync('/proc/mounts', 'utf8').includes(` ${path} `);
  } catch {
    return false;
  }
}

/** Runs the sets one after the other; false when it was interrupted. */
async function runSets(names, settings, shared, abort) {
  for (const name of names) {
    const set = await loadSet(name);
    const bench = new Bench(name, settings, shared);
    shared.current = bench;
    const started = performance.now();
    progress.say(`${name}: ${set.about}`);
    try {
      await set.run(bench);
    } catch (error) {
      if (!(error instanceof Interrupted) && !abort.signal.aborted) {
        line(`${name}: ${error.stack}`);
        shared.broken.push({ set: name, message: error.message });
      }
    } finally {
      await bench.finish();
      shared.seconds[name] = (performance.now() - started) / 1000;
    }
    if (abort.signal.aborted) return false;
  }
  return true;
}

function hearSignals(shared, abort) {
  const hear = () => {
    if (abort.signal.aborted) {
      shared.current?.abandon();
      process.exit(130);
    }
    progress.say('stopping: what was measured so far will be written (again: at once)');
    abort.abort();
    killAll();
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, hear);
}

/** Whether the results went where they were to go. */
function write(out, result) {
  const { json, html, refused } = writeResults(out, result);
  if (refused) console.error(`bench: ${out} was not written to: ${refused}`);
  line(`\nresults  ${json}\nreport   ${html}`);
  return refused === undefined;
}

async function bench(options) {
  const out = writableDirectory('--out', options.out);
  const shared = { ...(await prepare(options)), broken: [], seconds: {} };
  const abort = new AbortController();
  setMaxListeners(0, abort.signal);
  hearSignals(shared, abort);
  const { quick = false, rounds = quick ? 3 : 5, seconds = quick ? 0.2 : 1.5 } = options;
  const settings = { quick, rounds, seconds, rampSeconds: Math.min(seconds / 5, 0.3) };
  const result = {
    pqblkBench: REPORT_VERSION,
    started: new Date().toISOString(),
    command: commandLine(['node', 'bench/run.mjs', ...process.argv.slice(2)]),
    settings: { ...settings, sets: options.sets },
    machine: machineFacts(root, { ram: shared.ram, disk: shared.disk }),
    loadBefore: load(),
  };
  line(`pqblk bench: ${cpus()[0]?.model}, ${availableParallelism()} cores, load ${load()}`);
  const all = { ...settings, root, signal: abort.signal };
  const whole = await runSets(options.sets, all, shared, abort);
  Object.assign(result, {
    ...{ ended: new Date().toISOString(), loadAfter: load(), interrupted: !whole },
    ...{ secondsOfSets: shared.seconds, broken: shared.broken, groups: shared.groups },
  });
  printTargets(shared.groups);
  const wrote = write(out, result);
  const failed = shared.groups.some(({ rows }) => rows.some((row) => row.failed));
  process.exitCode = whole ? (failed || !wrote || shared.broken.length > 0 ? 1 : 0) : 130;
}

async function main(options) {
  if (options.list) {
    for (const name of setNames) line(`${name.padEnd(10)} ${(await loadSet(name)).about}`);
  } else if (options.table) {
    for (const row of markdownRows(readReport(options.table))) line(row);
  } else if (options.figures) {
    for (const row of markdownFigures(readReport(options.figures))) line(row);
  } else if (options.report) {
    line(`report   ${writeReportOf(options.report)}`);
  } else {
    await bench(options);
  }
}

try {
  await main(readArguments());
} catch (error) {
  if (!(error instanceof Unusable)) throw error;
  console.error(`bench: ${error.message}`);
  process.exitCode = 1;
}
