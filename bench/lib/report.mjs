// The HTML report of a run: one file, no network, no script.
import { escaped } from './html.mjs';
import { bars, lines, PERCENTILES, percentiles } from './plots.mjs';
import { found, goal, number, ratio, remarks, targetName, verdict, wasMeasured } from './units.mjs';

const STYLE = `
:root { color-scheme: light; --ink: #1d2127; --dim: #5f6875; --line: #e2e6eb; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 0 auto;
  max-width: 940px; padding: 28px 20px 80px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 52px 0 6px; padding-top: 14px;
  border-top: 2px solid var(--ink); } h3 { font-size: 16px; margin: 34px 0 6px; }
p.dim, .dim { color: var(--dim); } p { margin: 4px 0 10px; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0 14px; }
th, td { text-align: right; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; vertical-align: top; }
th { color: var(--dim); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; } td:not(.text) { white-space: nowrap; } .met { color: #18794e; font-weight: 600; }
.MISSED { color: #c02a2a; font-weight: 700; } .missing { color: #97660a; }
svg.plot { display: block; max-width: 860px; height: auto; margin: 6px 0 10px; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 20px; padding: 0; margin: 10px 0 0;
  font-size: 12.5px; } ul.legend i { display: inline-block; width: 14px; height: 8px; border-radius: 3px;
  margin-right: 7px; }
details { margin: 4px 0 10px; } summary { cursor: pointer; color: var(--dim); font-size: 13.5px; }
pre { font: 12px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: #f6f7f9; padding: 8px 10px; margin: 6px 0; border-radius: 4px; }
nav a { margin-right: 14px; } .warn { background: #fff6e0; padding: 8px 12px; border-radius: 4px; }`;

const cell = (tag, text, kind) =>
  `<${tag}${kind ? ` class="${kind}"` : ''}>${escaped(text)}</${tag}>`;
const row = (cells) => `<tr>${cells.join('')}</tr>`;
const table = (heading, rows) =>
  `<table><thead>${row(heading.map((text) => cell('th', text)))}</thead>` +
  `<tbody>${rows.join('')}</tbody></table>`;

function targetRow(group, target) {
  const word = verdict(target);
  return row([
    cell('td', `${group.set}, ${group.group}: ${targetName(target)}`, 'text'),
    target.missing ? cell('td', target.missing, 'text') : cell('td', found(target, group.unit)),
    cell('td', goal(target, group.unit)),
    cell('td', word, word),
  ]);
}

function targets(groups) {
  const rows = groups.flatMap((group) => group.targets.map((target) => targetRow(group, target)));
  if (rows.length === 0) return '';
  return (
    `<h2 id="targets">Targets</h2><p class="dim">Medians of ratios paired by round, and the least ` +
    `and the most of them.</p>${table(['', 'found', 'target', ''], rows)}`
  );
}

const latencyText = (value) => (value > 0 ? number(value) : '');

/** Across the columns beside a row's name: why it has no figures, or no more of them. */
const reason = (text, columns) =>
  `<td class="missing text" colspan="${columns}">${escaped(text)}</td>`;

/** What follows a row that has figures and failed later. */
const endedEarly = (each, columns) =>
  each.missing && wasMeasured(each)
    ? [row([cell('td', '', 'text'), reason(each.missing, columns)])]
    : [];

function figures({ unit, base, rows }) {
  // Those that any row has.
  const shares = PERCENTILES.filter(([key]) => rows.some(({ points: [p] }) => p.detail?.[key] > 0));
  const heading = [
    ...[unit, 'median', 'least', 'most'],
    ...(base ? [`to ${base}`] : []),
    ...shares.map(([, label]) => `${label} µs`),
  ];
  return table(
    heading,
    rows.flatMap((each) => {
      const {
        name,
        missing,
        points: [point],
      } = each;
      const columns = heading.length - 1;
      const first = cell('td', name, 'text');
      if (!wasMeasured(each)) return row([first, reason(missing ?? 'not measured', columns)]);
      const values = [point.median, point.min, point.max].map((value) => number(value, unit));
      const latencies = shares.map(([key]) => latencyText(point.detail?.[key]));
      const all = [...values, ...(base ? [ratio(point.ratio?.median)] : []), ...latencies];
      return [row([first, ...all.map((text) => cell('td', text))]), ...endedEarly(each, columns)];
    }),
  );
}

/** Below a row of a series: its p99 at each point, where the samples have it. */
function slowest(points) {
  const all = points.map(({ detail }) => latencyText(detail?.p99));
  if (all.every((text) => text === '')) return [];
  const name = cell('td', 'p99 µs', 'text dim');
  return [row([name, ...all.map((text) => cell('td', text, 'dim'))])];
}

