// When the soak says that memory grows: series made here, of which it is known whether they leak.
import { describe, expect, it } from 'vitest';
// @ts-expect-error: JavaScript without declarations
import { Random } from './random.mjs';
// @ts-expect-error: JavaScript without declarations
import { judgeMemory } from './report.mjs';

const MiB = 1024; // in KiB
const MINUTE = 60;
const EVERY = 2; // seconds

/** What is said of a server that holds `mib(t)` at t seconds. */
function judged(minutes: number, mib: (seconds: number) => number) {
  const samples = [];
  for (let now = 0; now <= minutes * MINUTE; now += EVERY) {
    const residentKiB = Math.round(mib(now) * MiB);
    samples.push({ now, name: 'server', residentKiB, descriptors: 48, threads: 21 });
  }
  return judgeMemory(samples)[0];
}
const problems = (minutes: number, mib: (seconds: number) => number) =>
  judged(minutes, mib).problems;
const growing = (mibPerHour: number) => (seconds: number) => 200 + (mibPerHour * seconds) / 3600;
/** Up and down by as much as `mib`, in any order. */
function noise(mib: number) {
  const random = new Random(1);
  return () => random.between(-mib, mib);
}

describe('resident memory', () => {
  it('may be flat, for hours', () => {
    const { kibPerHour, halves, problems } = judged(600, () => 200);
    expect({ kibPerHour, halves, problems }).toEqual({
      kibPerHour: 0,
      halves: [0, 0],
      problems: [],
    });
  });

  it('may not grow by more than 24 MiB an hour', () => {
    const { kibPerHour, halves, residentKiB, problems } = judged(30, growing(40));
    expect(kibPerHour).toBe(40 * MiB);
    expect(halves).toEqual([40 * MiB, 40 * MiB]);
    expect(residentKiB[1] - residentKiB[0]).toBeLessThan(24 * MiB); // the thirds see nothing yet
    expect(problems).toEqual([
      `server grows all the time: ${40 * MiB} KiB an hour, ${40 * MiB} and ${40 * MiB} in the halves`,
    ]);
    expect(ofSlope(30, 20)).toEqual([]);
  });

  it('may not grow by more than 24 MiB between its thirds, however slowly', () => {
    expect(ofSlope(600, 4)).toEqual([]); // 21 MiB
    const [problem, ...more] = ofSlope(600, 10);
    expect(problem).toMatch(/^server holds \d+ residentKiB more in its last third/);
    expect(more).toEqual([]);
  });

  it('is judged by its slope from 20 minutes on, and from 8 MiB in all', () => {
    expect(ofSlope(19, 100)).toEqual([]);
    expect(ofSlope(20, 29)).toEqual([]); // 7.7 MiB in the 16 minutes after the warm-up
    expect(ofSlope(20, 31)).toHaveLength(1);
  });

  it('may be noisy, and grows beneath the noise', () => {
    for (const minutes of [20, 80]) {
      const random = noise(10);
      expect(problems(minutes, () => 200 + random())).toEqual([]);
    }
    const random = noise(10);
    expect(problems(40, (t) => growing(40)(t) + random())).toHaveLength(1);
  });

  it('may rise while caches fill, and to a high mark that it keeps', () => {
    expect(problems(30, (t) => 200 + 50 * Math.min(1, t / (6 * MINUTE)))).toEqual([]);
    for (const at of [15, 30, 45, 55]) {
      expect(problems(60, (t) => (t < at * MINUTE ? 215 : 235))).toEqual([]);
    }
  });

  it('grows in steps as well as in a line', () => {
    const steps = (t: number) => 200 + 5 * Math.floor(t / (5 * MINUTE)); // 60 MiB an hour
    expect(problems(40, steps)).toHaveLength(1);
  });
});

function ofSlope(minutes: number, mibPerHour: number) {
  return problems(minutes, growing(mibPerHour));
}
