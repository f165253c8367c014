// A comparison: contenders measured in turn, round by round, and what came of it.
//
// Pure but for what it is handed: `step` runs one contender once. Rounds go through the contenders
// forward and backward (A B C, C B A, …), so that a machine that grows slower or faster favours none.
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
        for (const { contender, row } of round % 2 ? pairs.toReversed() : pairs) {
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
