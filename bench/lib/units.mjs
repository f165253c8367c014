// How figures are written: `123.4k`, `2.31M`, `7.5`, with the unit beside or in the heading.
const SI = new Set(['IOPS', 'ops/s', 'B/s']);

/** The number alone; its unit stands in the heading. */
export function number(value, unit) {
  if (value === undefined) return '–';
  const size = Math.abs(value);
  if (SI.has(unit) && size >= 1e6) return `${(value / 1e6).toFixed(2)}M`;
  if (SI.has(unit) && size >= 1e4) return `${(value / 1e3).toFixed(0)}k`;
  if (SI.has(unit) && size >= 1e3) return `${(value / 1e3).toFixed(1)}k`;
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  if (value === 0) return '0';
  return size >= 0.1 ? value.toFixed(2) : value.toPrecision(2);
}

export const withUnit = (value, unit) => `${number(value, unit)} ${unit}`;

export const ratio = (value) =>
  value === undefined ? '' : `× ${value.toFixed(value < 10 ? 2 : 1)}`;

/** `≥ 0.97`, `≤ 160 MiB`, `≥ 2.00M IOPS`. */
export function goal({ atLeast, atMost, to }, unit) {
  const sign = atLeast === undefined ? '≤' : '≥';
  const value = atLeast ?? atMost;
  return to === undefined ? `${sign} ${withUnit(value, unit)}` : `${sign} ${value}`;
}

// With as many digits as it takes to miss the target that it misses: 0.998 is not 1.00.
function onItsSide({ atLeast, atMost, met }, value, short) {
  const meets = (text) => (atLeast === undefined ? text <= atMost : text >= atLeast);
  let text = short(value);
  for (let digits = 3; met === false && meets(Number(text)); digits += 1) {
    text = value.toFixed(digits);
  }
  return text;
}

/** What was found, in the target's terms, and whether more rounds might say otherwise. */
export function found(target, unit) {
  if (!target.found) return '';
  return figure(target, unit) + (target.open ? ', open' : '');
}

function figure(target, unit) {
  const { median, min, max } = target.found;
  if (target.to !== undefined) {
    const short = (each) => each.toFixed(each < 10 ? 2 : 1);
    return `${onItsSide(target, median, short)} (${short(min)}–${short(max)})`;
  }
  return `${number(median, unit)} (${number(min, unit)}–${number(max, unit)})`;
}

export const targetName = ({ name, to, x, about }) =>
  about ?? `${name}${to === undefined ? '' : ` / ${to}`}${x === undefined ? '' : ` at ${x}`}`;

/** What a reader of a group's figures should know of how they came about: sentences. */
export function remarks({ host = { repeated: 0, disturbed: 0 }, rounds, targets = [] }) {
  const found = [];
  if (host.repeated + host.disturbed > 0) {
    const counted = host.disturbed > 0 ? `; ${host.disturbed} counted all the same` : '';
    found.push(`the host took the cores away: ${host.repeated} samples measured again${counted}`);
  }
  if (rounds && rounds.taken > rounds.asked) {
    const end = targets.some(({ open }) => open) ? ', as do all of them' : '';
    found.push(`${rounds.taken} rounds: ${rounds.asked} left open whether a target is met${end}`);
  }
  return found;
}

/** Whether a row has any figure at all; one that failed later has, and says why as well. */
export const wasMeasured = ({ points }) => points.some(({ median }) => median !== undefined);

export const verdict = ({ missing, met }) => (missing ? 'missing' : met ? 'met' : 'MISSED');
