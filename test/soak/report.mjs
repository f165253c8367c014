// What a soak did and found: report.json for programs, report.md and memory.svg for people.
import { appendFileSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/**
 * Of all that a process may hold more at the end than in its first third, and for how long it has to
 * run before that says anything. A leak shows sooner by its slope, when it has run `slopeSeconds`: it
 * grows in both halves of the time. What reaches a high mark of its own, and stays, grows in one: a
 * server was seen to go from 215 to 228 MiB after 37 minutes, and no further. Growth of less than
 * `slopeLeastKiB` in all is nothing: what garbage and freed pages come to.
 */
export const BOUNDS = {
  ...{ residentKiB: 24 * 1024, descriptors: 2, threads: 1, seconds: 300 },
  ...{ kibPerHour: 24 * 1024, slopeLeastKiB: 8 * 1024, slopeSeconds: 1200 },
};
const WARM_UP = 0.2; // heaps, pools and tables reach their size

const median = (numbers) => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)];

/** KiB an hour, by least squares. */
function slopePerHour(points) {
  const n = points.length;
  if (n === 0) return 0;
  const mean = (pick) => points.reduce((sum, point) => sum + pick(point), 0) / n;
  const [x, y] = [mean((p) => p.now), mean((p) => p.residentKiB)];
  const above = points.reduce((sum, p) => sum + (p.now - x) * (p.residentKiB - y), 0);
  const below = points.reduce((sum, p) => sum + (p.now - x) ** 2, 0);
  return below > 0 ? (above / below) * 3600 : 0;
}

/**
 * How resident memory grows over points that are after the warm-up: KiB an hour of the whole and of both
 * halves of the time, and whether that is a leak's way.
 */
export function judgeSlope(points) {
  const [first, last] = [points[0].now, points.at(-1).now];
  const middle = (first + last) / 2;
  const halves = [
    points.filter(({ now }) => now <= middle),
    points.filter(({ now }) => now > middle),
  ];
  const [whole, ...each] = [points, ...halves].map(slopePerHour);
  const leaks =
    Math.min(whole, ...each) > BOUNDS.kibPerHour &&
    (whole * (last - first)) / 3600 >= BOUNDS.slopeLeastKiB;
  return { kibPerHour: Math.round(whole), halves: each.map(Math.round), leaks };
}

/** What each process of the steady disk held, first and last third after the warm-up. */
export function judgeMemory(samples) {
  const names = [...new Set(samples.map(({ name }) => name))];
  return names.map((name) => {
    const all = samples.filter((sample) => sample.name === name);
    const [first, last] = [all[0].now, all.at(-1).now];
    const begin = first + (last - first) * WARM_UP;
    const third = (last - begin) / 3;
    const early = all.filter(({ now }) => now >= begin && now < begin + third);
    const late = all.filter(({ now }) => now > last - third);
    const seconds = Math.round(last - first);
    const of = (some, what) => median(some.map((sample) => sample[what])) ?? 0;
    const fact = { name, seconds, samples: all.length, problems: [] };
    for (const what of ['residentKiB', 'descriptors', 'threads']) {
      fact[what] = [of(early, what), of(late, what)];
      const grown = fact[what][1] - fact[what][0];
      if (seconds < BOUNDS.seconds || grown <= BOUNDS[what]) continue;
      fact.problems.push(`${name} holds ${grown} ${what} more in its last third than in its first`);
    }
    const { leaks, ...slope } = judgeSlope(all.filter(({ now }) => now >= begin));
    if (leaks && seconds >= BOUNDS.slopeSeconds) {
      const much = `${slope.kibPerHour} KiB an hour, ${slope.halves.join(' and ')} in the halves`;
      fact.problems.push(`${name} grows all the time: ${much}`);
    }
    return { ...fact, ...slope };
  });
}

const COLOURS = ['#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#8c564b', '#17becf'];

export function plot(samples) {
  const [width, height, left, low] = [900, 320, 60, 280];
  const end = Math.max(1, ...samples.map(({ now }) => now));
  const top = Math.max(1, ...samples.map(({ residentKiB }) => residentKiB / 1024)) * 1.1;
  const x = (now) => (left + (now / end) * (width - left - 150)).toFixed(1);
  const y = (mib) => (low - (mib / top) * (low - 20)).toFixed(1);
  const lines = [...new Set(samples.map(({ name }) => name))].map((name, i) => {
    const colour = COLOURS[i % COLOURS.length];
    const points = samples
      .filter((sample) => sample.name === name)
      .map(({ now, residentKiB }) => `${x(now)},${y(residentKiB / 1024)}`);
    const label = `<text x="${width - 140}" y="${40 + 18 * i}" fill="${colour}">${name}</text>`;
    return `<polyline fill="none" stroke="${colour}" points="${points.join(' ')}"/>${label}`;
  });
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
    const mib = `<text x="4" y="${y(top * part)}">${Math.round(top * part)} MiB</text>`;
    const minutes = ((end * part) / 60).toFixed(1);
    return `${mib}<text x="${x(end * part)}" y="${low + 20}">${minutes} min</text>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="white"/>
<path d="M${left} 20V${low}H${width - 150}" stroke="#888" fill="none"/>
${[...ticks, ...lines].join('\n')}
</svg>
`;
}

