// The report of a run that is written down here: what it shows, and that it needs nothing else.
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
import { scratch } from '../node/support.js';

const lib = (name: string) =>
  import(fileURLToPath(new URL(`../../bench/lib/${name}.mjs`, import.meta.url)));
const { summarise } = await lib('stats');
const { readReport, writableDirectory, writeReportOf, writeResults } = await lib('files');
const { percentiles } = await lib('plots');
const { htmlReport } = await lib('report');
const { markdownFigures, markdownRows } = await lib('markdown');

const row = (name: string, samples: number[][], detail: object = {}, xs: number[] = []) => ({
  name,
  commands: [`measure --of '${name}'`],
  points: samples.map((values, i) => ({
    ...(xs.length > 0 && { x: xs[i] }),
    samples: values,
    details: values.map(() => detail),
  })),
});

function run() {
  const latency = { p50: 80, p90: 110, p99: 300, p99_9: 1200 };
  const plain = {
    ...{ set: 'engine', group: 'reads <fast>', about: 'A & B', unit: 'IOPS', base: 'peer' },
    rows: [
      row('peer', [[400_000, 410_000, 390_000]], latency),
      row('pqblk', [[420_000, 430_000, 370_000]], latency),
      { name: 'gone', missing: 'gone not installed', commands: [], points: [{ samples: [] }] },
      { ...row('frail', [[90_000]], latency), missing: 'failed: a | b\nc', failed: true },
    ],
    targets: [
      { name: 'pqblk', to: 'peer', atLeast: 1 },
      { name: 'pqblk', to: 'peer', atLeast: 1.5 },
      { name: 'gone', to: 'peer', atLeast: 1 },
    ],
  };
  const depths = [1, 8, 32];
  const series = {
    ...{ set: 'engine', group: 'over depth', unit: 'IOPS', x: { name: 'depth', values: depths } },
    rows: [
      row('pqblk', [[10_000], [70_000], [200_000]], { p50: 90, p99: 250 }, depths),
      { ...row('shy', [[11_000], [], []], {}, depths), missing: 'failed: no depth', failed: true },
    ],
    targets: [
      { name: 'pqblk', atLeast: 60_000, x: 8 },
      { name: 'pqblk', to: 'shy', atLeast: 0.9, x: 1 },
    ],
  };
  const groups = [plain, series];
  for (const group of groups) for (const each of group.rows) each.points.forEach(fillIn);
  return {
    ...{ started: '2026-01-02T03:04:05.678Z', command: 'node bench/run.mjs', interrupted: true },
    ...{ settings: { rounds: 3, seconds: 1 }, loadBefore: 0.1, loadAfter: 0.2, broken: [] },
    machine: {
      ...{ cpu: 'A Processor', cores: 2, flags: ['aes'], memoryBytes: 2 ** 34, kernel: '6.1' },
      ...{ places: { disk: { fileSystem: 'ext4', source: '/dev/sda' } }, commit: 'c0ffee' },
      versions: { node: '20.19.0' },
    },
    groups: groups.map(summarise),
  };
}

function fillIn(point: { details?: unknown[] }) {
  point.details ??= [];
}

it('shows figures, plots, verdicts, commands and the machine', () => {
  const html: string = htmlReport(run());
  for (const text of [
    'A Processor',
    'c0ffee',
    'reads &lt;fast&gt;',
    'A &amp; B',
    'gone not installed',
    'This run was interrupted',
    "measure --of 'pqblk'",
    'scratch files of the run are gone',
    '<td>420k</td>',
    '<td>× 1.05</td>',
    '1.05 (0.95–1.05)',
    '>met<',
    '>MISSED<',
    '>missing<',
    '<td>90k</td>',
    'failed: a | b',
    '<td>11k</td><td>–</td>',
    'failed: no depth',
  ]) {
    expect(html).toContain(text);
  }
  // Bars and percentiles of the one group, lines of the other.
  expect(html.match(/<svg class="plot"/g)).toHaveLength(3);
  expect(html).toContain('p99.9');
  // Percentiles in the tables: all of a group, the slowest of a series.
  expect(html).toContain('<td>80.0</td><td>110</td><td>300</td><td>1200</td>');
  expect(html).toContain('<td class="dim">250</td>');
  // Diamonds: two targets of the group (one names a row without figures), two of the series.
  expect(html.match(/fill="#ffd23f"/g)).toHaveLength(4);
});

