// The README's examples are run: every fenced block marked `run`, in order, in one directory, as a
// reader would type them. Shell blocks see the built `pqblk` on their PATH, JavaScript blocks import
// the package by its name.
import { spawnSync } from 'node:child_process';
import { chmodSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { MAIN, scratch } from './helpers.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const readme = readFileSync(join(root, 'README.md'), 'utf8');
const dir = scratch();

interface Block {
  readonly language: string;
  readonly heading: string;
  readonly text: string;
}

function blocks(): Block[] {
  const found: Block[] = [];
  for (const section of readme.split(/^## /m).slice(1)) {
    const heading = section.slice(0, section.indexOf('\n'));
    for (const [, language = '', text = ''] of section.matchAll(
      /^```(\w+) run\n([\s\S]*?)^```$/gm,
    )) {
      found.push({ language, heading, text });
    }
  }
  return found;
}

function environment(): NodeJS.ProcessEnv {
  const bin = join(dir, 'bin');
  mkdirSync(bin, { recursive: true });
  const shim = join(bin, 'pqblk');
  writeFileSync(shim, `#!/bin/sh\nexec "${process.execPath}" "${MAIN}" "$@"\n`);
  chmodSync(shim, 0o755);
  mkdirSync(join(dir, 'node_modules'), { recursive: true });
  symlinkSync(root, join(dir, 'node_modules', 'pqblk'));
  return {
    ...process.env,
    PATH: `${bin}:${process.env.PATH}`,
    PQBLK_KEYS: join(dir, 'keys'),
    MY_PASSPHRASE: 'correct horse battery staple',
  };
}

describe('README', () => {
  const env = environment();
  const found = blocks();

  it('has examples of both kinds', () => {
    const languages = new Set(found.map(({ language }) => language));
    expect(languages).toEqual(new Set(['sh', 'js']));
  });

  it.each(found.map((block, index) => ({ ...block, index })))(
    '$heading: example $index runs',
    ({ language, text, index }) => {
      const script = join(dir, `example-${index}.${language === 'js' ? 'mjs' : 'sh'}`);
      writeFileSync(script, text);
      const [file, args] =
        language === 'js' ? [process.execPath, [script]] : ['sh', ['-eu', script]];
      const { status, stdout, stderr } = spawnSync(file, args, { cwd: dir, env, encoding: 'utf8' });
      expect({ status, stderr, stdout }).toMatchObject({ status: 0 });
    },
  );
});

it('names no file of docs/ that is not there', () => {
  for (const [, path = ''] of readme.matchAll(/\]\((docs\/[^)#]+)/g)) {
    expect(() => readFileSync(join(root, path)), path).not.toThrow();
  }
});