const table = (head, rows) =>
  [head, head.map(() => '---'), ...rows].map((row) => `| ${row.join(' | ')} |`).join('\n');
const number = (n) => Math.round(n ?? 0).toLocaleString('en-US');

function sumOf(objects) {
  const sum = {};
  for (const object of objects) {
    for (const [name, n] of Object.entries(object)) sum[name] = (sum[name] ?? 0) + n;
  }
  return sum;
}

/** Adds up what the episodes did. */
export function totals(episodes) {
  return {
    operations: sumOf(episodes.map(({ operations }) => operations)),
    events: sumOf(episodes.map(({ counts }) => counts.events)),
    counts: sumOf(episodes.map(({ counts: { events: _, ...counts } }) => counts)),
  };
}

const bytes = (n) => (n < 2 ** 20 ? `${n / 2 ** 10}K` : `${n / 2 ** 20}M`);

/** What a disk was, in a few words. */
export function describe(s) {
  const {
    l2CacheBytes: l2,
    entryCacheBytes: entry,
    pendingDataBytes: pending,
  } = s.cacheBytes ?? {};
  const words = [s.format, s.suite, s.cluster, s.place, s.engine, s.cache, `${s.queues} queues`];
  if (l2) words.push(`L2 cache ${bytes(l2)}`);
  if (entry) words.push(`entry cache ${bytes(entry)}`);
  if (pending) words.push(`pending ${bytes(pending)}`);
  return words.filter(Boolean).join(', ');
}

function markdown({ seed, minutes, began, ended, episodes, memory, failures, skipped, parts }) {
  const { operations: o, events, counts } = totals(episodes);
  return `# Soak of ${began}

Seed ${seed}; ${minutes} minutes were asked for, ${Math.round(ended)} s were run.
**${failures.length === 0 ? 'Nothing was wrong.' : `${failures.length} failures.`}**

${failures.map(({ what, replay }) => `- ${what}\n  \n  replay: \`${replay}\`\n`).join('')}
${skipped.map((reason) => `- SKIP: ${reason}\n`).join('')}
## Requests

${table(
  ['reads', 'writes', 'flushes', 'discards', 'zeroes', 'read MiB', 'written MiB'],
  [
    [
      ...[o.reads, o.writes, o.flushes, o.discards, o.zeroes].map(number),
      ...[o.readBytes, o.writtenBytes].map((bytes) => number(bytes / 2 ** 20)),
    ],
  ],
)}

${number(o.verified)} sectors (or smaller parts) were compared as clients read them, ${number(counts.cells)} in
${number(counts.looks)} looks at a whole disk. ${number(o.refused)} requests failed where they might (full file
system), ${number(o.unknown)} were lost with a server.
Processes of the Node API that ended in order had loaded ${number(counts.l2Misses)} L2 slices and
${number(counts.entryMisses)} pages of entries that their caches did not hold.

## Lives

${table(
  ['disks', 'lives', 'kills', 'orderly ends', 'checks'],
  [[episodes.length, counts.lives, counts.kills, counts.clean, counts.checks].map(number)],
)}

${table(
  ['event', 'times'],
  Object.entries(events).map(([name, n]) => [name, number(n)]),
)}

## Memory of the disk that ran all the time

![resident memory](memory.svg)

${table(
  ['process', 'MiB early', 'late', 'KiB an hour', 'in its halves', 'descriptors', 'threads'],
  memory.map((m) => [
    m.name,
    ...m.residentKiB.map((kib) => (kib / 1024).toFixed(1)),
    number(m.kibPerHour),
    m.halves.map(number).join(', '),
    m.descriptors.join(' → '),
    m.threads.join(' → '),
  ]),
)}

Medians of the first and the last third after a fifth of warm-up; at most ${BOUNDS.residentKiB / 1024} MiB,
${BOUNDS.descriptors} descriptors and ${BOUNDS.threads} thread more are allowed, once it has run ${BOUNDS.seconds} s; from ${BOUNDS.slopeSeconds} s
on, and from ${BOUNDS.slopeLeastKiB / 1024} MiB in all, not ${BOUNDS.kibPerHour / 1024} MiB an hour in both halves of the time.

## Disks

${table(
  ['no', 'seed', 'what', 'lives', 'kills', 'requests', ''],
  episodes.map((e) => [
    e.number,
    e.seed,
    describe(e.shape),
    e.counts.lives,
    e.counts.kills,
    number((e.operations.reads ?? 0) + (e.operations.writes ?? 0)),
    e.failure ? 'FAILED' : 'ok',
  ]),
)}
${parts.length === 0 ? '' : `\n## The suites, for longer\n\n\`\`\`\n${parts.join('\n')}\n\`\`\`\n`}`;
}

const FILES = { facts: 'report.json', text: 'report.md', memory: 'memory.svg' };

/** Makes the directory and tries to write there, which leaves an earlier report. Throws. */
export function prepareReport(directory) {
  mkdirSync(directory, { recursive: true });
  for (const file of Object.values(FILES)) appendFileSync(join(directory, file), '');
}

export function writeReport(directory, facts) {
  const { samples, ...rest } = facts;
  writeFileSync(join(directory, FILES.facts), `${JSON.stringify(facts, null, 1)}\n`);
  writeFileSync(join(directory, FILES.text), markdown(rest));
  writeFileSync(join(directory, FILES.memory), plot(samples));
}
