// What a run reads and writes outside its scratch places: reports, and directories it was told of.
// What is wrong with one is an Unusable: one line for whoever typed its name.
import { mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { htmlReport } from './report.mjs';

/** What `pqblkBench` is in the reports that these programs write and read. */
export const REPORT_VERSION = 1;

export class Unusable extends Error {}

/** `path` and its parents that are not there, the outermost first. */
function absent(path) {
  const found = [];
  for (let at = path; statSync(at, { throwIfNoEntry: false }) === undefined; at = dirname(at)) {
    found.unshift(at);
  }
  return found;
}

/**
 * The directory `path`, made where it is not there, and tried: a file was written to it. `option`
 * is who named it. One level at a time, since mkdir's `recursive` never ends below /proc.
 */
export function writableDirectory(option, path) {
  const whole = resolve(path);
  try {
    for (const directory of absent(whole)) mkdirSync(directory);
    rmSync(mkdtempSync(join(whole, '.pqblk-bench-')), { recursive: true });
  } catch (error) {
    throw new Unusable(
      `${option} ${path}: expected a directory that can be written to: ${error.message}`,
    );
  }
  return whole;
}

/** A finished run from its JSON. */
export function readReport(path) {
  const unusable = (what) =>
    new Unusable(`${path}: expected the JSON that a run wrote, found ${what}`);
  let report;
  try {
    report = JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    throw unusable(error instanceof SyntaxError ? `no JSON: ${error.message}` : error.message);
  }
  const version = report?.pqblkBench;
  if (version === undefined) throw unusable(`JSON without "pqblkBench": ${REPORT_VERSION}`);
  if (version !== REPORT_VERSION) throw unusable(`"pqblkBench": ${JSON.stringify(version)}`);
  if (!Array.isArray(report.groups)) throw unusable('no list of groups in it');
  return report;
}

/** Makes the HTML of a finished run again, beside its JSON and under another name; answers that. */
export function writeReportOf(path) {
  const html = path.endsWith('.json') ? path.replace(/\.json$/, '.html') : `${path}.html`;
  const text = htmlReport(readReport(path));
  try {
    writeFileSync(html, text);
  } catch (error) {
    throw new Unusable(`${html}: expected a file that can be written: ${error.message}`);
  }
  return html;
}

function writeTo(directory, result) {
  const name = result.started.slice(0, 19).replaceAll(':', '-');
  const [json, html] = ['json', 'html'].map((suffix) => join(directory, `${name}.${suffix}`));
  writeFileSync(json, `${JSON.stringify(result, undefined, 1)}\n`);
  writeFileSync(html, htmlReport(result));
  return { json, html };
}

/**
 * Writes a run's JSON and HTML to the directory `out`; to a new temporary one when that is not to
 * be written to any more, and then says why in `refused`. Hours of measuring are not to be lost.
 */
export function writeResults(out, result) {
  try {
    return writeTo(out, result);
  } catch (error) {
    const instead = mkdtempSync(join(tmpdir(), 'pqblk-bench-results-'));
    return { ...writeTo(instead, result), refused: error.message };
  }
}
