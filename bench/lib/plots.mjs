// The plots of a report: inline SVG, rendered here by ECharts, without a browser and without network.
//
//   bars         one figure for each contender, its spread as whiskers, targets as diamonds
//   lines        figures over an axis, the spread as a band
//   percentiles  latencies of the contenders, p50 to p99.9
import * as echarts from 'echarts';
import { number } from './units.mjs';

const WIDTH = 860;
const BASE_COLOUR = '#7a828e';
// Okabe and Ito's, which most colour-blind eyes tell apart; the base of a comparison is grey.
const PALETTE = [
  ...['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8a5a44', '#5b4b9a'],
  ...['#8c9b1d', '#b03060'],
];
const TEXT = { fontFamily: 'system-ui, sans-serif', fontSize: 12, color: '#2b3038' };
const AXIS = {
  axisLabel: { ...TEXT, color: '#5a626e' },
  nameTextStyle: { ...TEXT, color: '#5a626e' },
  splitLine: { lineStyle: { color: '#e7eaee' } },
  axisLine: { lineStyle: { color: '#aab1bb' } },
};
const PERCENTILES = [
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

/** A colour for each row, the same in all plots of a group. */
function colours(group) {
  let next = 0;
  return new Map(
    group.rows.map(({ name }) => [
      name,
      name === group.base ? BASE_COLOUR : PALETTE[next++ % PALETTE.length],
    ]),
  );
}

/** Where a target lies on a row's axis; undefined where its other side was not measured. */
function goalOf(group, { to, atLeast, atMost }) {
  const goal = atLeast ?? atMost;
  if (to === undefined) return goal;
  const base = group.rows.find(({ name }) => name === to)?.points[0].median;
  return base === undefined ? undefined : base * goal;
}

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
  const label = { show: true, position: 'insideLeft', distance: 6, color: '#fff', fontSize: 12 };
  return svg(64 + rows.length * 30, {
    grid: { left: 250, right: 40, top: 8, bottom: 44 },
    xAxis: {
      ...AXIS,
      ...{ type: 'value', name: unit, nameLocation: 'middle', nameGap: 28 },
      axisLabel: { ...AXIS.axisLabel, formatter: (value) => number(value, unit) },
    },
    yAxis: {
      ...{ ...AXIS, type: 'category', inverse: true, data: rows.map(({ name }) => name) },
      axisTick: { show: false },
      axisLabel: { ...TEXT, width: 235, overflow: 'truncate' },
    },
    series: [
      {
        ...{ type: 'bar', barWidth: 18 },
        data: rows.map(({ name, points: [point] }) => ({
          value: point.median,
          itemStyle: { color: tint.get(name) },
          label: { ...label, formatter: number(point.median, unit) },
        })),
      },
      {
        ...{ type: 'custom', renderItem: whisker, encode: { x: [0, 1], y: 2 }, z: 5 },
        data: rows.map(({ points: [point] }, i) => [point.min, point.max, i]),
      },
      {
        ...{ type: 'scatter', symbol: 'diamond', symbolSize: 13, z: 6 },
        itemStyle: { color: '#ffd23f', borderColor: '#1d2127', borderWidth: 1 },
        data: goals,
      },
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

const legend = (names) => ({
  ...{ data: names, type: 'plain', top: 0, left: 'center', itemGap: 16, textStyle: TEXT },
  ...{ icon: 'roundRect', itemWidth: 14, itemHeight: 8 },
});

// How high a legend grows when it breaks into lines.
const legendHeight = (names) =>
  22 * Math.ceil(names.reduce((sum, name) => sum + 44 + name.length * 6.5, 0) / (WIDTH - 40));

export function lines(group) {
  const rows = measured(group.rows);
  if (rows.length === 0) return '';
  const { unit, x } = group;
  const tint = colours(group);
  const names = rows.map(({ name }) => name);
  const top = legendHeight(names) + 26;
  const labels = x.values.map((value, i) => x.labels?.[i] ?? `${value}`);
  // A category for each value: the steps of a series are its own scale.
  const place = (point) => ({ ...point, x: labels[x.values.indexOf(point.x)] });
  return svg(300 + top, {
    legend: legend(names),
    grid: { left: 70, right: 30, top, bottom: 48 },
    xAxis: {
      ...{ ...AXIS, type: 'category', data: labels, boundaryGap: false },
      ...{ name: x.name, nameLocation: 'middle', nameGap: 30 },
    },
    yAxis: {
      ...{ ...AXIS, type: 'value', name: unit, min: 0 },
      axisLabel: { ...AXIS.axisLabel, formatter: (value) => number(value, unit) },
    },
    series: rows.flatMap(({ name, points }) => {
      const there = points.filter(({ median }) => median !== undefined).map(place);
      return lineWithBand(name, tint.get(name), there, name === group.base);
    }),
  });
}

export function percentiles(group) {
  if (group.x) return '';
  const rows = measured(group.rows).filter(({ points: [{ detail }] }) => detail?.p50 > 0);
  if (rows.length === 0) return '';
  const tint = colours(group);
  const names = rows.map(({ name }) => name);
  const top = legendHeight(names) + 26;
  return svg(230 + top, {
    legend: legend(names),
    grid: { left: 70, right: 30, top, bottom: 30 },
    xAxis: { ...AXIS, type: 'category', data: PERCENTILES.map(([, label]) => label) },
    yAxis: {
      ...{ ...AXIS, type: 'log', name: 'latency, µs' },
      axisLabel: { ...AXIS.axisLabel, formatter: (value) => number(value, 'µs') },
    },
    series: rows.map(({ name, points: [{ detail }] }) => ({
      ...{ type: 'line', name, symbol: 'circle', symbolSize: 6, color: tint.get(name) },
      lineStyle: { width: 2, type: name === group.base ? 'dashed' : 'solid' },
      data: PERCENTILES.map(([key]) => (detail[key] > 0 ? detail[key] : undefined)),
    })),
  });
}
