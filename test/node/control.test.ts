// How a command finds the process that serves a disk: by the disk alone, whatever the environment of
// either says, and whoever else is on the host. What is asked then is in rotate.test.ts.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, linkSync, symlinkSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { expect, it, type TestContext } from 'vitest';
import { findControl } from '../../src/disk/control-place.js';
import { ControlClient, explainLocked, openDisk, serveControl } from '../../src/index.js';
import { DIST, expectKind, openRaw, rawFile, scratch } from './support.js';

const OTHER = fileURLToPath(new URL('./child/other-user.mjs', import.meta.url));
const SIZE = 2 ** 20;
const dir = scratch();
chmodSync(dir, 0o711); // others may look at the disk's file

function other(path: string, what: 'listen' | 'ask') {
  return spawn(process.execPath, [OTHER, DIST, path, what], { stdio: ['pipe', 'pipe', 'inherit'] });
}

async function listening(squatter: ReturnType<typeof other>): Promise<void> {
  const ended = once(squatter, 'close').then(() => Promise.reject(new Error('it ended')));
  await Promise.race([once(squatter.stdout, 'data'), ended]);
  ended.catch(() => {}); // later it may
}

function requireRoot({ skip }: TestContext): void {
  if (process.getuid?.() === 0) return;
  console.log('SKIP: only root can become another user');
  skip();
}

it('finds it by the file, whatever it is called and whatever the environment is', async () => {
  const path = rawFile(dir, SIZE);
  await using disk = await openRaw(path);
  const names = ['XDG_RUNTIME_DIR', 'TMPDIR', 'HOME'] as const;
  const former = names.map((name) => process.env[name]);
  try {
    for (const name of names) process.env[name] = '/nowhere';
    const control = await serveControl(disk);
    for (const name of names) delete process.env[name];
    linkSync(path, `${path}.link`);
    symlinkSync(path, `${path}.symlink`);
    for (const name of [path, `${path}.link`, `${path}.symlink`]) {
      using client = (await ControlClient.open(name)) as ControlClient;
      expect(await client.size()).toBe(SIZE);
    }
    expect(await ControlClient.open(rawFile(dir, SIZE))).toBeUndefined();
    await control.close();
    expect(await ControlClient.open(path)).toBeUndefined();
  } finally {
    for (const [i, name] of names.entries()) {
      if (former[i] !== undefined) process.env[name] = former[i];
    }
  }
});

it('takes as many clients as it can bear, and the next when one has gone', async () => {
  const path = rawFile(dir, SIZE);
  await using disk = await openRaw(path);
  const control = await serveControl(disk);
  const clients = [];
  for (let i = 0; i < 8; i++) clients.push((await ControlClient.open(path)) as ControlClient);
  for (const client of clients) expect(await client.size()).toBe(SIZE);
  using late = (await ControlClient.open(path)) as ControlClient;
  await expectKind(late.size(), 'closed');
  for (const client of clients) client.close();
  await expect
    .poll(
      async () => {
        using client = (await ControlClient.open(path)) as ControlClient;
        return await client.size().catch(() => undefined);
      },
      { timeout: 60_000 },
    )
    .toBe(SIZE);
  await control.close();
});

it('tells whoever meets the lock where it looked', async () => {
  const path = rawFile(dir, SIZE);
  await using holder = await openRaw(path);
  expect(holder.size).toBe(SIZE);
  const locked = await expectKind(openDisk(path, { format: 'raw' }), 'locked');
  const explained = (await explainLocked(locked, path)) as typeof locked;
  expect(explained).toMatchObject({ kind: 'locked', message: locked.message, path });
  expect(explained.hint).toContain((await findControl(path)).prefix);
  expect(explained.hint).toContain('network namespace');
  const another = new Error('of another kind');
  expect(await explainLocked(another, path)).toBe(another);
});

it('believes no other user, and is not kept from the disk by one', async (context) => {
  requireRoot(context);
  const path = rawFile(dir, SIZE);
  await using disk = await openRaw(path);
  const squatter = other(path, 'listen');
  try {
    await listening(squatter);
    expect(await ControlClient.open(path)).toBeUndefined();
    const locked = await expectKind(openDisk(path, { format: 'raw' }), 'locked');
    const { hint } = (await explainLocked(locked, path)) as typeof locked;
    expect(hint).toContain(`process ${squatter.pid} of user 65534`);
    const control = await serveControl(disk);
    using client = (await ControlClient.open(path)) as ControlClient;
    expect(await client.size()).toBe(SIZE);
    await control.close();
  } finally {
    squatter.kill('SIGKILL');
  }
});

it('answers no other user', async (context) => {
  requireRoot(context);
  const path = rawFile(dir, SIZE);
  await using disk = await openRaw(path);
  const control = await serveControl(disk);
  const stranger = other(path, 'ask');
  let answer = '';
  stranger.stdout.on('data', (text) => {
    answer += text;
  });
  await once(stranger, 'close');
  expect(JSON.parse(answer)).toEqual({
    code: 'PQBLK_PERMISSION',
    hint: 'run the command as user 0, or as root',
  });
  await control.close();
});
