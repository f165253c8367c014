// The suites of `npm test`. Each is an async function of an optional filter that resolves to
//
//   { passed, failed, skipped, output, remarks }
//
// `output` is shown when something failed, `remarks` always. How each one counts:
//   lint, layers         one for each check
//   native, asan, tsan   doctest's test cases; a build, crash or time-out is one failure. A test case
//                        that prints `SKIP: reason` counts as skipped and not as passed
//   instructions         one for each hot path
//   fuzz                 one for each fuzzer
//   vitest               its tests; a file that does not load or an unhandled error is one failure
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { layerChecks } from './check-layers.mjs';
import { checkPaths, paths } from './instructions.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const soakSeconds = () =>
  process.env.PQBLK_SOAK === '1' ? Number(process.env.PQBLK_SOAK_SECONDS) : 0;
// No single program may hang the run. Soak tests in one program may add up; give them room. All
// tests of the TypeScript layers are one program: it gets what CI's 90 minutes leave for it.
const timeLimitMs = (seconds = 900) => (seconds + 40 * soakSeconds()) * 1000;
const vitestSeconds = 2700;

// Rooms whose tests start threads; the others would tell ThreadSanitizer nothing.
const threadedRooms = new Set([
  'base',
  'io',
  'storage',
  'crypto',
  'sealed',
  'image',
  'export',
  'cabi',
]);
// Doctest suites that a sanitizer's run leaves out: see test/native/effort.h.
const leaveOut = (...names) => [`--test-suite-exclude=${names.join(',')}`];

const empty = () => ({ passed: 0, failed: 0, skipped: 0, output: '', remarks: [] });

function add(sum, part) {
  for (const key of ['passed', 'failed', 'skipped', 'output']) sum[key] += part[key];
  sum.remarks.push(...part.remarks);
  return sum;
}

// Runs a program to its end with stdout and stderr joined. Resolves, whatever happens.
function run(file, args, env = {}, limitMs = timeLimitMs()) {
  return new Promise((resolve) => {
    const chunks = [];
    const child = spawn(file, args, {
      cwd: root,
      env: { ...process.env, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let ending = '';
    const timer = setTimeout(() => {
      ending = `killed after ${limitMs / 1000} s`;
      child.kill('SIGKILL');
    }, limitMs);
    child.stdout.on('data', (data) => chunks.push(data));
    child.stderr.on('data', (data) => chunks.push(data));
    child.on('error', (error) => {
      clearTimeout(timer);
      resolve({ ok: false, output: `${file}: ${error.message}\n` });
    });
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      const output = Buffer.concat(chunks).toString();
      if (!ending && code !== 0) ending = signal ? `ended by ${signal}` : `exit code ${code}`;
      resolve({
        ok: code === 0,
        output: ending ? `${output}${basename(file)}: ${ending}\n` : output,
      });
    });
  });
}

const remarksIn = (output) =>
  output
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => /^(SKIP|NOTE): /.test(line));

async function runCheck(name, file, args) {
  const { ok, output } = await run(file, args);
  return {
    ...empty(),
    passed: ok ? 1 : 0,
    failed: ok ? 0 : 1,
    output: ok ? '' : `--- ${name}\n${output}`,
  };
}

const bin = (name) => join(root, 'node_modules', '.bin', name);

async function lint() {
  const checks = await Promise.all([
    runCheck('biome', bin('biome'), ['check', '--error-on-warnings', '--colors=off', '.']),
    runCheck('clang-format', process.execPath, [join(root, 'scripts/format.mjs'), '--check-cxx']),
    runCheck('tsc', bin('tsc'), ['--noEmit', '--pretty', 'false', '-p', 'tsconfig.json']),
  ]);
  return checks.reduce(add, empty());
}

async function layers() {
  const sum = empty();
  for (const [name, check] of Object.entries(layerChecks)) {
    const violations = check(root);
    if (violations.length === 0) sum.passed += 1;
    else sum.failed += 1;
    for (const violation of violations) sum.output += `${name}: ${violation}\n`;
  }
  return sum;
}

// Configures (where the cache does not say the same already) and builds one target, under the lock
// that scripts/setup holds for its builds: ninja has none of its own.
async function build(dir, target, definitions) {
  const fresh = !['build.ninja', 'Makefile'].some((file) => existsSync(join(dir, file)));
  const ninja = spawnSync('ninja', ['--version']).status === 0;
  const generator = fresh && ninja ? ['-G', 'Ninja'] : [];
  const defines = Object.entries(definitions).map(([key, value]) => `-D${key}=${value}`);
  const lock = join(root, 'build', 'stamps', 'lock');
  mkdirSync(dirname(lock), { recursive: true });
  const cmake = (args) => run('flock', [lock, 'cmake', ...args]);
  const configured = await cmake(['-S', root, '-B', dir, ...generator, ...defines]);
  if (!configured.ok) return configured;
  const jobs = String(availableParallelism());
  return cmake(['--build', dir, '--target', target, '--parallel', jobs]);
}

