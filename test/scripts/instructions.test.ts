// The guard that counts instructions, without valgrind: a callgrind file written here by hand, whose
// sums are done in the comments, and verdicts on each side of every bound.
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
// @ts-expect-error: JavaScript without declarations
import { checkPaths, judge, parseCallgrind, summarise } from '../../scripts/instructions.mjs';

// Two requests. Names are said once and numbered, objects have numbers of their own, lines are
// relative or not, and inlined code comes from another file: as callgrind writes them.
const CALLGRIND = `# callgrind format
version: 1
creator: by hand
pid: 1
cmd: bench_hotpath count raw-read
positions: line
events: Ir
summary: 9999

ob=(1) /build/release/bench_hotpath
fl=(1) native/image/raw_backend.cc
fn=(1) pqblk::image::RawBackend::read(std::vector<pqblk::Buffer>) [clone .actor]
10 60
+2 40
fi=(2) native/base/task.h
* 20
fe=(1)
cfi=(3) native/io/queue.cc
cfn=(2) pqblk::io::Queue::read(unsigned int)
calls=2 30
+1 500
cob=(2) /usr/lib/libc.so.6
cfn=(3) __memcpy_avx_unaligned
calls=4 0
-1 400
cob=(2)
cfn=(4) clock_gettime
calls=2 0
14 50
cfn=(5) pqblk::crypto::seal(void*)
calls=2 0
15 8000

fn=(2)
30 100

fn=(5)
40 8000

fn=(6) pqblk::test::run()
50 700
cfn=(1)
calls=2 10
51 9170

ob=(2)
fn=(3)
0 400

fn=(4)
0 50
`;

describe('parseCallgrind and summarise', () => {
  const rows = parseCallgrind(CALLGRIND);
  const row = (name: string) => rows.find((one: { name: string }) => one.name.includes(name));

  it('tell what a function did from what it called', () => {
    expect(rows).toHaveLength(6);
    expect(row('RawBackend::read')?.self).toBe(60 + 40 + 20);
    expect(row('memcpy')).toMatchObject({ object: '/usr/lib/libc.so.6', self: 400 });
    const calls = [...(row('RawBackend::read')?.calls ?? [])].map(([{ name }, call]) => [
      name,
      call,
    ]);
    expect(calls).toEqual([
      ['pqblk::io::Queue::read(unsigned int)', { count: 2, cost: 500 }],
      ['__memcpy_avx_unaligned', { count: 4, cost: 400 }],
      ['clock_gettime', { count: 2, cost: 50 }],
      ['pqblk::crypto::seal(void*)', { count: 2, cost: 8000 }],
    ]);
  });

  it('count the engine and its libraries: no cipher, no copying, no test', () => {
    const found = summarise(rows, 'bench_hotpath', 2);
    expect(found.instructions).toBe((120 + 100 + 50) / 2);
    expect(found.copies).toBe(4 / 2);
    expect(found.functions).toEqual({
      'image::RawBackend::read [actor]': 60,
      'io::Queue::read': 50,
      'clock_gettime (library)': 25,
    });
    expect(found.copied).toEqual({ 'image::RawBackend::read [actor] > __memcpy_avx_unaligned': 2 });
  });
});

describe('judge', () => {
  const budgets = {
    ...{ margin: 0.03, other_margin: 0.3, compiler: '14', libc: '2.41' },
    paths: { 'raw-read': { instructions: 1000, copies: 1, functions: { a: 600, b: 400 } } },
  };
  const verdict = (b: number, { copies = 1, compiler = '14', libc = '2.41' } = {}) =>
    judge(
      'raw-read',
      { instructions: 600 + b, copies, functions: { a: 600, b }, facts: { compiler, libc } },
      budgets,
    );

  it('says nothing within the budget and its margin', () => {
    for (const b of [400, 430, 301]) expect(verdict(b)).toEqual({ failed: '', note: '' });
  });

  it('fails beyond the margin, and names what grew and nothing else', () => {
    const { failed } = verdict(431);
    expect(failed).toContain('raw-read: 1031.0 instructions');
    expect(failed).toContain('3 % allowed');
    expect(failed).toContain('31.0 more: 400.0 -> 431.0  b');
    expect(failed).not.toContain('  a');
  });

  it('fails one copy more', () => {
    expect(verdict(400, { copies: 2 }).failed).toContain('2.00 copies');
    expect(verdict(400, { copies: 1.5 }).failed).toBe('');
  });

  it('remarks on what became more than a tenth cheaper', () => {
    const { failed, note } = verdict(299);
    expect(failed).toBe('');
    expect(note).toContain('--record raw-read');
  });

  it.each([{ compiler: '15' }, { libc: '2.42' }])('allows more to %j, and says so', (other) => {
    const { failed, note } = verdict(700, other);
    expect(failed).toBe('');
    expect(note).toContain('30 % allowed (recorded with g++ 14, glibc 2.41');
    expect(verdict(701, other).failed).toContain('301.0 more');
    expect(verdict(100, other).note).not.toContain('--record'); // another compiler's thrift
  });

  it('fails a path without a budget', () => {
    const measured = { instructions: 1, copies: 0, functions: {}, facts: {} };
    expect(judge('new-path', measured, budgets).failed).toContain('new-path has no budget');
  });
});

describe('what cannot be counted', () => {
  let bin: string;
  beforeEach(() => {
    bin = mkdtempSync(join(tmpdir(), 'pqblk-instructions-'));
    mkdirSync(fileURLToPath(new URL('../../build', import.meta.url)), { recursive: true });
    vi.stubEnv('PATH', bin);
  });
  afterEach(() => {
    vi.unstubAllEnvs();
    rmSync(bin, { recursive: true });
  });

  const command = (name: string, does: string) => {
    writeFileSync(join(bin, name), `#!/bin/sh\n${does}\n`, { mode: 0o755 });
    return join(bin, name);
  };
  const check = (ci: string, program: string) => {
    vi.stubEnv('CI', ci);
    return checkPaths(
      program,
      ['raw-read'],
      async (paths: string[], act: (path: string) => Promise<void>) => {
        for (const path of paths) await act(path);
      },
    );
  };

  it('is a skip at home and a failure in CI, without valgrind', async () => {
    const reason = 'no valgrind: instructions are not counted';
    const home = await check('', '/nowhere');
    expect(home).toMatchObject({ passed: 0, failed: 0, skipped: 1, remarks: [`SKIP: ${reason}`] });
    const ci = await check('true', '/nowhere');
    expect(ci).toMatchObject({ passed: 0, failed: 1, skipped: 0, remarks: [] });
    expect(ci.output).toContain(`${reason}: install valgrind`);
  });

  it.each([
    ["bench_hotpath was built without valgrind's header", 'remove build/release'],
    ['the image would be in memory, which has a path of its own', 'on a disk'],
  ])('the same when the program says: %s', async (reason, remedy) => {
    command('valgrind', 'exit 0');
    const program = command('bench_hotpath', `echo "{\\"skip\\": \\"${reason}\\"}"`);
    const home = await check('', program);
    expect(home).toMatchObject({ failed: 0, skipped: 1, remarks: [`SKIP: raw-read: ${reason}`] });
    const ci = await check('true', program);
    expect(ci).toMatchObject({ failed: 1, skipped: 0 });
    expect(ci.output).toContain(`raw-read: ${reason}: `);
    expect(ci.output).toContain(remedy);
  });
});