function seriesFigures({ unit, x, rows }) {
  const labels = x.values.map((value, i) => x.labels?.[i] ?? `${value}`);
  return table(
    [`${unit} over ${x.name}`, ...labels],
    rows.flatMap((each) => {
      const { name, missing, points } = each;
      const first = cell('td', name, 'text');
      if (!wasMeasured(each)) return row([first, reason(missing ?? 'not measured', labels.length)]);
      const medians = points.map(({ median }) => cell('td', number(median, unit)));
      return [row([first, ...medians]), ...slowest(points), ...endedEarly(each, labels.length)];
    }),
  );
}

const GONE =
  '<p class="dim">The keys (--key, identity, PQBLK_KEYS) and the scratch files of the run are gone: put ' +
  'others in their place. Of the seeds of a row the first is named.</p>';

function commands(rows) {
  const lists = rows.filter((each) => each.commands.length > 0);
  if (lists.length === 0) return '';
  const text = lists.map(({ name, commands: lines }) => `# ${name}\n${lines.join('\n')}`);
  return `<details><summary>command lines</summary>${GONE}<pre>${escaped(text.join('\n\n'))}</pre></details>`;
}

function section(group) {
  const { group: name, about, x, rows, targets: wanted, unit } = group;
  const verdicts = wanted.map((target) => {
    const word = verdict(target);
    const what = escaped(`${targetName(target)} ${goal(target, unit)}: `);
    const value = escaped(target.missing ?? found(target, unit));
    return `<p><span class="${word}">${word}</span> ${what}${value}</p>`;
  });
  return [
    `<h3>${escaped(name)}</h3>`,
    about ? `<p class="dim">${escaped(about)}</p>` : '',
    x && x.values.length > 1 ? lines(group) : bars(group),
    x ? seriesFigures(group) : figures(group),
    ...remarks(group).map((remark) => `<p class="dim">${escaped(remark)}</p>`),
    ...verdicts,
    percentiles(group),
    commands(rows),
  ].join('\n');
}

function machine({ machine: m, settings, loadBefore, loadAfter, command, started }) {
  const GiB = 2 ** 30;
  const places = Object.entries(m.places).map(([name, { fileSystem, source, writeCache }]) => {
    const cache = writeCache ? `, ${writeCache}` : '';
    return `${name}: ${fileSystem ?? '?'} on ${source ?? '?'}${cache}`;
  });
  const facts = {
    processor: `${m.cpu}, ${m.cores} cores${m.hypervisor ? ', a virtual machine' : ''}`,
    features: m.flags.join(' '),
    memory: `${(m.memoryBytes / GiB).toFixed(1)} GiB`,
    kernel: m.kernel,
    places: places.join('; '),
    commit: `${m.commit ?? '?'}${m.changedFiles ? ` and ${m.changedFiles} changed files` : ''}`,
    versions: Object.entries(m.versions)
      .map(([name, version]) => `${name} ${version}`)
      .join('; '),
    load: `${loadBefore?.toFixed(1)} before, ${loadAfter?.toFixed(1)} after`,
    run: `${command}, ${started}: ${settings.rounds} rounds of ${settings.seconds} s`,
  };
  const rows = Object.entries(facts).map(([name, value]) =>
    row([cell('td', name, 'dim'), cell('td', value, 'text')]),
  );
  return `<table><tbody>${rows.join('')}</tbody></table>`;
}

function warnings({ interrupted, broken = [], machine: m, loadBefore }) {
  const all = [];
  if (interrupted) all.push('This run was interrupted: not everything was measured.');
  for (const { set, message } of broken) all.push(`The set ${set} broke off: ${message}`);
  if (loadBefore > m.cores / 4) {
    all.push(`The machine was busy with something else (load ${loadBefore.toFixed(1)}).`);
  }
  return all.map((text) => `<p class="warn">${escaped(text)}</p>`).join('');
}

export function htmlReport(result) {
  const { groups } = result;
  const sets = [...new Set(groups.map(({ set }) => set))];
  const sections = sets.map((set) => {
    const own = groups.filter((group) => group.set === set);
    return `<h2 id="${escaped(set)}">${escaped(set)}</h2>${own.map(section).join('\n')}`;
  });
  const links = ['targets', ...sets].map((set) => `<a href="#${escaped(set)}">${escaped(set)}</a>`);
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pqblk bench ${escaped(result.started.slice(0, 16))}</title><style>${STYLE}</style></head>
<body><h1>pqblk, measured</h1>
<p class="dim">Bars and lines are medians; whiskers and bands reach from the least sample to the most;
diamonds are targets. Contenders take turns within each round.</p>
${warnings(result)}
${machine(result)}
<nav>${links.join('')}</nav>
${targets(groups)}
${sections.join('\n')}
</body></html>
`;
}
