// Instructions per operation of the hot paths, against what test/native/budgets.json allows: a
// guard that a busy machine cannot fool.
//
//   node scripts/instructions.mjs                 checks every path (npm test's suite `instructions`)
//   node scripts/instructions.mjs PATH...         these alone, with where their instructions go
//   node scripts/instructions.mjs --record [PATH...]   writes the figures of now as the budgets
//
// bench_hotpath (test/native/hotpath) runs a path under callgrind: a fixed number of 4 KiB requests
// from image::Disk down to a null ring, one thread at work, a clock that counts. What a figure holds:
//
//   instructions   the engine's own functions, and what they call in the C and C++ libraries. Not in
//                  it: the cipher (native/crypto, IPsec-MB and libcrypto: valgrind has no VAES and
//                  no AVX-512, and they take another path there), the copying itself of memcpy and
//                  its like, the kernel, the ring's own entries, and the test's own code.
//   copies         calls of memcpy, memmove, memset and memcmp by the engine
//
// A path fails beyond `margin` of its budget, or half a copy more per operation; what became 10 %
// cheaper is remarked on. Counts depend on the compiler and the C library: with others than those
// that were recorded the margin is `other_margin`. A change that is meant to cost more, or that
// costs less, records the budgets anew, in the same commit. What cannot be counted (no valgrind, no
// disk) is a skip; where CI=true it has failed.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const budgetFile = join(root, 'test', 'native', 'budgets.json');
const timeLimitMs = 300_000;
const functionsKept = 16; // of a path, in the file
const cheaper = 0.1;

// Every path, and how many operations are counted.
export const paths = new Map([
  ['raw-read', 2000],
  ['qcow2-read', 2000],
  ['sealed-read', 2000],
  ['sealed-overwrite', 2000],
  ['sealed-checkpoint', 1000],
  ['vhost-read', 2000],
]);

// ---- callgrind's output ----

// One row for each function: { name, object, self, calls: Map(function, {count, cost}) }.
export function parseCallgrind(text) {
  const names = { ob: new Map(), fn: new Map() };
  const named = (kind, value) => {
    const match = /^\((\d+)\)(?: (.*))?$/.exec(value);
    if (!match) return value;
    if (match[2] !== undefined) names[kind].set(match[1], match[2]);
    return names[kind].get(match[1]);
  };
  const functions = new Map();
  const functionOf = (object, name) => {
    const key = `${object}\n${name}`;
    let row = functions.get(key);
    if (!row) {
      row = { name, object, self: 0, calls: new Map() };
      functions.set(key, row);
    }
    return row;
  };
  let object = '';
  let calledObject;
  let current;
  let called;
  let count = 0;
  for (const line of text.split('\n')) {
    const cost = /^[+\-*\d]\S* (\d+)$/.exec(line);
    if (cost && current) {
      if (!called) {
        current.self += Number(cost[1]);
        continue;
      }
      const call = current.calls.get(called) ?? { count: 0, cost: 0 };
      call.count += count;
      call.cost += Number(cost[1]);
      current.calls.set(called, call);
      called = undefined;
      continue;
    }
    const [, key, value] = /^(\w+)=(.*)$/.exec(line) ?? [];
    if (key === 'ob') object = named('ob', value);
    else if (key === 'cob') calledObject = named('ob', value);
    else if (key === 'fn') current = functionOf(object, named('fn', value));
    else if (key === 'cfn') {
      called = functionOf(calledObject ?? object, named('fn', value));
      calledObject = undefined;
    } else if (key === 'calls') count = Number(value.split(' ')[0]);
  }
  return [...functions.values()];
}

const isCopy = (row) => /^_*(mem(cpy|move|set|cmp)|bcmp)/.test(row.name);

// What a function counts as.
function kindOf(row, program) {
  if (basename(row.object) !== program) {
    if (/IPSec_MB|libcrypto/.test(row.object)) return 'cipher';
    return isCopy(row) ? 'copy' : 'library';
  }
  if (!row.name.includes('::')) return 'cipher'; // libcrypto is linked into the program
  if (/(^|[^\w])test::/.test(row.name) || row.name.startsWith('(anonymous')) return 'test';
  return row.name.includes('pqblk::crypto::') ? 'cipher' : 'own';
}

