// A comparison: contenders measured in turn, round by round, and what came of it.
//
// Pure but for what it is handed: `step` runs one contender once.
import { summarise } from './stats.mjs';

/** The result of a plan before anything was measured; see lib/bench.mjs for what a plan holds. */
export function groupOf(plan, set) {
  const { group, about, unit, better = 'more', base, x, targets = [] } = plan;
  const xs = x ? x.values : [undefined];
  return {
    ...{ set, group, about, unit, better, base, x },
    host: { repeated: 0, disturbed: 0 }, // samples: lib/host.mjs
    rows: plan.contenders.map(({ name, missing, call = [] }) => ({
      name,
      ...(missing && { missing }),
      points: xs.map((at) => ({ ...(at !== undefined && { x: at }), samples: [], details: [] })),
      commands: [call].flat(),
    })),
    targets: targets.map((target) => ({ ...target })),
  };
}

/**
 * The order of a round. Every second one is the one before backward, so that a machine that grows
 * slower or faster favours none; each two have other neighbours than the two before (a Williams
 * design: 0, 1, n-1, 2, n-2, … and so many further), so that nobody always comes after the same one.
 */
export function orderOf(count, round) {
  const first = Array.from({ length: count }, (_, i) => (i % 2 ? (i + 1) / 2 : count - i / 2));
  const order = first.map((each) => (each + (round >> 1)) % count);
  return round % 2 ? order.toReversed() : order;
}

/** Whether another round may show what the ones so far did not. */
const leavesOpen = (group) => summarise(group).targets.some(({ open }) => open);

const sampleOf = (result) => (typeof result === 'number' ? { value: result } : result);

/**
 * Measures `plan` for so many rounds into `group`; for up to `most` while a target is open. What they
 * stop at is not whether it is met. A contender that fails is a row that says why;
 * the others go on. What `step` throws itself ends the comparison, with what there is summarised.
 */
export async function measure(plan, group, { rounds, most = rounds, step }) {
  const pairs = plan.contenders.map((contender, i) => ({ contender, row: group.rows[i] }));
  try {
    for (let round = 0; round < rounds || (round < most && leavesOpen(group)); round++) {
      group.rounds = { asked: rounds, taken: round + 1 };
      for (const [i, { x }] of group.rows[0].points.entries()) {
        for (const { contender, row } of orderOf(pairs.length, round).map((n) => pairs[n])) {
          if (row.missing) continue;
          const where = { row, round, rounds: Math.max(rounds, round + 1), x };
          const { error, result } = await step(where, () => contender.run(x));
          if (error) {
            row.missing = `failed: ${error.message.trim()}`;
            row.failed = true;
            continue;
          }
          const { value, ...detail } = sampleOf(result);
          row.points[i].samples[round] = value;
          row.points[i].details[round] = detail;
        }
      }
    }
  } finally {
    summarise(group);
  }
  return group;
}
