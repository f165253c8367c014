// The README's examples are run, and the pages of docs/ that have some.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { haveNss, NSS_MODULE } from '../keys/pkcs11-support.js';
import { exampleEnvironment, examplesOf, ROOT, runExample } from './examples.js';
import { scratch } from './helpers.js';

describe('README', () => {
  const dir = scratch();
  const env = exampleEnvironment(dir, { MY_PASSPHRASE: 'correct horse battery staple' });
  const found = examplesOf('README.md');

  it('has examples of both kinds', () => {
    const languages = new Set(found.map(({ language }) => language));
    expect(languages).toEqual(new Set(['sh', 'js']));
  });

  it.each(found)('$heading: example $index runs', (example) => runExample(dir, env, example));
});

describe.runIf(haveNss())('docs/tokens.md', () => {
  const dir = scratch();
  const env = exampleEnvironment(dir, { MODULE: NSS_MODULE });
  const found = examplesOf('docs/tokens.md');

  it('has examples', () => expect(found.length).toBeGreaterThan(4));

  it.each(found)('$heading: example $index runs', (example) => runExample(dir, env, example));
});

describe('docs/key-management.md', () => {
  const dir = scratch();
  // Each block is a shell of its own: what the page exports, they all see.
  const env = exampleEnvironment(dir, {
    PQBLK_POLICY: join(dir, 'policy.yaml'),
    XDG_STATE_HOME: join(dir, 'state'),
  });
  const found = examplesOf('docs/key-management.md');

  it('has examples', () => expect(found.length).toBeGreaterThan(8));

  it.each(found)('$heading: example $index runs', (example) => runExample(dir, env, example));
});

it('names no file of docs/ that is not there', () => {
  const readme = readFileSync(join(ROOT, 'README.md'), 'utf8');
  for (const [, path = ''] of readme.matchAll(/\]\((docs\/[^)#]+)/g)) {
    expect(() => readFileSync(join(ROOT, path)), path).not.toThrow();
  }
});
