// What a run prints: progress while it goes, a table for each comparison, the targets at the end.
// Tables go to stdout, progress to stderr; on a terminal the progress is one line that changes.
import { styleText } from 'node:util';
import { load } from './machine.mjs';
import { found, goal, number, ratio, remarks, targetName, verdict, wasMeasured } from './units.mjs';

const coloured = process.stdout.isTTY && !process.env.NO_COLOR;
const paint = (style, text) => (coloured ? styleText(style, text) : text);
const NAME_MAX = 44;

function status(text) {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text.slice(0, 110)}`);
}

function line(text = '') {
  status('');
  console.log(text);
}

const cells = (widths, texts) =>
  texts
    .map((text, i) => (i === 0 ? text.padEnd(widths[0]) : text.padStart(widths[i])))
    .join('  ')
    .trimEnd();

/** Rows of cells, aligned; a row may be one string, which spans what is right of its name. */
function table(heading, rows) {
  const full = [heading, ...rows.filter((row) => row.length === heading.length)];
  const widths = heading.map((_, i) => Math.max(...full.map((row) => row[i].length)));
  widths[0] = Math.min(NAME_MAX, Math.max(widths[0], ...rows.map((row) => row[0].length)));
  line(`  ${paint('dim', cells(widths, heading))}`);
  for (const row of rows) {
    if (row.length === heading.length) line(`  ${cells(widths, row)}`);
    else line(`  ${row[0].padEnd(widths[0])}  ${paint('yellow', row.slice(1).join('  '))}`);
  }
}

const spread = ({ min, max }, unit) => `${number(min, unit)}–${number(max, unit)}`;

function plainRow(row, unit) {
  const [point] = row.points;
  if (point.median === undefined) return [row.name, row.missing ?? 'not measured'];
  const { detail = {} } = point;
  const latency = detail.p99 === undefined ? '' : `${number(detail.p50)} / ${number(detail.p99)}`;
  return [
    row.name,
    number(point.median, unit),
    spread(point, unit),
    ratio(point.ratio?.median),
    latency,
  ];
}

function seriesRow(row, unit) {
  if (!wasMeasured(row)) return [row.name, row.missing ?? 'not measured'];
  return [row.name, ...row.points.map((point) => number(point.median, unit))];
}

/** A row, and below it why it ended early. */
function rowsOf(row, unit, make) {
  const first = make(row, unit);
  return row.missing && wasMeasured(row) ? [first, ['', row.missing]] : [first];
}

export function printGroup(group) {
  const { set, unit, x, rows } = group;
  line();
  line(`${paint(['bold', 'cyan'], `${set}: ${group.group}`)}${x ? `, over ${x.name}` : ''}`);
  const heading = x
    ? [unit, ...x.values.map((value) => `${x.labels?.[x.values.indexOf(value)] ?? value}`)]
    : [unit, 'median', 'spread', group.base ? 'to base' : '', 'p50 / p99 µs'];
  table(
    heading,
    rows.flatMap((row) => rowsOf(row, unit, x ? seriesRow : plainRow)),
  );
  for (const remark of remarks(group)) line(`  ${paint('yellow', remark)}`);
  for (const target of group.targets) line(`  ${targetLine(target, unit)}`);
}

function targetLine(target, unit) {
  const word = verdict(target);
  const style = { met: 'green', MISSED: ['bold', 'red'], missing: 'yellow' }[word];
  const what = `${targetName(target)} ${goal(target, unit)}`;
  return `${paint(style, word.padEnd(7))} ${what}: ${target.missing ?? found(target, unit)}`;
}

export function printTargets(groups) {
  const all = groups.flatMap((group) => group.targets.map((target) => ({ group, target })));
  if (all.length === 0) return;
  line();
  line(paint(['bold', 'cyan'], 'Targets'));
  for (const { group, target } of all) {
    line(`  ${targetLine(target, group.unit)}  ${paint('dim', `[${group.set}: ${group.group}]`)}`);
  }
  const count = (word) => all.filter(({ target }) => verdict(target) === word).length;
  line(`  ${count('met')} met, ${count('MISSED')} missed, ${count('missing')} not measured`);
}

export const progress = {
  say: (text) => {
    if (process.stderr.isTTY) status(text);
    else console.error(text);
  },
  step: (group, { row, round, rounds, x }) => {
    const at = x === undefined ? '' : ` at ${x}`;
    const where = `round ${round + 1} of ${rounds}`;
    status(`${group.set}: ${group.group}: ${where}: ${row.name}${at}  (load ${load().toFixed(1)})`);
  },
  group: printGroup,
};

export { line };
