// What a run of `pqblk` loads before it does anything: files, packages and parts of Node. Loading is
// most of the time that a short command takes, and counting it needs no clock.
import { spawnSync } from 'node:child_process';
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { MAIN, program, scratch } from './helpers.js';

const directory = scratch();
const store = join(directory, 'keys');
const disk = join(directory, 'vm.sealed');

/** The files that one run of the built program loaded, as V8 counts them. */
function loaded(...argv: string[]): string[] {
  const coverage = mkdtempSync(join(directory, 'coverage-'));
  const env = { ...process.env, NODE_V8_COVERAGE: coverage, PQBLK_KEYS: store };
  const { status, stderr } = spawnSync(process.execPath, [MAIN, ...argv], {
    encoding: 'utf8',
    env,
  });
  expect(stderr).toBe('');
  expect(status).toBe(0);
  const urls = readdirSync(coverage).flatMap((file) => {
    const report = JSON.parse(readFileSync(join(coverage, file), 'utf8')) as {
      result: { url: string }[];
    };
    return report.result.map(({ url }) => url);
  });
  return urls.filter((url) => url.startsWith('file:')).map((url) => fileURLToPath(url));
}

const isOurs = (file: string) => !file.includes('node_modules');
const names = (files: readonly string[]) => files.map((file) => basename(file)).sort();

/** The parts of Node that these files import at once. */
function parts(files: readonly string[]): Set<string> {
  const imports = files.flatMap((file) => [
    ...readFileSync(file, 'utf8').matchAll(/^\w.* = require\(["']node:([a-z_/]+)["']\);?$/gm),
  ]);
  return new Set(imports.map((match) => match[1] as string));
}

test('--version loads the command line and no command', () => {
  const files = loaded('--version');
  expect(names(files)).toEqual([
    ...['main.cjs', 'program.cjs', 'rolldown-runtime.cjs', 'start.cjs'],
  ]);
  const own = ['crypto', 'vm']; // the launcher's
  expect([...parts(files)].sort()).toEqual([...own, 'fs', 'module', 'path', 'url', 'util'].sort());
});

/** Whether V8 took the bytecode of each file that `--version` loads. */
function accepted(main: string): Record<string, boolean | undefined> {
  const code = `const { load, acceptedBytecode } = require(${JSON.stringify(main)});
    process.argv = ['node', 'pqblk', '--version'];
    process.on('exit', () => console.log(JSON.stringify(Object.fromEntries(acceptedBytecode()))));
    load('./program.cjs');`;
  const { stdout, stderr, status } = spawnSync(process.execPath, ['-e', code], {
    encoding: 'utf8',
  });
  expect({ stderr, status }).toEqual({ stderr: '', status: 0 });
  const [version, ...rest] = stdout.trim().split('\n');
  expect(version).toMatch(/^\d+\.\d+\.\d+$/);
  return JSON.parse(rest.join(''));
}

test('the bytecode is used, and done without where it is not whole or of another text', () => {
  const all = { 'program.cjs': true, 'rolldown-runtime.cjs': true, 'start.cjs': true };
  expect(accepted(MAIN)).toEqual(all);

  const copy = join(directory, 'copy', 'cli');
  cpSync(dirname(MAIN), copy, { recursive: true });
  cpSync(join(dirname(MAIN), '../../package.json'), join(directory, 'copy', 'package.json'));
  const main = join(copy, basename(MAIN));
  const start = join(copy, 'start.cjs');
  const bytecode = readFileSync(`${start}.bytecode`);
  expect(accepted(main)).toEqual(all);

  // V8 itself ends the process on most of these.
  for (const [what, damaged] of Object.entries({
    empty: Buffer.alloc(0),
    short: bytecode.subarray(0, -1),
    flipped: Buffer.from(bytecode).fill((bytecode[5000] ?? 0) ^ 1, 5000, 5001),
    foreign: readFileSync(join(copy, 'program.cjs.bytecode')),
  })) {
    writeFileSync(`${start}.bytecode`, damaged);
    expect(accepted(main), what).toEqual({ ...all, 'start.cjs': undefined });
  }
  writeFileSync(`${start}.bytecode`, bytecode);
  const text = readFileSync(start, 'utf8');
  writeFileSync(start, text.replace('unknown option', 'UNKNOWN option')); // as long as before: V8 compares that
  expect(accepted(main)).toEqual({ ...all, 'start.cjs': undefined });
  rmSync(`${start}.bytecode`);
  expect(accepted(main)).toEqual({ ...all, 'start.cjs': undefined });
});

/** What of Node is in the process when `argv` has been done, asked of the process itself. */
function inside(...argv: string[]): string[] {
  const list = join(directory, 'list.txt');
  const hook = join(directory, 'hook.cjs');
  writeFileSync(
    hook,
    `process.on('exit', () => require('node:fs').writeFileSync(${JSON.stringify(list)},
      process.moduleLoadList.join('\\n')));`,
  );
  const env = { ...process.env, PQBLK_KEYS: store };
  const args = ['--require', hook, MAIN, ...argv];
  const { status, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8', env });
  expect(stderr).toBe('');
  expect(status).toBe(0);
  return readFileSync(list, 'utf8').split('\n');
}

test('a change of keys loads few files, liboqs, and nothing that it does not use', () => {
  const made = [
    ['key', 'gen', 'alice', '--no-passphrase', '--store', store],
    ['create', disk, '64M', '--key', 'alice', '--store', store],
  ].map((argv) => program(...argv));
  expect(made.map(({ code, stderr }) => ({ code, stderr }))).toEqual([
    { code: 0, stderr: '' },
    { code: 0, stderr: '' },
  ]);

  for (const argv of [
    ['rewrap', disk],
    ['rotate-master-key', disk],
  ]) {
    const files = loaded(...argv, '--key', 'alice', '--json');
    const ours = files.filter(isOurs);
    expect(ours.length, names(ours).join(' ')).toBeLessThanOrEqual(7);
    expect(names(files.filter((file) => !isOurs(file)))).toEqual(['ml-kem-768.min.js']);
    const heavy = ['child_process', 'dgram', 'http', 'https', 'tls', 'worker_threads'];
    expect(heavy.filter((name) => parts(ours).has(name))).toEqual([]);
    // What packages and globals bring in counts as well.
    const builtins = new Set(inside(...argv, '--key', 'alice', '--json'));
    expect(builtins).toContain('NativeModule fs');
    const never = [...heavy, 'perf_hooks'].map((name) => `NativeModule ${name}`);
    expect(never.filter((name) => builtins.has(name))).toEqual([]);
  }
});

test('the help still names every command', () => {
  const { stdout } = program('--help');
  for (const name of ['key', 'create', 'rewrap', 'fleet', 'serve', 'exit-codes']) {
    expect(stdout).toMatch(new RegExp(`^  ${name}\\b`, 'm'));
  }
});
