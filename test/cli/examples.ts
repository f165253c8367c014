// Documentation that is run: every fenced block of a page marked `run`, in order, in one directory, as
// a reader would type them. Shell blocks see the built `pqblk` on their PATH, JavaScript blocks import
// the package by its name.
import { spawnSync } from 'node:child_process';
import { chmodSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect } from 'vitest';
import { MAIN } from './helpers.js';

export const ROOT = fileURLToPath(new URL('../..', import.meta.url));

export interface Example {
  readonly language: string;
  readonly heading: string;
  readonly text: string;
  readonly index: number;
}

/** The examples of a page of the project, by its path. */
export function examplesOf(page: string): Example[] {
  const found: Example[] = [];
  for (const section of readFileSync(join(ROOT, page), 'utf8').split(/^## /m).slice(1)) {
    const heading = section.slice(0, section.indexOf('\n'));
    for (const [, language = '', text = ''] of section.matchAll(
      /^```(\w+) run\n([\s\S]*?)^```$/gm,
    )) {
      found.push({ language, heading, text, index: found.length });
    }
  }
  return found;
}

/** What the examples in `dir` see: `pqblk` on the PATH, the package, a key store of their own. */
export function exampleEnvironment(dir: string, more: NodeJS.ProcessEnv = {}): NodeJS.ProcessEnv {
  const bin = join(dir, 'bin');
  mkdirSync(bin, { recursive: true });
  const shim = join(bin, 'pqblk');
  writeFileSync(shim, `#!/bin/sh\nexec "${process.execPath}" "${MAIN}" "$@"\n`);
  chmodSync(shim, 0o755);
  mkdirSync(join(dir, 'node_modules'), { recursive: true });
  symlinkSync(ROOT, join(dir, 'node_modules', 'pqblk'));
  return {
    ...process.env,
    PATH: `${bin}:${process.env.PATH}`,
    PQBLK_KEYS: join(dir, 'keys'),
    ...more,
  };
}

/** An example that waits for a server waits for ever when the server does not start. */
const EXAMPLE_MS_MAX = 120_000;

/** Runs one example; the test fails unless it ends well, and in time. */
export function runExample(dir: string, env: NodeJS.ProcessEnv, example: Example): void {
  const { language, text, index } = example;
  const script = join(dir, `example-${index}.${language === 'js' ? 'mjs' : 'sh'}`);
  writeFileSync(script, text);
  const [file, args] = language === 'js' ? [process.execPath, [script]] : ['sh', ['-eu', script]];
  const { status, stdout, stderr } = spawnSync(file, args, {
    cwd: dir,
    env,
    encoding: 'utf8',
    timeout: EXAMPLE_MS_MAX,
  });
  expect({ status, stderr, stdout }).toMatchObject({ status: 0 });
}
