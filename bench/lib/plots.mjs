// The plots of a report: inline SVG, rendered here by ECharts, without a browser and without network.
//
//   bars         one figure for each contender, its spread as whiskers, targets as diamonds
//   lines        figures over an axis, the spread as a band, targets as diamonds
//   percentiles  latencies of the contenders, p50 to p99.9; only of those that have them all
import * as echarts from 'echarts';
import { escaped } from './html.mjs';
import { pointOfTarget } from './stats.mjs';
import { number } from './units.mjs';

const WIDTH = 860;
const BASE_COLOUR = '#7a828e';
// Okabe and Ito's, which most colour-blind eyes tell apart.
const FORMATS = [
  ['sealed', '#009e73', '#66c5ab'],
  ['qcow2', '#d55e00', '#e69e66'],
  ['raw', '#0072b2', '#66aad1'],
];
const PALETTE = ['#cc79a7', '#e69f00', '#56b4e9', '#8a5a44', '#5b4b9a', '#8c9b1d', '#b03060'];
const PEER = /qemu|fio|nbdkit|gocryptfs|node:|noble/i;
const TEXT = { fontFamily: 'system-ui, sans-serif', fontSize: 12, color: '#2b3038' };
const AXIS = {
  axisLabel: { ...TEXT, color: '#5a626e' },
  nameTextStyle: { ...TEXT, color: '#5a626e' },
  splitLine: { lineStyle: { color: '#e7eaee' } },
  axisLine: { lineStyle: { color: '#aab1bb' } },
};
export const PERCENTILES = [
  ['p50', 'p50'],
  ['p90', 'p90'],
  ['p99', 'p99'],
  ['p99_9', 'p99.9'],
];

function svg(height, option) {
  const chart = echarts.init(null, null, { renderer: 'svg', ssr: true, width: WIDTH, height });
  chart.setOption({ animation: false, textStyle: TEXT, ...option });
  const text = chart.renderToSVGString();
  chart.dispose();
  // As wide as the page allows, and no wider than it was drawn for.
  return text.replace(/<svg width="\d+" height="\d+"/, `<svg class="plot" width="100%"`);
}

const measured = (rows) => rows.filter((row) => row.points.some((p) => p.median !== undefined));

/**
 * A colour for each row, the same in all plots: the base grey, a format its own, the others in turn.
 * The second row of a format is lighter.
 */
function colours(group) {
  const used = new Map();
  const tint = (name) => {
    if (name === group.base) return BASE_COLOUR;
    const format = PEER.test(name) ? undefined : FORMATS.find(([word]) => name.includes(word));
    const key = format?.[0] ?? 'others';
    const before = used.get(key) ?? 0;
    used.set(key, before + 1);
    return format ? format[1 + (before % 2)] : PALETTE[before % PALETTE.length];
  };
  return new Map(group.rows.map(({ name }) => [name, tint(name)]));
}

/** Where a target lies on a row's axis; undefined where its other side was not measured. */
function goalOf(group, { to, atLeast, atMost, x }) {
  const goal = atLeast ?? atMost;
  if (to === undefined) return goal;
  const base = pointOfTarget(
    group.rows.find(({ name }) => name === to) ?? { points: [] },
    x,
  )?.median;
  return base === undefined ? undefined : base * goal;
}

/** Of an axis: no more digits than its steps need. */
const axisNumber = (unit) => (value) =>
  number(value, unit)
    .replace(/(\.\d*?)0+(\D*)$/, '$1$2')
    .replace(/\.(\D*)$/, '$1');

function whisker(_, api) {
  const [low, high, row] = [api.value(0), api.value(1), api.value(2)];
  const [x1, y] = api.coord([low, row]);
  const [x2] = api.coord([high, row]);
  const style = { stroke: '#1d2127', lineWidth: 1.2 };
  const lineOf = (a, b, c, d) => ({ type: 'line', shape: { x1: a, y1: b, x2: c, y2: d }, style });
  const children = [
    lineOf(x1, y, x2, y),
    lineOf(x1, y - 4, x1, y + 4),
    lineOf(x2, y - 4, x2, y + 4),
  ];
  return { type: 'group', children };
}

const diamonds = (data) => ({
  ...{ type: 'scatter', symbol: 'diamond', symbolSize: 13, z: 6, data },
  itemStyle: { color: '#ffd23f', borderColor: '#1d2127', borderWidth: 1 },
});