const longestFirst = (rooms) => {
  const slow = ['sealed', 'image'].filter((room) => rooms.includes(room));
  return [...slow, ...rooms.filter((room) => !slow.includes(room))];
};

// The rooms that have tests; tests.cmake makes one executable of each.
function testedRooms() {
  const dir = join(root, 'test', 'native');
  if (!existsSync(dir)) return [];
  return readdirSync(dir, { withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map((entry) => entry.name)
    .filter((room) =>
      readdirSync(join(dir, room), { recursive: true }).some((name) => name.endsWith('_test.cc')),
    )
    .sort();
}

function countDoctest(name, { ok, output }) {
  const summary = output.match(/test cases:\s*\d+\s*\|\s*(\d+) passed\s*\|\s*(\d+) failed/);
  const remarks = remarksIn(output);
  const saidSkip = remarks.filter((line) => line.startsWith('SKIP: ')).length;
  const [passed, failed] = summary ? summary.slice(1).map(Number) : [0, 0];
  // A program that ended badly without naming a failed case (a crash, a leak report) is one failure.
  const crashed = (!ok || !summary) && failed === 0 ? 1 : 0;
  return {
    passed: Math.max(0, passed - saidSkip),
    failed: failed + crashed,
    skipped: saidSkip,
    output: failed + crashed > 0 ? `--- ${name}\n${output}` : '',
    remarks: remarks.map((line) => `${name}: ${line}`),
  };
}

// Calls `one` with every item, as many at a time as there are cores.
async function each(items, one) {
  const left = [...items];
  const worker = async () => {
    for (let item = left.shift(); item; item = left.shift()) await one(item);
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
}

async function runDoctests(kind, sanitize, wanted, { env = {}, prefix = [], args = [] } = {}) {
  const dir = join(root, 'build', kind);
  const built = await build(dir, 'pqblk_tests', {
    CMAKE_BUILD_TYPE: 'Release',
    PQBLK_BUILD_TESTS: 'ON',
    PQBLK_SANITIZE: sanitize,
    ...(sanitize === 'none' ? {} : { PQBLK_BUILD_NODE: 'OFF' }),
  });
  if (!built.ok) return { ...empty(), failed: 1, output: built.output };
  const sum = empty();
  await each(longestFirst(testedRooms().filter(wanted)), async (room) => {
    const command = [...prefix, join(dir, 'tests', `test_${room}`), '--no-colors=true', ...args];
    const result = await run(command[0], command.slice(1), env);
    add(sum, countDoctest(`test_${room}`, result));
  });
  return sum;
}

const isRoom = (filter) => (room) => filter === undefined || room === filter;

const native = (filter) => runDoctests('release', 'none', isRoom(filter));

const asan = (filter) =>
  runDoctests('asan', 'address', isRoom(filter), {
    env: {
      ASAN_OPTIONS: 'detect_leaks=1:strict_string_checks=1:check_initialization_order=1',
      UBSAN_OPTIONS: 'print_stacktrace=1',
    },
    args: leaveOut('hunt'),
  });

function tsan(filter) {
  // ThreadSanitizer of gcc 12 cannot live with every layout a randomising kernel hands out.
  const steady = spawnSync('setarch', ['-R', 'true']).status === 0 ? ['setarch', '-R'] : [];
  const options = ['halt_on_error=1', 'second_deadlock_stack=1'];
  const wanted = (room) => (filter === undefined ? threadedRooms.has(room) : room === filter);
  return runDoctests('tsan', 'thread', wanted, {
    env: { TSAN_OPTIONS: options.join(':') },
    prefix: steady,
    args: leaveOut('hunt', 'solo'),
  });
}

async function fuzzOne(dir, name, seconds) {
  // New inputs go to a directory below build/: kept between soak runs, thrown away otherwise.
  const kept = join(dir, 'corpus', name);
  mkdirSync(kept, { recursive: true });
  const found = soakSeconds() > 0 ? kept : mkdtempSync(join(dir, `${name}-`));
  const artifacts = join(dir, 'artifacts');
  mkdirSync(artifacts, { recursive: true });
  const seed = process.env.PQBLK_SEED ?? (soakSeconds() > 0 ? Date.now() % 2 ** 31 : 1);
  const { ok, output } = await run(join(dir, 'fuzzers', `fuzz_${name}`), [
    `-max_total_time=${seconds}`,
    ...(soakSeconds() > 0 ? [] : ['-runs=5000000']),
    ...['-timeout=20', '-rss_limit_mb=2048', `-seed=${seed}`, '-print_final_stats=1'],
    `-artifact_prefix=${join(artifacts, `${name}-`)}`,
    found,
    join(root, 'test', 'fuzz', 'corpus', name),
  ]);
  if (found !== kept) rmSync(found, { recursive: true });
  const runs = output.match(/stat::number_of_executed_units:\s*(\d+)/)?.[1];
  return {
    passed: ok ? 1 : 0,
    failed: ok ? 0 : 1,
    skipped: 0,
    output: ok ? '' : `--- fuzz_${name}\n${output}`,
    remarks: ok ? [`fuzz_${name}: ${runs ?? '?'} runs, seed ${seed}`] : [],
  };
}

async function fuzz(filter) {
  const dir = join(root, 'build', 'fuzz');
  const sources = join(root, 'test', 'fuzz');
  const names = (existsSync(sources) ? readdirSync(sources) : [])
    .filter((name) => name.endsWith('.cc'))
    .map((name) => name.slice(0, -'.cc'.length))
    .filter(isRoom(filter))
    .sort();
  if (names.length === 0) return empty();
  const built = await build(dir, filter === undefined ? 'pqblk_fuzzers' : `fuzz_${filter}`, {
    CMAKE_CXX_COMPILER: 'clang++',
    CMAKE_BUILD_TYPE: 'Release',
    PQBLK_SANITIZE: 'address',
    PQBLK_BUILD_FUZZERS: 'ON',
    PQBLK_BUILD_NODE: 'OFF',
  });
  if (!built.ok) return { ...empty(), failed: 1, output: built.output };
  const seconds = soakSeconds() || Number(process.env.PQBLK_FUZZ_SECONDS ?? 10);
  const sum = empty();
  await each(names, async (name) => add(sum, await fuzzOne(dir, name, seconds)));
  return sum;
}

/** The PKCS#11 module of the tests, which the token process loads, and the clients of the soak. */
export async function buildTestPrograms() {
  let built = { ok: true, output: '' };
  for (const target of ['pqblk_test_token', 'soak_peer']) {
    if (!built.ok) break;
    built = await build(join(root, 'build', 'release'), target, {
      CMAKE_BUILD_TYPE: 'Release',
      PQBLK_BUILD_TESTS: 'ON',
      PQBLK_SANITIZE: 'none',
    });
  }
  return built;
}

async function vitest(filter) {
  const built = await buildTestPrograms();
  if (!built.ok) return { ...empty(), failed: 1, output: built.output };
  const report = join(root, 'build', 'vitest.json');
  rmSync(report, { force: true });
  mkdirSync(dirname(report), { recursive: true });
  const { ok, output } = await run(
    bin('vitest'),
    [
      ...['run', '--reporter=default', '--reporter=json', `--outputFile.json=${report}`],
      ...(filter === undefined ? [] : [filter]),
    ],
    { NO_COLOR: '1', FORCE_COLOR: '0' },
    timeLimitMs(vitestSeconds),
  );
  const sum = { ...empty(), remarks: remarksIn(output) };
  if (existsSync(report)) {
    const results = JSON.parse(readFileSync(report, 'utf8'));
    sum.passed = results.numPassedTests;
    sum.failed = results.numFailedTests;
    sum.skipped = results.numPendingTests + results.numTodoTests;
    // A file that could not be loaded has failed without a failed test in it.
    sum.failed += results.testResults.filter(
      (file) =>
        file.status === 'failed' && !file.assertionResults.some((test) => test.status === 'failed'),
    ).length;
  }
  if (!ok && sum.failed === 0) sum.failed = 1;
  if (sum.failed > 0) sum.output = output;
  return sum;
}

// Instructions per operation against their budgets; the filter is a path.
async function instructions(filter) {
  const dir = join(root, 'build', 'release');
  const built = await build(dir, 'bench_hotpath', {
    CMAKE_BUILD_TYPE: 'Release',
    PQBLK_BUILD_TESTS: 'ON',
    PQBLK_SANITIZE: 'none',
  });
  if (!built.ok) return { ...empty(), failed: 1, output: built.output };
  const wanted = [...paths.keys()].filter((path) => filter === undefined || path === filter);
  return checkPaths(join(dir, 'bench_hotpath'), wanted, each);
}

export const suites = { lint, layers, native, instructions, asan, tsan, fuzz, vitest };
