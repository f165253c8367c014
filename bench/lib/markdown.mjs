// The targets of a run as rows of a Markdown table, for docs/performance.md.
import { found, goal, number, targetName, verdict, wasMeasured } from './units.mjs';

// Complaints of programs have lines and bars, which would end a cell.
const inCell = (text) => text.replaceAll(/\s+/g, ' ').replaceAll('|', '\\|');

export function markdownRows({ groups }) {
  const rows = ['| row | median (spread) | target | |', '|---|---|---|---|'];
  for (const group of groups) {
    for (const target of group.targets) {
      const what = `${group.set}, ${group.group}: ${targetName(target)}`;
      const value = target.missing ? inCell(target.missing) : found(target, group.unit);
      rows.push(`| ${what} | ${value} | ${goal(target, group.unit)} | ${verdict(target)} |`);
    }
  }
  return rows;
}

/** Every figure of a run, group by group. */
export function markdownFigures({ groups }) {
  const lines = [];
  for (const { set, group, unit, x, rows } of groups) {
    const names = x
      ? x.values.map((value, i) => x.labels?.[i] ?? `${value}`)
      : ['median', 'least', 'most', 'to base'];
    lines.push('', `**${set}: ${group}** (${unit}${x ? `, over ${x.name}` : ''})`, '');
    lines.push(`| | ${names.join(' | ')} |`, `|---|${names.map(() => '---:|').join('')}`);
    for (const each of rows) {
      const { name, missing, points } = each;
      if (!wasMeasured(each)) {
        lines.push(`| ${name} | ${inCell(missing ?? 'not measured')} |`);
        continue;
      }
      const [point] = points;
      const values = x
        ? points.map(({ median }) => number(median, unit))
        : [point.median, point.min, point.max].map((value) => number(value, unit));
      if (!x) values.push(point.ratio?.median.toFixed(2) ?? '');
      lines.push(`| ${name} | ${values.join(' | ')} |`);
      if (missing) lines.push(`| | ${inCell(missing)} |`);
    }
  }
  return lines;
}
