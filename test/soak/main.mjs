// `npm run test:soak`: random load on real disks for hours, with a model as the oracle; kills, full and
// stalled file systems, changes of keys meanwhile; then the suites' own longer variants.
//
//   node test/soak/main.mjs [--minutes N] [--seed N] [--episode N] [--quick] [--only load|suites]
//
//   --minutes  of everything; 120. Two thirds are load, the rest the suites (and the guest's test).
//   --seed     what is done to which disk; random, and printed
//   --episode  one disk of that seed, alone: what a failure's replay command says
//   --quick    small disks in memory, one life after the other: the slice that `npm test` runs
//   --only     load: no suites; suites: nothing else
//
// One disk is steady: the same server and clients from beginning to end, whose memory has to stay
// flat. Beside it others come and go, are killed and starved. Ctrl-C ends it with the report so far. The
// report is in build/soak/; the exit code is 1 when anything was wrong.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync, rmSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { buildTestPrograms } from '../../scripts/suites.mjs';
import { BadArguments, readArguments } from './arguments.mjs';
import { Episode } from './episode.mjs';
import { makeKeys } from './keys.mjs';
import { Folder, removeAll } from './places.mjs';
import { killAll } from './processes.mjs';
import { judgeMemory, prepareReport, totals, writeReport } from './report.mjs';

const root = fileURLToPath(new URL('../..', import.meta.url));
const LOAD_SHARE = 2 / 3;
const EPISODE_SECONDS = 90;
/** Programs that run as long as they are told, one after the other, in the suites: about so many. */
const SOAKING_PROGRAMS = 24;
const STEADY = 0; // the number of that episode

/** One line, before anything was begun. */
function refuse(problem) {
  console.error(`soak: ${problem}`);
  process.exit(2);
}

let values;
try {
  values = readArguments(process.argv.slice(2), join(root, 'build', 'soak'));
} catch (error) {
  if (!(error instanceof BadArguments)) throw error;
  refuse(`${error.message}; --help tells all options`);
}
if (values.help) {
  const text = readFileSync(fileURLToPath(import.meta.url), 'utf8');
  console.log(text.match(/^(\/\/.*\n)+/)[0].replaceAll(/^\/\/ ?/gm, ''));
  process.exit();
}
const { minutes } = values;
const soak = {
  seed: values.seed,
  out: values.out,
  began: Date.now(),
  stopping: false,
  skipped: new Set(),
  skip: (reason) => soak.skipped.add(reason),
};
// The report has to have a place before hours are spent on what it says.
try {
  prepareReport(soak.out);
} catch (error) {
  refuse(`the report cannot be written: ${error.message}`);
}

const episodes = [];
const failures = [];
const parts = [];
const say = (text) => console.log(`${String(elapsed()).padStart(6)} s  ${text}`);
const elapsed = () => Math.round((Date.now() - soak.began) / 1000);

async function runEpisode(number, options) {
  const episode = new Episode(soak, number, { quick: values.quick, ...options });
  const { shape } = episode;
  const what = [shape.format, shape.suite, shape.place, shape.engine].filter(Boolean).join(', ');
  let failure;
  try {
    await episode.run();
  } catch (error) {
    failure = error.message;
    const replay = `node test/soak/main.mjs --seed ${soak.seed} --episode ${number}`;
    const long = `${replay} --minutes ${Math.ceil(episode.seconds / 60)}`;
    failures.push({ number, what: failure, stack: error.stack, replay: long });
    say(`disk ${number} (${what}) FAILED: ${failure}\n          replay: ${long}`);
  }
  const { counts, samples, seed } = episode;
  const operations = episode.operations();
  episodes.push({ number, seed, shape, counts, operations, samples, failure });
  const requests = (operations.reads ?? 0) + (operations.writes ?? 0);
  const lives = `${counts.lives} lives, ${counts.kills} kills, ${counts.looks} looks`;
  say(`disk ${number} (${what}): ${requests} reads and writes, ${lives}`);
}

