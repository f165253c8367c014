// An independent reader of the Prometheus text format, version 0.0.4, as strict as its specification
// lets it be. Throws at the first line that does not fit.
//
// https://prometheus.io/docs/instrumenting/exposition_formats/

export interface Series {
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

export interface Family {
  readonly name: string;
  readonly type: string;
  readonly help: string;
  readonly series: Series[];
}

const NAME = '[a-zA-Z_:][a-zA-Z0-9_:]*';
const LABEL = '[a-zA-Z_][a-zA-Z0-9_]*';
const STRING = '"(?:[^"\\\\\\n]|\\\\[\\\\"n])*"';
const HELP_LINE = new RegExp(`^# HELP (${NAME}) (\\S.*)$`);
const TYPE_LINE = new RegExp(`^# TYPE (${NAME}) (counter|gauge|histogram)$`);
const SAMPLE_LINE = new RegExp(
  `^(${NAME})(?:\\{(${LABEL}=${STRING}(?:,${LABEL}=${STRING})*)\\})? (\\S+)$`,
);
const ONE_LABEL = new RegExp(`(${LABEL})=(${STRING})`, 'g');
const NUMBER = /^(?:[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?|[+-]Inf|NaN)$/;

export function parseExposition(text: string): Map<string, Family> {
  if (!text.endsWith('\n')) throw new Error('the last line does not end');
  const families = new Map<string, Family>();
  const seen = new Set<string>();
  let help: RegExpExecArray | undefined;
  let family: Family | undefined;
  for (const line of text.slice(0, -1).split('\n')) {
    const fail = (why: string): never => {
      throw new Error(`${why}: ${line}`);
    };
    const helps = HELP_LINE.exec(line);
    const types = TYPE_LINE.exec(line);
    if (helps) {
      help = helps;
    } else if (types) {
      const name = String(types[1]);
      if (help?.[1] !== name) fail('no HELP before');
      if (families.has(name)) fail('a family in two places');
      family = { name, type: String(types[2]), help: String(help?.[2]), series: [] };
      families.set(name, family);
    } else {
      const sample = SAMPLE_LINE.exec(line);
      if (!sample || !family) throw new Error(`no sample: ${line}`);
      if (seen.has(line.slice(0, line.lastIndexOf(' ')))) fail('a series twice');
      seen.add(line.slice(0, line.lastIndexOf(' ')));
      const suffixes = family.type === 'histogram' ? ['_bucket', '_sum', '_count'] : [''];
      const { name } = family;
      if (!suffixes.some((suffix) => sample[1] === name + suffix)) fail(`not of ${name}`);
      const value = String(sample[3]);
      if (!NUMBER.test(value)) fail('no number');
      family.series.push({
        name: String(sample[1]),
        labels: labelsOf(sample[2] ?? ''),
        value: Number(value.replace('Inf', 'Infinity')),
      });
    }
  }
  for (const one of families.values()) check(one);
  return families;
}

function labelsOf(text: string): Record<string, string> {
  const labels: Record<string, string> = {};
  for (const [, name, quoted] of text.matchAll(ONE_LABEL)) {
    if (String(name) in labels) throw new Error(`a label twice: ${text}`);
    labels[String(name)] = String(quoted)
      .slice(1, -1)
      .replace(/\\(.)/g, (_, c: string) => (c === 'n' ? '\n' : c));
  }
  return labels;
}

function check({ name, type, series }: Family): void {
  if (series.length === 0) throw new Error(`${name}: no series`);
  if (type === 'counter') {
    if (!name.endsWith('_total')) throw new Error(`${name}: a counter without _total`);
    if (series.some(({ value }) => !(value >= 0))) throw new Error(`${name}: below 0`);
  }
  if (type === 'histogram') checkHistogram(name, series);
}

function checkHistogram(name: string, series: readonly Series[]): void {
  const groups = new Map<string, Series[]>();
  for (const one of series) {
    const { le: _, ...rest } = one.labels;
    const key = JSON.stringify(Object.entries(rest).sort());
    groups.set(key, [...(groups.get(key) ?? []), one]);
  }
  for (const [key, group] of groups) {
    const where = `${name} ${key}`;
    const buckets = group.filter((one) => one.name === `${name}_bucket`);
    const [sum, count, ...more] = group.filter((one) => one.name !== `${name}_bucket`);
    if (sum?.name !== `${name}_sum` || count?.name !== `${name}_count` || more.length > 0) {
      throw new Error(`${where}: expected one _sum and one _count`);
    }
    let bound = Number.NEGATIVE_INFINITY;
    let below = 0;
    for (const { labels, value } of buckets) {
      const le = Number(String(labels.le).replace('Inf', 'Infinity'));
      if (!(le > bound)) throw new Error(`${where}: bounds do not ascend at ${labels.le}`);
      if (!(value >= below)) throw new Error(`${where}: not cumulative at ${labels.le}`);
      bound = le;
      below = value;
    }
    if (bound !== Number.POSITIVE_INFINITY || below !== count.value) {
      throw new Error(`${where}: the last bucket is not everything`);
    }
    if (!(sum.value >= 0)) throw new Error(`${where}: impossible sum`);
  }
}

/** The sum of a family's series that have these labels; undefined when there is none. */
export function total(
  families: ReadonlyMap<string, Family>,
  name: string,
  labels: Readonly<Record<string, string>> = {},
): number | undefined {
  const all = [...families.values()].flatMap(({ series }) => series);
  const found = all.filter(
    (one) =>
      one.name === name && Object.entries(labels).every(([key, text]) => one.labels[key] === text),
  );
  return found.length === 0 ? undefined : found.reduce((sum, { value }) => sum + value, 0);
}
