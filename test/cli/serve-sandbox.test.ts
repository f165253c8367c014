// What a serving process has given up, as the kernel tells it, and that it serves all the same.
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { exitCode, MAIN, peer, pqblk, pqblkJson, scratch } from './helpers.js';
import { running, serve } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const DIST = fileURLToPath(new URL('../../dist/index.js', import.meta.url));
const UNIT = fileURLToPath(new URL('../../examples/pqblk.service', import.meta.url));
const CHILD = fileURLToPath(new URL('../node/child/sandboxed.mjs', import.meta.url));

/** One line of the status of every thread of a process. */
function statusOf(pid: number | undefined, name: string): string[] {
  return readdirSync(`/proc/${pid}/task`).map((task) => {
    const status = readFileSync(`/proc/${pid}/task/${task}/status`, 'utf8');
    return String(new RegExp(`^${name}:\\s*(.*)$`, 'm').exec(status)?.[1]);
  });
}

/** How many filters of system calls each thread has; this process may have been given some. */
const filtersOf = (pid: number | undefined) =>
  new Set(statusOf(pid, 'Seccomp_filters').map((count) => Number(count) - given));
const given = Number(statusOf(process.pid, 'Seccomp_filters')[0]);

/** Runs a program that may lock no memory, until it says that it is ready. */
async function lockingNone(...argv: string[]): Promise<{ stderr: string }> {
  const powerless = ['setpriv', '--bounding-set=-ipc_lock', '--inh-caps=-ipc_lock', '--'];
  const drop = process.getuid?.() === 0 ? powerless : [];
  const child = spawn('prlimit', ['--memlock=0:0', ...drop, process.execPath, ...argv]);
  running.add(child);
  let stderr = '';
  child.stderr.on('data', (text) => {
    stderr += text;
  });
  const closed = once(child, 'close');
  await Promise.race([once(child.stdout, 'data'), closed]);
  child.kill('SIGTERM');
  await closed;
  running.delete(child);
  return { stderr };
}

describe('the sandbox of serve', () => {
  beforeAll(async () => {
    await pqblkJson('key', 'gen', 'alice', '--no-passphrase', '--store', at('keys'));
    await pqblkJson('create', at('vm.sealed'), '8M', '--key', 'alice', '--store', at('keys'));
    writeFileSync(at('source.raw'), Buffer.alloc(8 << 20, 'pqblk'));
  });

  it('holds in every thread, and lets it serve', async () => {
    const argv = ['--nbd', at('s.sock'), '--vhost-user', at('v.sock'), '--stats', at('m.sock')];
    const server = await serve(at('vm.sealed'), ...argv, '--store', at('keys'), '--queues', '2');
    const { pid } = server.child;
    expect(filtersOf(pid)).toEqual(new Set([1]));
    expect(new Set(statusOf(pid, 'NoNewPrivs'))).toEqual(new Set(['1']));
    expect(readFileSync(`/proc/${pid}/limits`, 'utf8')).toMatch(/^Max core file size +0 +0 /m);
    peer('nbdcopy', at('source.raw'), String(server.uris[1]));
    peer('nbdcopy', String(server.uris[1]), at('copy.raw'));
    peer('cmp', at('source.raw'), at('copy.raw'));
    expect(filtersOf(pid)).toEqual(new Set([1]));
    expect(await server.end()).toBe(0);
    expect(server.stderr()).toBe('');
    expect(server.stdout()).toContain(
      'sandbox: no new privileges, no core dumps, system call filter\n',
    );
  });

  it('cannot keep keys from swap where no memory may be locked, and says so', async () => {
    const key = ['--key', 'alice', '--store', at('keys')];
    const warning = /^pqblk: warning: keys are not in locked memory /gm;
    const server = await lockingNone(MAIN, 'serve', at('vm.sealed'), '--nbd', at('u.sock'), ...key);
    expect(server.stderr.match(warning)).toHaveLength(1);
    const plain = await lockingNone(MAIN, 'serve', at('source.raw'), '--nbd', at('w.sock'));
    expect(plain.stderr).toBe(''); // has no keys
    const agent = await lockingNone(
      MAIN,
      'agent',
      at('vm.sealed'),
      '--socket',
      at('a.sock'),
      ...key,
    );
    expect(agent.stderr.match(warning)).toHaveLength(1);
  });

  it('can be left out', async () => {
    await pqblkJson('create', at('plain.raw'), '1M', '--format', 'raw');
    const server = await serve(at('plain.raw'), '--nbd', at('p.sock'), '--no-sandbox');
    expect(filtersOf(server.child.pid)).toEqual(new Set([0]));
    expect(await server.end()).toBe(0);
    expect(server.stdout()).toContain('sandbox: no new privileges\n');
  });

  it('refuses to start programs, in threads from before and after', () => {
    writeFileSync(at('child.raw'), Buffer.alloc(1 << 20));
    const results = JSON.parse(peer(process.execPath, CHILD, DIST, at('child.raw')));
    const refused = { execve: 'EPERM', setuid: 'EPERM' };
    expect(results).toEqual({
      said: [true, null],
      before: { execve: 'allowed', setuid: 'allowed' },
      after: refused,
      inEarlyThread: refused,
      inLateThread: refused,
      cores: ['0', '0'],
    });
  });
});

describe('examples/pqblk.service', () => {
  it('is what systemd understands, and leaves little open', (context) => {
    if (spawnSync('systemd-analyze', ['--version']).error) {
      console.log('SKIP: no systemd-analyze here');
      context.skip();
    }
    const unit = readFileSync(UNIT, 'utf8');
    const installed = unit
      .replace('/usr/local/bin/pqblk', process.execPath)
      .replace(/^(User|Group)=pqblk/gm, '$1=daemon');
    expect(installed).not.toBe(unit);
    writeFileSync(at('pqblk.service'), installed);
    const verify = spawnSync('systemd-analyze', ['verify', '--man=no', at('pqblk.service')], {
      encoding: 'utf8',
    });
    const about = verify.stderr.split('\n').filter((line) => line.includes('pqblk.service'));
    expect(about).toEqual([]);
    // Its own measure of exposure, 0 to 10, without a system manager at hand.
    const rating = spawnSync(
      'systemd-analyze',
      ['security', '--offline=yes', '--threshold=30', '--no-pager', at('pqblk.service')],
      { encoding: 'utf8' },
    );
    expect(`${rating.stdout}${rating.stderr}`).toMatch(/exposure level.*: [0-2]\.\d/);
    expect(rating.status).toBe(0);
  });

  it('tries nothing again that stays wrong', async () => {
    const unit = readFileSync(UNIT, 'utf8');
    const never = /^RestartPreventExitStatus=(.*)$/m.exec(unit)?.[1]?.split(' ').map(Number);
    writeFileSync(at('wrong.yaml'), 'disks: 7\n');
    const config = await pqblk('serve', '--config', at('wrong.yaml'));
    expect(never).toContain(config.code);
    const others = [
      'usage',
      'wrong_key',
      'wrong_passphrase',
      'wrong_pin',
      'pin_locked',
      'policy',
    ] as const;
    expect(never).toEqual(expect.arrayContaining(others.map((kind) => exitCode(kind))));
  });
});
