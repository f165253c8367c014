// Sealed disks, the keys that they are sealed to, and policies: for tests of what one may do to keys.
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll } from 'vitest';
import type { ChangedKeyArea } from '../../src/index.js';
import { exitCode, pqblk, pqblkJson, scratch } from './helpers.js';

const dir = scratch();
export const at = (name: string) => join(dir, name);
export const withStore = (argv: string[]) => [...argv, '--store', at('keys')];
export const run = (...argv: string[]) => pqblk(...withStore(argv));
export const report = (...argv: string[]) => pqblkJson<ChangedKeyArea>(...withStore(argv));
export const refused = exitCode('policy');

beforeAll(async () => {
  for (const name of ['alice', 'bob', 'carol']) {
    await run('key', 'gen', name, '--no-passphrase');
  }
  for (const name of ['hybrid', 'hybrid-2']) {
    await run('key', 'gen', name, '--no-passphrase', '--kem', 'x-wing');
  }
  await run('key', 'gen', 'wide', '--no-passphrase', '--kem', 'ml-kem-1024');
});

/** Of disks and policies; the number of the newest. */
export let made = 0;

export async function disk(...argv: string[]): Promise<string> {
  made += 1;
  const path = at(`${made}.sealed`);
  await pqblkJson(...withStore(['create', path, '16M', '--log-size', '8M', ...argv]));
  return path;
}

export function policy(text: string): string {
  made += 1;
  const path = at(`policy-${made}.yaml`);
  writeFileSync(path, `version: 1\n${text}\n`);
  return path;
}
