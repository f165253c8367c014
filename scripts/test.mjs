// `npm test`: runs every suite in order, one line each, and ends with `N passed, N failed`.
//
//   node scripts/test.mjs [--only SUITE[:FILTER][,SUITE...]] [--soak]
//
//   --only   lint, layers, native, instructions, asan, tsan, fuzz, vitest. The filter is a room of
//            test/native (native:io), a hot path (instructions:raw-read), a fuzzer (fuzz:header) or a
//            file pattern (vitest:keys).
//   --soak   longer variants: sets PQBLK_SOAK=1 and PQBLK_SOAK_SECONDS (300 unless it is set), which
//            the suites read; fuzzers run that long each.
//
// A failing suite does not stop the others, and its output is shown. A suite that ran nothing has
// failed: a pattern that matches no test must not look like a pass. Lines of test output that begin
// with `SKIP: ` or `NOTE: ` (a reason, a seed) are shown in any case; scripts/suites.mjs says how
// each suite counts.
import { suites } from './suites.mjs';

function parseArguments(args) {
  const only = new Map();
  for (let i = 0; i < args.length; i++) {
    if (args[i] === '--soak') {
      process.env.PQBLK_SOAK = '1';
      process.env.PQBLK_SOAK_SECONDS ??= '300';
    } else if (args[i] === '--only' && args[i + 1]) {
      for (const item of args[++i].split(',')) {
        const [name, filter] = item.split(':');
        if (!(name in suites)) usage(`there is no suite '${name}'`);
        only.set(name, filter);
      }
    } else {
      usage(`unexpected argument '${args[i]}'`);
    }
  }
  return only;
}

function usage(problem) {
  console.error(`test: ${problem}`);
  console.error(`usage: test [--soak] [--only SUITE[:FILTER],...]`);
  console.error(`suites: ${Object.keys(suites).join(', ')}`);
  process.exit(2);
}

function counts({ passed, failed, skipped }) {
  return `${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`;
}

async function runSuite(name, filter) {
  const started = performance.now();
  if (process.stdout.isTTY) process.stdout.write(`...   ${name}\r`);
  let result;
  try {
    result = await suites[name](filter);
  } catch (error) {
    result = { passed: 0, failed: 1, skipped: 0, output: `${error.stack}\n`, remarks: [] };
  }
  if (result.passed + result.failed + result.skipped === 0) {
    result = { ...result, failed: 1, output: `${result.output}suite ${name} ran nothing\n` };
  }
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  const word = result.failed > 0 ? 'FAIL' : 'ok';
  console.log(`${word.padEnd(5)} ${name.padEnd(12)} ${counts(result).padEnd(36)} ${seconds} s`);
  for (const remark of result.remarks) console.log(`        ${remark}`);
  if (result.failed > 0) console.log(`${result.output.trimEnd()}\n`);
  return result;
}

const only = parseArguments(process.argv.slice(2));
const total = { passed: 0, failed: 0, skipped: 0 };
for (const name of Object.keys(suites)) {
  if (only.size > 0 && !only.has(name)) continue;
  const result = await runSuite(name, only.get(name));
  for (const key of Object.keys(total)) total[key] += result[key];
}
console.log(counts(total));
process.exitCode = total.failed > 0 || total.passed === 0 ? 1 : 0;
