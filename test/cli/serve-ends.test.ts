// Servers and commands that have nothing left to do, and descriptors that are no sockets.
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { parseExposition, total } from './exposition.js';
import { exitCode, MAIN, pqblk, pqblkJson, scratch } from './helpers.js';
import { httpGet, running } from './serving.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const disk = at('d.raw');
const PATIENCE = { timeout: 120_000, interval: 20 };

// The read end and the holder's end stay open over exec: $^F.
const FULL_STDERR =
  'use Fcntl; $^F = 10; pipe(R, W); fcntl(W, F_SETFL, O_WRONLY | O_NONBLOCK); ' +
  '1 while syswrite(W, "x" x 4096); fcntl(W, F_SETFL, O_WRONLY); open(STDERR, ">&W"); exec @ARGV';
const CONNECTED =
  'use Socket; $^F = 10; socketpair(A, B, AF_UNIX, SOCK_STREAM, 0); fileno(A) == 3 or die; ' +
  'if (!fork()) { close A; <STDIN>; exit } close B; exec @ARGV';

beforeAll(async () => {
  await pqblkJson('create', disk, '1M', '--format', 'raw');
});

function perl(script: string, ...argv: string[]): ChildProcess {
  const child = spawn('perl', ['-e', script, process.execPath, MAIN, ...argv]);
  running.add(child);
  return child;
}

describe('serve --vhost-user fd:N', () => {
  it('ends when the connection that it inherited does', async () => {
    const child = perl(CONNECTED, 'serve', disk, '--vhost-user', 'fd:3');
    const ended = once(child, 'close');
    let said = '';
    child.stdout?.on('data', (text) => {
      said += text;
    });
    await vi.waitFor(() => expect(said).toContain('ready: vhost-user-blk:fd:3'), PATIENCE);
    child.stdin?.end();
    expect((await ended)[0]).toBe(0);
    expect((await pqblk('check', disk)).code).toBe(0); // nobody has it
  });

  it.each(['fd:x', 'fd:-1', 'fd:2', 'fd:03', 'fd:'])('refuses %s', async (place) => {
    const refused = await pqblk('serve', disk, '--vhost-user', place, '--no-sandbox');
    expect(refused.code).toBe(exitCode('invalid_argument'));
    expect(refused.stderr).toContain(`no socket: ${place}`);
    expect(existsSync(place)).toBe(false);
  });

  it.each(['--nbd', '--stats'])('%s takes no inherited socket', async (option) => {
    const refused = await pqblk('serve', disk, '--nbd', at('n.sock'), option, 'fd:3');
    expect(refused.code).toBe(exitCode('invalid_argument'));
    expect(refused.stderr).toContain('no socket: fd:3');
    expect(existsSync('fd:3')).toBe(false);
  });

  // Below 24 is what the runtime opened for itself, and must not lose.
  it.each([3, 5, 8, 13, 19, 1000])('refuses fd:%i where nothing was inherited', async (fd) => {
    const child = spawn(process.execPath, [MAIN, 'serve', disk, '--vhost-user', `fd:${fd}`]);
    running.add(child);
    let said = '';
    child.stderr.on('data', (text) => {
      said += text;
    });
    expect((await once(child, 'close'))[0]).toBe(exitCode('invalid_argument'));
    expect(said).toContain(`no socket: fd:${fd}`);
  });
});

describe('a stderr that nobody reads', () => {
  it('does not keep a program that has done its work', async () => {
    const child = perl(FULL_STDERR, 'info', at('nothing'));
    expect((await once(child, 'close'))[0]).toBe(exitCode('not_found'));
  });
});

// What a guest or a client does wrong is said there, once for each disk that is served.
describe('serve goes on', () => {
  const socket = at('on.sock');
  const stats = at('on.stats');
  const argv = [MAIN, 'serve', disk, '--vhost-user', socket, '--stats', stats];
  const refusedFrontEnds = async () => {
    const families = parseExposition((await httpGet(stats, '/metrics')).body);
    return total(families, 'pqblk_vhost_user_refused_connections_total');
  };

  async function turnAway(): Promise<void> {
    const knocking = connect(socket);
    await once(knocking.resume(), 'close');
  }

  it.each([
    ['whose stderr is full', '2>/dev/full'],
    ['whose stdout and stderr are full', '>/dev/full 2>&1'],
    ['whose stdout and stderr have lost their reader', '2>&1'],
  ])('%s', async (_, redirection) => {
    const shell = ['-c', `exec "$0" "$@" ${redirection}`, process.execPath, ...argv];
    const child = spawn('sh', shell, { stdio: ['ignore', 'pipe', 'pipe'] });
    running.add(child);
    const ended = once(child, 'close');
    await vi.waitFor(refusedFrontEnds, PATIENCE);
    child.stdout.destroy();
    child.stderr.destroy();
    const guest = connect(socket);
    await once(guest, 'connect');
    for (let refused = 1; refused <= 3; ++refused) {
      await turnAway();
      expect(await refusedFrontEnds()).toBe(refused);
    }
    guest.destroy();
    child.kill('SIGTERM');
    expect(await ended).toEqual([0, null]);
    expect(existsSync(socket)).toBe(false);
  });
});
