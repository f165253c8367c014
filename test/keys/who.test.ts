// Who is behind a change, as the audit log will have it.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { userInfo } from 'node:os';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { whoAsks } from '../../src/keys/who.js';

const CHILD = fileURLToPath(new URL('./child/who.mjs', import.meta.url));
const BUILT = fileURLToPath(new URL('../../dist/keys/who.js', import.meta.url));

/** Of the login that the kernel knows, where it is another user. */
function login(uid: number | undefined): object {
  const known = Number(readFileSync('/proc/self/loginuid', 'ascii'));
  return known === 2 ** 32 - 1 || known === uid ? {} : { loginUid: known };
}

test('the user, and who called sudo', () => {
  const { username: user, uid } = userInfo();
  expect(whoAsks({})).toEqual({ user, ...login(uid) });
  expect(whoAsks({ SUDO_USER: 'alice' })).toEqual({ user, sudoUser: 'alice', ...login(uid) });
  expect(whoAsks({ SUDO_USER: 'x'.repeat(9999) }).sudoUser).toBe('x'.repeat(64));
});

test('a user that no passwd knows has a number', ({ skip }) => {
  if (process.getuid?.() !== 0) {
    console.log('SKIP: only root can become another user');
    skip();
  }
  const { stdout, stderr } = spawnSync(process.execPath, [CHILD, BUILT], {
    encoding: 'utf8',
    env: { ...process.env, SUDO_USER: 'alice' },
  });
  expect(stderr).toBe('');
  const who = { user: 'uid 3000017', sudoUser: 'alice', ...login(3_000_017) };
  expect(JSON.parse(stdout)).toEqual(who);
});
