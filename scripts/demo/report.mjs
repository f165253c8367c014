// What the demo prints, and how it counts: headings, ticks, an aligned table. A proof that fails marks
// the whole run as failed; nothing is hidden where stdout is no terminal.
import { styleText } from 'node:util';

const coloured = process.stdout.isTTY && !process.env.NO_COLOR;
const paint = (style, text) => (coloured ? styleText(style, text) : text);
const started = performance.now();
let step = 0;
let failures = 0;
let proofs = 0;

export const failed = () => failures > 0;

export function title(text, remark) {
  console.log(`\n${paint('bold', text)}\n${paint('dim', remark)}`);
}

export function heading(text) {
  step += 1;
  const seconds = ((performance.now() - started) / 1000).toFixed(0).padStart(3);
  console.log(`\n${paint(['bold', 'cyan'], `${step}. ${text}`)}  ${paint('dim', `${seconds} s`)}`);
}

/** Something that was done. */
export function done(text) {
  console.log(`   ${text}`);
}

/** Something that was proven, or was not. */
export function prove(holds, text, otherwise = '') {
  proofs += 1;
  if (!holds) failures += 1;
  const mark = holds ? paint('green', '✓') : paint(['bold', 'red'], '✗');
  console.log(` ${mark} ${text}${holds || !otherwise ? '' : `\n     ${otherwise}`}`);
}

/** A command line as one would type it. */
export function command(words) {
  console.log(paint('dim', `   $ pqblk ${words.join(' ')}`));
}

/** The first column to the left, numbers to the right. */
export function table(rows) {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  const line = (row) =>
    row
      .map((cell, column) =>
        column === 0 ? cell.padEnd(widths[0]) : cell.padStart(widths[column]),
      )
      .join('   ');
  console.log(`\n   ${paint('dim', line(rows[0]))}`);
  for (const row of rows.slice(1)) console.log(`   ${line(row)}`);
}

export function verdict() {
  const seconds = ((performance.now() - started) / 1000).toFixed(0);
  const text =
    failures === 0 ? `All ${proofs} proofs hold` : `${failures} of ${proofs} proofs failed`;
  console.log(`\n${paint(['bold', failures === 0 ? 'green' : 'red'], text)} (${seconds} s)`);
}