// "pqblk::image::RawBackend::read(...) [clone .actor]" as "image::RawBackend::read [actor]".
export function shortName(name) {
  const clone = /\[clone \.(actor|destroy)\]/.exec(name);
  let text = name.replaceAll('(anonymous namespace)::', '').replace(/^.*?\bpqblk::/, '');
  text = text.replace(/operator\(\)/g, 'call');
  while (/<[^<>]*>/.test(text)) text = text.replace(/<[^<>]*>/g, '');
  text = text
    .replace(/[({].*$/, '')
    .replace(/::$/, ' lambda')
    .replace(/ \[clone.*$/, '');
  return clone ? `${text} [${clone[1]}]` : text;
}

// { instructions, copies, functions: {name: instructions}, copied: {caller: {calls, ...}} }, each per
// operation.
export function summarise(rows, program, ops) {
  const result = { instructions: 0, copies: 0, functions: {}, copied: {} };
  const add = (map, name, value) => {
    map[name] = (map[name] ?? 0) + value;
  };
  for (const row of rows) {
    if (kindOf(row, program) !== 'own') continue;
    const name = shortName(row.name);
    add(result.functions, name, row.self / ops);
    result.instructions += row.self / ops;
    for (const [callee, call] of row.calls) {
      const kind = kindOf(callee, program);
      if (kind === 'library') {
        add(result.functions, `${shortName(callee.name)} (library)`, call.cost / ops);
        result.instructions += call.cost / ops;
      } else if (kind === 'copy') {
        result.copies += call.count / ops;
        add(result.copied, `${name} > ${callee.name}`, call.count / ops);
      }
    }
  }
  return result;
}

// ---- running ----

function run(file, args) {
  return new Promise((resolve) => {
    const child = spawn(file, args, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] });
    const output = { stdout: '', stderr: '' };
    const timer = setTimeout(() => child.kill('SIGKILL'), timeLimitMs);
    for (const name of ['stdout', 'stderr']) {
      child[name].on('data', (data) => {
        output[name] += data;
      });
    }
    child.on('error', (error) => {
      clearTimeout(timer);
      resolve({ ...output, problem: error.message });
    });
    child.on('close', (code, signal) => {
      clearTimeout(timer);
      resolve({ ...output, problem: code === 0 ? '' : `ended with ${signal ?? code}` });
    });
  });
}

// The path's figures and what they were compiled with, { skip } or { problem }.
async function measure(program, path, dir) {
  const out = join(dir, `${path}.callgrind`);
  const image = `file=${join(dir, `${path}.img`)}`;
  const made = await run(program, ['make', path, image]);
  if (made.problem) return { problem: `${made.problem}\n${made.stderr}` };
  const { skip } = JSON.parse(made.stdout);
  if (skip) return { skip };
  const { stdout, stderr, problem } = await run('valgrind', [
    ...['--tool=callgrind', '--instr-atstart=no', `--callgrind-out-file=${out}`],
    ...[program, 'count', path, `ops=${paths.get(path)}`, image],
  ]);
  if (problem) return { problem: `${problem}\n${stderr}` };
  const facts = JSON.parse(stdout);
  const rows = parseCallgrind(readFileSync(out, 'utf8'));
  return { facts, ...summarise(rows, basename(program), facts.ops) };
}

export function readBudgets() {
  return JSON.parse(readFileSync(budgetFile, 'utf8'));
}

const top = (functions, n) =>
  Object.entries(functions)
    .sort((a, b) => b[1] - a[1])
    .slice(0, n);

// Which functions cost more than they did. What was not recorded cost no more than the least that was.
function growth(functions, recorded) {
  const least = Math.min(...Object.values(recorded));
  return Object.entries(functions)
    .map(([name, now]) => ({ name, now, before: recorded[name] ?? Math.min(now, least) }))
    .filter(({ now, before }) => now - before >= 1)
    .sort((a, b) => b.now - b.before - (a.now - a.before))
    .slice(0, 10)
    .map(
      ({ name, now, before }) =>
        `    ${(now - before).toFixed(1).padStart(8)} more: ${before.toFixed(1)} -> ${now.toFixed(1)}  ${name}`,
    )
    .join('\n');
}

// { failed: text or '', note: text or '' } of one path.
export function judge(path, measured, budgets) {
  const budget = budgets.paths[path];
  if (!budget) return { failed: `${path} has no budget: record one`, note: '' };
  const { compiler, libc } = measured.facts;
  const same = compiler === budgets.compiler && libc === budgets.libc;
  const margin = same ? budgets.margin : budgets.other_margin;
  const found = `${measured.instructions.toFixed(1)} instructions and ${measured.copies.toFixed(2)} copies`;
  const allowed = `${budget.instructions} and ${budget.copies}, ${margin * 100} % allowed`;
  const other = same
    ? ''
    : ` (recorded with g++ ${budgets.compiler}, glibc ${budgets.libc}; this is ${compiler}, ${libc})`;
  if (
    measured.instructions > budget.instructions * (1 + margin) ||
    measured.copies > budget.copies + 0.5
  ) {
    const more = growth(measured.functions, budget.functions);
    return {
      failed: `${path}: ${found} per operation; the budget is ${allowed}${other}\n${more}`,
      note: '',
    };
  }
  if (same && measured.instructions < budget.instructions * (1 - cheaper)) {
    return {
      failed: '',
      note: `${path} takes ${found} per operation, its budget is ${budget.instructions}: tighten it (node scripts/instructions.mjs --record ${path})`,
    };
  }
  return { failed: '', note: same ? '' : `${path}: ${found}; the budget is ${allowed}${other}` };
}

// What makes it count on a machine where it said `reason`.
function remedy(reason) {
  if (reason.includes('in memory')) return 'put the source tree, and its build/, on a disk';
  const install = 'install valgrind (Debian: apt-get install valgrind, or scripts/setup --test)';
  return reason.includes('header') ? `${install} and remove build/release` : install;
}

// The suite of `npm test`. `program`: bench_hotpath, built. Where CI=true a skip has failed: a guard
// that counts nothing must not look like one that found nothing.
export async function checkPaths(program, wanted, each) {
  const result = { passed: 0, failed: 0, skipped: 0, output: '', remarks: [] };
  const skip = (reason) => {
    if (process.env.CI === 'true') {
      result.failed += 1;
      result.output += `${reason}: ${remedy(reason)}\n`;
    } else {
      result.skipped += 1;
      result.remarks.push(`SKIP: ${reason}`);
    }
  };
  if (spawnSync('valgrind', ['--version']).status !== 0) {
    skip('no valgrind: instructions are not counted');
    return result;
  }
  const budgets = readBudgets();
  const dir = mkdtempSync(join(root, 'build', 'instructions-'));
  await each(wanted, async (path) => {
    const measured = await measure(program, path, dir);
    if (measured.skip) return skip(`${path}: ${measured.skip}`);
    const { failed, note } = measured.problem
      ? { failed: `${path}: ${measured.problem}` }
      : judge(path, measured, budgets);
    if (note) result.remarks.push(`NOTE: ${note}`);
    if (failed) result.output += `${failed}\n`;
    result[failed ? 'failed' : 'passed'] += 1;
  });
  rmSync(dir, { recursive: true });
  return result;
}

// ---- the command line ----

function print(path, measured) {
  const { instructions, copies, functions, copied } = measured;
  console.log(`${path}: ${instructions.toFixed(1)} instructions, ${copies.toFixed(2)} copies`);
  for (const [name, n] of top(functions, 40)) console.log(`  ${n.toFixed(1).padStart(8)}  ${name}`);
  for (const [name, n] of top(copied, 20)) console.log(`  ${n.toFixed(2).padStart(8)}  ${name}`);
}

// The figures of now become the budgets of the paths measured.
function record(results) {
  const budgets = existsSync(budgetFile) ? readBudgets() : { margin: 0.03, other_margin: 0.3 };
  const old = budgets.paths ?? {};
  budgets.paths = {};
  for (const path of paths.keys()) {
    const measured = results.get(path);
    if (!measured) {
      if (old[path]) budgets.paths[path] = old[path];
      continue;
    }
    budgets.compiler = measured.facts.compiler;
    budgets.libc = measured.facts.libc;
    budgets.paths[path] = {
      instructions: Number(measured.instructions.toFixed(1)),
      copies: Number(measured.copies.toFixed(2)),
      functions: Object.fromEntries(
        top(measured.functions, functionsKept).map(([name, n]) => [name, Number(n.toFixed(1))]),
      ),
    };
  }
  writeFileSync(budgetFile, `${JSON.stringify(budgets, null, 2)}\n`);
}

async function main(args) {
  const program = join(root, 'build', 'release', 'bench_hotpath');
  const recording = args[0] === '--record';
  const wanted = args.filter((arg) => arg !== '--record');
  for (const path of wanted) {
    if (!paths.has(path))
      throw new Error(`there is no path '${path}'; ${[...paths.keys()].join(', ')}`);
  }
  const built = spawnSync('cmake', ['--build', dirname(program), '--target', basename(program)], {
    stdio: 'inherit',
  });
  if (built.status !== 0) throw new Error('bench_hotpath cannot be built');
  const dir = mkdtempSync(join(root, 'build', 'instructions-'));
  const results = new Map();
  for (const path of wanted.length > 0 ? wanted : paths.keys()) {
    const measured = await measure(program, path, dir);
    const problem = measured.problem ?? measured.skip;
    if (problem) throw new Error(`${path}: ${problem}`);
    results.set(path, measured);
    print(path, measured);
  }
  rmSync(dir, { recursive: true });
  if (recording) return record(results);
  const verdicts = [...results].map(([path, measured]) => judge(path, measured, readBudgets()));
  for (const { failed, note } of verdicts) console.log(failed || note || 'within its budget');
  if (verdicts.some(({ failed }) => failed)) process.exitCode = 1;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await main(process.argv.slice(2));
