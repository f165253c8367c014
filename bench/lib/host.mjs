// What the host does to a sample: on a virtual machine other guests get the cores now and then, and
// the kernel counts that time as stolen. A sample in which they got more than a twentieth says little
// about us; it is measured again, whatever it came to.
import { readFileSync } from 'node:fs';

/** The share of the cores' time from which on a sample is measured again. */
export const STOLEN_MAX = 0.05;
/** Longer samples are not: they average, and would take too long. */
const LONGEST_MS = 5000;

/** { all, stolen }: the cores' time since the start, in ticks, from the text of /proc/stat. */
export function coreTime(text) {
  // user nice system idle iowait irq softirq steal; what follows is counted in these already.
  const ticks = /^cpu +(.*)$/m.exec(text)?.[1].split(' ').slice(0, 8).map(Number) ?? [];
  return { all: ticks.reduce((sum, each) => sum + each, 0), stolen: ticks[7] ?? 0 };
}

const coreTimeNow = () => coreTime(readFileSync('/proc/stat', 'utf8'));

/**
 * Calls `once` until the host left it its cores, at most `tries` times. Answers the last result, how
 * many came before it, and whether the host was still at it.
 */
export async function undisturbed(once, { tries, now = coreTimeNow, clock = Date.now }) {
  for (let repeated = 0; ; repeated += 1) {
    const began = clock();
    const before = now();
    const result = await once();
    const after = now();
    const stolen = (after.stolen - before.stolen) / Math.max(1, after.all - before.all);
    const disturbed = stolen > STOLEN_MAX;
    if (!disturbed || repeated + 1 >= tries || clock() - began > LONGEST_MS) {
      return { result, repeated, disturbed };
    }
  }
}
