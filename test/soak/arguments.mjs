// The words after `npm run test:soak --`: what they say, or one line of what is wrong with them.
import { parseArgs } from 'node:util';

/** The line that is said before the soak ends with 2. */
export class BadArguments extends Error {}

const PARTS = ['load', 'suites'];

/** A number that is written in digits: what Number() makes of '' or '0x1f' was not meant. */
function number(values, name, { whole, least }) {
  const text = values[name];
  const found = Number(text);
  const digits = whole ? /^\d+$/ : /^(\d+\.?\d*|\.\d+)$/;
  if (digits.test(text) && Number.isFinite(found) && found >= least) {
    if (!whole || Number.isSafeInteger(found)) return found;
  }
  const kind = whole ? `a whole number from ${least}` : 'a number above 0';
  throw new BadArguments(`--${name} takes ${kind}, not '${text}'`);
}

function parsed(args, out) {
  try {
    return parseArgs({
      args,
      options: {
        minutes: { type: 'string', default: '120' },
        seed: { type: 'string', default: String(Date.now() % 1_000_000) },
        episode: { type: 'string' },
        quick: { type: 'boolean', default: false },
        only: { type: 'string' },
        out: { type: 'string', default: out },
        help: { type: 'boolean', short: 'h', default: false },
      },
    }).values;
  } catch (error) {
    throw new BadArguments(error.message.split('\n')[0]);
  }
}

/** `out`: where the report goes when nothing else is said. Throws BadArguments. */
export function readArguments(args, out) {
  const values = parsed(args, out);
  if (values.only !== undefined && !PARTS.includes(values.only)) {
    throw new BadArguments(`--only takes ${PARTS.join(' or ')}, not '${values.only}'`);
  }
  return {
    ...values,
    minutes: number(values, 'minutes', { whole: false, least: Number.MIN_VALUE }),
    seed: number(values, 'seed', { whole: true, least: 0 }),
    ...(values.episode !== undefined && {
      episode: number(values, 'episode', { whole: true, least: 0 }),
    }),
  };
}