export function bars(group) {
  const rows = measured(group.rows);
  if (rows.length === 0) return '';
  const tint = colours(group);
  const { unit } = group;
  const at = new Map(rows.map(({ name }, i) => [name, i]));
  const goals = group.targets
    .filter((target) => at.has(target.name))
    .map((target) => [goalOf(group, target), at.get(target.name)])
    .filter(([value]) => value !== undefined);
  const longest = Math.max(...rows.map(({ name }) => name.length));
  const left = Math.min(330, Math.max(150, longest * 7.3 + 16));
  const most = Math.max(...rows.map(({ points: [{ max }] }) => max));
  const label = { show: true, distance: 6, fontSize: 12 };
  // Beside a bar that is too short to hold it.
  const where = ({ median, max }) =>
    median > most / 9
      ? { position: 'insideLeft', color: '#fff' }
      : { position: 'right', distance: 8 + ((max - median) / most) * (WIDTH - left - 40), ...TEXT };
  return svg(64 + rows.length * 30, {
    grid: { left, right: 40, top: 8, bottom: 44 },
    xAxis: {
      ...AXIS,
      ...{ type: 'value', name: unit, nameLocation: 'middle', nameGap: 28 },
      axisLabel: { ...AXIS.axisLabel, formatter: axisNumber(unit) },
    },
    yAxis: {
      ...{ ...AXIS, type: 'category', inverse: true, data: rows.map(({ name }) => name) },
      axisTick: { show: false },
      axisLabel: { ...TEXT, width: left - 12, overflow: 'truncate' },
    },
    series: [
      {
        ...{ type: 'bar', barWidth: 18 },
        data: rows.map(({ name, points: [point] }) => ({
          value: point.median,
          itemStyle: { color: tint.get(name) },
          label: { ...label, ...where(point), formatter: number(point.median, unit) },
        })),
      },
      {
        ...{ type: 'custom', renderItem: whisker, encode: { x: [0, 1], y: 2 }, z: 5 },
        data: rows.map(({ points: [point] }, i) => [point.min, point.max, i]),
      },
      diamonds(goals),
    ],
  });
}

/** A line, and below it the band between the least and the most. */
function lineWithBand(name, colour, points, dashed) {
  const band = { type: 'line', stack: `band of ${name}`, symbol: 'none', silent: true };
  const hidden = { lineStyle: { opacity: 0 } };
  return [
    { ...band, ...hidden, data: points.map(({ x, min }) => [x, min]), areaStyle: { opacity: 0 } },
    {
      ...{ ...band, ...hidden },
      data: points.map(({ x, min, max }) => [x, max - min]),
      areaStyle: { color: colour, opacity: 0.13 },
    },
    {
      ...{ type: 'line', name, symbol: 'circle', symbolSize: 6, color: colour },
      lineStyle: { width: 2, type: dashed ? 'dashed' : 'solid' },
      data: points.map(({ x, median }) => [x, median]),
    },
  ];
}

/** In HTML, whose browser knows how wide a name is. */
const legend = (names, tint) => {
  const items = names.map(
    (name) => `<li><i style="background:${tint.get(name)}"></i>${escaped(name)}</li>`,
  );
  return `<ul class="legend">${items.join('')}</ul>`;
};

export function lines(group) {
  const rows = measured(group.rows);
  if (rows.length === 0) return '';
  const { unit, x } = group;
  const tint = colours(group);
  const names = rows.map(({ name }) => name);
  const labels = x.values.map((value, i) => x.labels?.[i] ?? `${value}`);
  // A category for each value: the steps of a series are its own scale.
  const labelOf = (value) => labels[x.values.indexOf(value)];
  const place = (point) => ({ ...point, x: labelOf(point.x) });
  const goals = group.targets
    .map((target) => [labelOf(target.x ?? x.values[0]), goalOf(group, target)])
    .filter(([, value]) => value !== undefined);
  const plot = svg(330, {
    grid: { left: 70, right: 30, top: 30, bottom: 48 },
    xAxis: {
      ...{ ...AXIS, type: 'category', data: labels, boundaryGap: false },
      ...{ name: x.name, nameLocation: 'middle', nameGap: 30 },
    },
    yAxis: {
      ...{ ...AXIS, type: 'value', name: unit, min: 0 },
      axisLabel: { ...AXIS.axisLabel, formatter: axisNumber(unit) },
    },
    series: [
      ...rows.flatMap(({ name, points }) => {
        const there = points.filter(({ median }) => median !== undefined).map(place);
        return lineWithBand(name, tint.get(name), there, name === group.base);
      }),
      diamonds(goals),
    ],
  });
  return legend(names, tint) + plot;
}

export function percentiles(group) {
  if (group.x) return '';
  const rows = measured(group.rows).filter(({ points: [{ detail }] }) =>
    PERCENTILES.every(([key]) => detail?.[key] > 0),
  );
  if (rows.length === 0) return '';
  const tint = colours(group);
  const names = rows.map(({ name }) => name);
  const plot = svg(260, {
    grid: { left: 70, right: 30, top: 30, bottom: 30 },
    xAxis: { ...AXIS, type: 'category', data: PERCENTILES.map(([, label]) => label) },
    yAxis: {
      ...{ ...AXIS, type: 'log', name: 'latency, µs' },
      axisLabel: { ...AXIS.axisLabel, formatter: axisNumber('µs') },
    },
    series: rows.map(({ name, points: [{ detail }] }) => ({
      ...{ type: 'line', name, symbol: 'circle', symbolSize: 6, color: tint.get(name) },
      lineStyle: { width: 2, type: name === group.base ? 'dashed' : 'solid' },
      data: PERCENTILES.map(([key]) => detail[key]),
    })),
  });
  return legend(names, tint) + plot;
}
