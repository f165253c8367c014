// The smallest set, run for real: what it writes, what it leaves behind, and what Ctrl-C does.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
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

it('refuses a path or a report that it cannot use, before it measures, in one line', async () => {
  const { out, disk } = scratch();
  const cases = [
    [['--out', '/proc/x', '--disk', disk], 'a directory that can be written to'],
    [['--out', out, '--disk', '/proc/x'], 'a directory that can be written to'],
    [['--report', join(out, 'none')], 'the JSON that a run wrote'],
    [['--table', PROGRAM], 'the JSON that a run wrote'],
    [['--figures', PROGRAM], 'the JSON that a run wrote'],
  ] as const;
  for (const [args, expected] of cases) {
    const run = start('--quick', ...args, 'flush');
    expect((await run.ended)[0]).toBe(1);
    expect(run.output()).toMatch(/^bench: [^\n]+: expected [^\n]+\n$/);
    expect(run.output()).toContain(`expected ${expected}`);
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
