// The smallest set, run for real: what it writes, what it leaves behind, and what Ctrl-C does.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, expect, it } from 'vitest';

const LIMIT_MS = 180_000; // a busy machine, a slow disk
const PROGRAM = fileURLToPath(new URL('../../bench/run.mjs', import.meta.url));
const directories: string[] = [];

afterEach(() => {
  for (const path of directories.splice(0)) rmSync(path, { recursive: true, force: true });
});

function scratch() {
  const path = mkdtempSync(join(tmpdir(), 'pqblk-bench-test-'));
  directories.push(path);
  return { out: join(path, 'out'), disk: join(path, 'disk') };
}

function start(...args: string[]) {
  const child = spawn(process.execPath, [PROGRAM, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text;
    });
  }
  return { child, output: () => output, ended: once(child, 'close') };
}

function written(out: string) {
  const files = readdirSync(out).sort();
  expect(files.map((name) => name.split('.').at(-1))).toEqual(['html', 'json']);
  return JSON.parse(readFileSync(join(out, files[1] as string), 'utf8'));
}

it(
  'measures a set and leaves nothing but its results',
  async () => {
    const { out, disk } = scratch();
    const sizes = ['--rounds', '2', '--seconds', '0.05'];
    const run = start('--quick', ...sizes, '--out', out, '--disk', disk, 'flush');
    const [code] = await run.ended;
    expect(code, run.output()).toBe(0);
    const result = written(out);
    expect(result).toMatchObject({ interrupted: false, settings: { rounds: 2, sets: ['flush'] } });
    expect(result.groups).toHaveLength(2);
    for (const { rows, targets } of result.groups) {
      const sealed = rows.at(-1);
      expect(sealed.name).toBe('pqblk sealed');
      expect(sealed.points[0].samples).toHaveLength(2);
      expect(sealed.points[0].median).toBeGreaterThan(0);
      // One line for both rounds, whose seeds differ.
      expect(sealed.commands).toHaveLength(1);
      expect(sealed.commands[0]).toMatch(/^pqblk bench .* --key bench .*--fdatasync 1 --seed \d+$/);
      expect(targets[0]).toHaveProperty('found');
    }
    expect(run.output()).toMatch(/Targets\n.*(met|MISSED) /);
    expect(readdirSync(disk)).toEqual([]);
  },
  LIMIT_MS,
);

it(
  'stops at Ctrl-C, writes what there is, and cleans up',
  async () => {
    const { out, disk } = scratch();
    const sizes = ['--rounds', '1000', '--seconds', '0.05'];
    const run = start('--quick', ...sizes, '--out', out, '--disk', disk, 'flush');
    let sent = false;
    run.child.stderr.on('data', () => {
      if (sent || !run.output().includes('disks in RAM')) return;
      sent = run.child.kill('SIGINT'); // once: a second one would not wait for anything
    });
    const [code] = await run.ended;
    expect(code, run.output()).toBe(130);
    expect(written(out)).toMatchObject({ interrupted: true });
    expect(readdirSync(disk)).toEqual([]);
  },
  LIMIT_MS,
);

it.each(['--out', '--disk'])(
  'refuses %s that cannot be written to before it measures',
  async (name) => {
    const { out, disk } = scratch();
    const file = `${out}-file`;
    writeFileSync(file, '');
    // Below /proc nothing can be made, and mkdir's `recursive` tries for ever.
    for (const path of ['/proc/x', '/proc/x/y', file, join(file, 'below')]) {
      const others = { '--out': out, '--disk': disk, [name]: path };
      const run = start('--quick', ...Object.entries(others).flat(), 'flush');
      expect((await run.ended)[0]).toBe(1);
      expect(run.output()).toMatch(/^bench: --\w+ \S+: expected a directory that can be [^\n]*\n$/);
      expect(run.output()).toContain(`${name} ${path}`);
    }
  },
);

it.each(['--report', '--table', '--figures'])('%s refuses what is no report', async (option) => {
  const { out } = scratch();
  for (const [text, found] of [
    [undefined, 'ENOENT'],
    ['no JSON', 'no JSON'],
    ['{}', 'JSON without "pqblkBench": 1'],
    ['null', 'JSON without "pqblkBench": 1'],
    ['{ "pqblkBench": 2 }', '"pqblkBench": 2'],
    ['{ "pqblkBench": 1 }', 'no list of groups'],
  ] as const) {
    const file = `${out}.json`;
    if (text !== undefined) writeFileSync(file, text);
    const run = start(option, file);
    expect((await run.ended)[0]).toBe(1);
    expect(run.output()).toMatch(
      /^bench: \S+: expected the JSON that a run wrote, found [^\n]*\n$/,
    );
    expect(run.output()).toContain(found);
    rmSync(file, { force: true });
  }
});

it('names the sets, and refuses one that is none', async () => {
  const list = start('--list');
  expect((await list.ended)[0]).toBe(0);
  for (const name of ['crypto', 'engine', 'flush', 'export']) expect(list.output()).toContain(name);
  const wrong = start('nope');
  expect((await wrong.ended)[0]).toBe(1);
  expect(wrong.output()).toContain('no such set: nope');
});
