// What the tests of the command line share: running a command line in this process, and as a program.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll } from 'vitest';
import { run } from '../../src/cli/program.js';
import type { ErrorKind } from '../../src/errors.js';
import { ERROR_TABLE } from '../../src/errors.js';

export const MAIN = fileURLToPath(new URL('../../dist/cli/main.cjs', import.meta.url));

export interface Outcome {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A directory for one test file, removed after it. */
export function scratch(where = tmpdir()): string {
  const path = mkdtempSync(join(where, 'pqblk-cli-'));
  afterAll(() => rmSync(path, { recursive: true, force: true }));
  return path;
}

/** Runs the command line in this process, as a pipe would see it. */
export async function pqblk(...argv: string[]): Promise<Outcome> {
  return await pqblkWith({}, ...argv);
}

export async function pqblkWith(
  options: { signal?: AbortSignal; isTTY?: boolean; env?: NodeJS.ProcessEnv },
  ...argv: string[]
): Promise<Outcome> {
  const written = { stdout: '', stderr: '' };
  const stream = (name: 'stdout' | 'stderr') => ({
    isTTY: options.isTTY ?? false,
    write: (text: string) => {
      written[name] += text;
    },
  });
  const code = await run(argv, {
    stdout: stream('stdout'),
    stderr: stream('stderr'),
    env: options.env ?? {},
    signal: options.signal ?? new AbortController().signal,
  });
  return { code, ...written };
}

/** The JSON a command printed; fails with its error when it did not succeed. */
export async function pqblkJson<T = Record<string, unknown>>(...argv: string[]): Promise<T> {
  const { code, stdout, stderr } = await pqblk(...argv, '--json');
  if (code !== 0) throw new Error(`pqblk ${argv.join(' ')}: exit ${code}: ${stderr}`);
  return JSON.parse(stdout) as T;
}

export const exitCode = (kind: ErrorKind): number => ERROR_TABLE[kind].exitCode;

/** Runs the built program. `dist/` is made by scripts/setup before the tests. */
export function program(...argv: string[]): Outcome {
  if (!existsSync(MAIN)) throw new Error('dist/cli/main.cjs is missing; run `npm run build:ts`');
  const { status, stdout, stderr } = spawnSync(process.execPath, [MAIN, ...argv], {
    encoding: 'utf8',
  });
  return { code: status ?? -1, stdout, stderr };
}

/** Runs a peer program and returns its stdout; fails loudly when it fails. */
export function peer(file: string, ...argv: string[]): string {
  const { status, stdout, stderr, error } = spawnSync(file, argv, { encoding: 'utf8' });
  if (error) throw error;
  if (status !== 0)
    throw new Error(`${file} ${argv.join(' ')}: exit ${status}: ${stderr}${stdout}`);
  return stdout;
}
