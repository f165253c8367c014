// `pqblk check --repair --confirm-vmk`: choosing between two copies of the key area brings back what the other
// one has ended, so that policy and audit log are asked as they are for a restore.
import { readFileSync, writeFileSync } from 'node:fs';
import { expect, it } from 'vitest';
import { at, contested, made } from './header-disks.js';
import { exitCode, pqblk } from './helpers.js';

it('takes the second person that the policy asks for, and writes the audit log', async () => {
  const { path, own, repair } = await contested();
  const log = at(`${made}.log`);
  writeFileSync(at('two.yaml'), 'version: 1\ntwoPersons: [header-restore]\n');
  const before = readFileSync(path);
  const rules = ['--policy', at('two.yaml'), '--audit', log];
  const refused = await pqblk(...repair, ...rules);
  expect([refused.code, refused.stderr]).toEqual([
    exitCode('policy'),
    expect.stringContaining('a second person has to approve'),
  ]);
  expect(readFileSync(path).equals(before)).toBe(true);
  expect(await pqblk(...repair, ...rules, '--approve', 'bob')).toMatchObject({ code: 0 });
  const [line = '', ...more] = readFileSync(log, 'utf8').trim().split('\n');
  expect(JSON.parse(line)).toMatchObject({ operation: 'header-restore' });
  expect([JSON.parse(line).approvedBy.length, more]).toEqual([1, []]);
  const verify = ['audit', 'verify', path, '--audit', log, '--key', 'alice', ...own];
  expect(await pqblk(...verify)).toMatchObject({ code: 0 });
  expect((await pqblk('check', path, '--key', 'alice', ...own)).code).toBe(0);
});

it('does it on one word where nobody asks for more', async () => {
  const { path, own, repair } = await contested();
  expect(await pqblk(...repair)).toMatchObject({ code: 0 });
  expect((await pqblk('check', path, '--key', 'alice', ...own)).code).toBe(0);
});