it('is made again beside its JSON, whatever that is called', () => {
  const text = JSON.stringify({ pqblkBench: 1, ...run() });
  for (const name of ['a.json', 'plain', 'page.html', 'a.JSON']) {
    const path = join(scratch(), name);
    writeFileSync(path, text);
    const html = writeReportOf(path);
    expect(readFileSync(path, 'utf8')).toBe(text);
    expect(readFileSync(html, 'utf8')).toMatch(/^<!doctype html>/);
    expect(dirname(html)).toBe(dirname(path));
  }
});

it.each([
  ['no JSON', 'no JSON'],
  ['{}', 'JSON without "pqblkBench": 1'],
  ['null', 'JSON without "pqblkBench": 1'],
  ['{ "pqblkBench": 2 }', '"pqblkBench": 2'],
  ['{ "pqblkBench": 1 }', 'no list of groups'],
])('is not made of %s', (text, found) => {
  const path = join(scratch(), 'report.json');
  writeFileSync(path, text);
  const message = `${path}: expected the JSON that a run wrote, found ${found}`;
  expect(() => readReport(path)).toThrow(message);
});

it('goes to a directory that was tried, with parents made one at a time', () => {
  const dir = scratch();
  const file = join(dir, 'file');
  writeFileSync(file, '');
  expect(writableDirectory('--out', join(dir, 'a', 'b'))).toBe(join(dir, 'a', 'b'));
  expect(readdirSync(join(dir, 'a', 'b'))).toEqual([]);
  // Below /proc nothing can be made, and mkdir's `recursive` tries for ever.
  for (const path of ['/proc/x', '/proc/x/y', file, join(file, 'below')]) {
    const message = `--out ${path}: expected a directory that can be written to`;
    expect(() => writableDirectory('--out', path)).toThrow(message);
  }
});

it('goes to the temporary directory when its own is gone', () => {
  const out = join(scratch(), 'gone');
  const { json, html, refused } = writeResults(out, run());
  expect(refused).toContain('ENOENT');
  expect(JSON.parse(readFileSync(json, 'utf8')).command).toBe('node bench/run.mjs');
  expect(readFileSync(html, 'utf8')).toMatch(/^<!doctype html>/);
  expect(json.startsWith(tmpdir())).toBe(true);
  rmSync(dirname(json), { recursive: true });
});

it('draws percentiles only where all of them were measured', () => {
  const plain = run().groups[0] as { rows: { points: { detail?: { p90?: number } }[] }[] };
  expect(percentiles(plain)).toContain('<svg');
  for (const { points } of plain.rows) for (const { detail } of points) delete detail?.p90;
  expect(percentiles(plain)).toBe('');
});

it('stands alone: no script, nothing to fetch', () => {
  const html: string = htmlReport(run());
  expect(html).not.toMatch(/<script|<link|<img|@import|url\(http/i);
  // Addresses name SVG's vocabularies and nothing else.
  const addresses = html.match(/https?:\/\/[^"'\s<)]+/g) ?? [];
  expect(addresses.filter((address) => !address.startsWith('http://www.w3.org/'))).toEqual([]);
});

it('gives the targets as rows of Markdown', () => {
  expect(markdownRows(run()).slice(2)).toEqual([
    '| engine, reads <fast>: pqblk / peer | 1.05 (0.95–1.05), open | ≥ 1 | met |',
    '| engine, reads <fast>: pqblk / peer | 1.05 (0.95–1.05) | ≥ 1.5 | MISSED |',
    '| engine, reads <fast>: gone / peer | gone: gone not installed | ≥ 1 | missing |',
    '| engine, over depth: pqblk at 8 | 70k (70k–70k) | ≥ 60k IOPS | met |',
    '| engine, over depth: pqblk / shy at 1 | shy: failed: no depth | ≥ 0.9 | missing |',
  ]);
});

it('gives all figures as tables of Markdown', () => {
  const lines: string[] = markdownFigures(run());
  expect(lines).toContain('| pqblk | 420k | 370k | 430k | 1.05 |');
  expect(lines).toContain('| gone | gone not installed |');
  expect(lines).toContain('| frail | 90k | 90k | 90k | 0.23 |');
  expect(lines).toContain('| | failed: a \\| b c |');
  expect(lines).toContain('| shy | 11k | – | – |');
  expect(lines).toContain('| | 1 | 8 | 32 |');
  expect(lines).toContain('| pqblk | 10k | 70k | 200k |');
});
