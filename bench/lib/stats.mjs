// Arithmetic of the benchmarks: medians, spreads, ratios paired by round, targets. Pure.
//
// A ratio is taken within each round, between two samples that were taken a moment apart, and the
// median of these ratios counts: what slowed the whole machine down for a round slowed both.

export function median(values) {
  const sorted = values.filter((value) => value !== undefined).sort((a, b) => a - b);
  if (sorted.length === 0) return undefined;
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

/** Of the samples there are (a round that did not happen is undefined). */
export function summary(values) {
  const found = values.filter((value) => value !== undefined);
  if (found.length === 0) return undefined;
  return { median: median(found), min: Math.min(...found), max: Math.max(...found) };
}

/** Sample by sample, over the rounds in which both were measured. */
export function pairedRatios(values, base) {
  return values
    .map((value, round) => (value === undefined || !base[round] ? undefined : value / base[round]))
    .filter((ratio) => ratio !== undefined);
}

/**
 * Between which of the values the median lies of what they are samples of, 19 times in 20: of so many
 * coins, how many of the least and of the most may be chance. Of fewer than nine all of them.
 */
export function medianInterval(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const n = sorted.length;
  let chance = 0;
  let heads = 0.5 ** n; // the probability of exactly `chance` heads, and of at most so many
  let atMost = heads;
  for (;;) {
    heads *= (n - chance) / (chance + 1);
    atMost += heads;
    if (2 * atMost > 1 / 20) break;
    chance += 1;
  }
  return { least: sorted[chance], most: sorted[n - 1 - chance] };
}

/** The median of each number that all samples' details name. */
function medianDetails(details) {
  const found = details.filter((each) => each !== undefined);
  const names = Object.keys(found[0] ?? {});
  if (names.length === 0) return undefined;
  return Object.fromEntries(names.map((name) => [name, median(found.map((each) => each[name]))]));
}

function summarisePoint(point, basePoint) {
  Object.assign(point, summary(point.samples));
  const details = medianDetails(point.details);
  if (details) point.detail = details;
  if (basePoint) {
    const ratio = summary(pairedRatios(point.samples, basePoint.samples));
    if (ratio) point.ratio = ratio;
  }
}

/** Fills in medians, spreads, the ratios to the base and the targets of a group. */
export function summarise(group) {
  const base = group.rows.find((row) => row.name === group.base);
  for (const row of group.rows) {
    row.points.forEach((point, i) => {
      summarisePoint(point, row === base ? undefined : base?.points[i]);
    });
  }
  for (const target of group.targets) judge(group, target);
  return group;
}

/** The point of a row that a target is of: the one at `at`, else its first. */
export const pointOfTarget = ({ points }, at) =>
  at === undefined ? points[0] : points.find(({ x }) => x === at);

/**
 * Whether a target is met: the median of paired ratios where it has a `to`, else the median itself.
 * `met` is undefined, and `missing` says why, where one side was not measured or failed. `open`: what
 * was measured leaves both possible.
 */
export function judge(group, target) {
  const rowOf = (name) => {
    const row = group.rows.find((each) => each.name === name);
    if (!row) throw new Error(`${group.group}: a target names '${name}', which no contender is`);
    return row;
  };
  const pointOf = (row) => pointOfTarget(row, target.x);
  const rows = [target.name, ...(target.to === undefined ? [] : [target.to])].map(rowOf);
  const [point, base] = rows.map(pointOf);
  // A contender that failed once may have failed where it is slow: what it did before says nothing.
  const failed = rows.find((row) => row.failed);
  if (failed) {
    target.missing = `${failed.name}: ${failed.missing}`;
    return target;
  }
  const values = base ? pairedRatios(point.samples, base.samples) : point.samples;
  const found = summary(values);
  if (!found) {
    const without = rows.find((row) => pointOf(row).median === undefined) ?? rows[0];
    target.missing = `${without.name}: ${without.missing ?? 'not measured'}`;
    return target;
  }
  target.found = found;
  const { atLeast, atMost } = target;
  const { least, most } = medianInterval(values.filter((value) => value !== undefined));
  const wanted = atLeast ?? atMost;
  target.open = least < wanted && wanted <= most;
  target.met = atLeast === undefined ? found.median <= atMost : found.median >= atLeast;
  return target;
}