async function load(until) {
  const left = () => (until - Date.now()) / 1000;
  if (values.episode !== undefined) {
    await runEpisode(values.episode, { steady: values.episode === STEADY, seconds: left() });
    return;
  }
  const others = async () => {
    const seconds = values.quick ? left() : EPISODE_SECONDS;
    let n = 0;
    do await runEpisode(++n, { seconds: Math.min(seconds, left()) });
    while (!soak.stopping && left() > 5);
  };
  await Promise.all([runEpisode(STEADY, { steady: true, seconds: left() }), others()]);
}

/** A command of the suites; its lines go to the report as they come. */
async function part(file, args, env) {
  say([file, ...args].join(' '));
  const child = spawn(file, args, { cwd: root, env: { ...process.env, ...env } });
  soak.part = child;
  for (const stream of [child.stdout, child.stderr]) {
    createInterface({ input: stream }).on('line', (line) => {
      parts.push(line);
      console.log(line);
    });
  }
  const [code] = await once(child, 'close');
  soak.part = undefined;
  if (code === 0 || soak.stopping) return;
  failures.push({
    what: `${file} ${args.join(' ')}: exit ${code}`,
    replay: `${file} ${args.join(' ')}`,
  });
}

async function suites(seconds) {
  const each = Math.max(5, Math.round((seconds * availableParallelism()) / SOAKING_PROGRAMS / 2));
  const env = { PQBLK_SOAK_SECONDS: String(each) };
  await part(process.execPath, ['scripts/test.mjs', '--soak'], env);
  if (!soak.stopping) await part('npm', ['run', 'test:vm'], {});
}

function finish() {
  const samples = episodes.flatMap((episode) => episode.samples);
  const memory = judgeMemory(samples);
  for (const { problems } of memory) {
    for (const what of problems) {
      failures.push({
        what,
        replay: `node test/soak/main.mjs --seed ${soak.seed} --episode ${STEADY}`,
      });
    }
  }
  const skipped = [...soak.skipped];
  for (const reason of skipped) console.log(`SKIP: ${reason}`);
  writeReport(soak.out, {
    ...{ seed: soak.seed, minutes, began: new Date(soak.began).toISOString(), ended: elapsed() },
    episodes: episodes.map(({ samples: _, ...rest }) => rest).sort((a, b) => a.number - b.number),
    ...{ memory, failures, skipped, parts, samples },
  });
  const { counts, operations } = totals(episodes);
  const verified = (operations.verified ?? 0) + (counts.cells ?? 0);
  console.log(
    `NOTE: soak: seed ${soak.seed}, ${episodes.length} disks, ${counts.kills ?? 0} kills, ` +
      `${verified} sectors compared, ${failures.length} failures; ${join(soak.out, 'report.md')}`,
  );
  process.exitCode = failures.length > 0 ? 1 : 0;
}

function stop() {
  if (soak.stopping) process.exit(1); // twice: at once
  soak.stopping = true;
  soak.part?.kill('SIGINT');
  say('stopping; the report comes');
}

for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, stop);
process.on('exit', () => {
  killAll();
  removeAll();
});
if (!values.quick) {
  const { ok, output } = await buildTestPrograms(); // before the slice, `npm test` did it
  if (!ok) throw new Error(output);
}
rmSync(join(soak.out, 'failures'), { recursive: true, force: true });
say(`seed ${soak.seed}, ${minutes} minutes`);
soak.env = await makeKeys(new Folder('memory').path);
soak.began = Date.now();
const ms = minutes * 60_000;
const alone = values.only === 'load' || values.quick || values.episode !== undefined;
if (values.only !== 'suites') await load(soak.began + ms * (alone ? 1 : LOAD_SHARE));
if (!alone && !soak.stopping) await suites((soak.began + ms - Date.now()) / 1000);
finish();
