// `pqblk attach` and `pqblk detach` with a real QEMU. Its machine is paused before its first
// instruction: plugging in and the server's side of it need no guest. scripts/test-vm.mjs has one.
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import {
  KeyStore,
  openDisk,
  type PqblkError,
  plugDisk,
  QmpConnection,
  unplugDisk,
} from '../../src/index.js';
import { exitCode, MAIN, pqblk, pqblkJson, scratch } from '../cli/helpers.js';

const dir = scratch();
const at = (name: string) => join(dir, name);
const store = ['--store', at('keys')];
const disk = at('vm.sealed');
const PATIENCE = { timeout: 120_000, interval: 20 };
const SHARED = ['-object', 'memory-backend-memfd,id=ram,size=64M,share=on'];
const PORT = ['-device', 'pcie-root-port,id=rp1,slot=1'];
const MONITORS = ['compat_monitor0', 'compat_monitor1'];
const running = new Set<ChildProcess>();
let count = 0;

beforeAll(async () => {
  await pqblkJson('key', 'gen', 'alice', '--no-passphrase', ...store);
  await pqblkJson('create', disk, '64M', '--key', 'alice', ...store);
});

afterEach(async () => {
  for (const child of running) child.kill('SIGKILL');
  await Promise.all([...running].map((child) => once(child, 'close')));
});

interface Program {
  readonly child: ChildProcess;
  stdout(): string;
  stderr(): string;
  readonly ended: Promise<number>;
}

function start(file: string, args: string[]): Program {
  const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  running.add(child);
  const written = { stdout: '', stderr: '' };
  child.stdout.on('data', (text) => {
    written.stdout += text;
  });
  child.stderr.on('data', (text) => {
    written.stderr += text;
  });
  const ended = once(child, 'close').then(([code]) => {
    running.delete(child);
    return Number(code);
  });
  return { child, ended, stdout: () => written.stdout, stderr: () => written.stderr };
}

/** A machine without a guest, and its monitor's socket. */
async function machine(type: 'q35' | 'pc', ...args: string[]) {
  const qmp = at(`qmp-${++count}`);
  const shared = args.includes('memory-backend-memfd,id=ram,size=64M,share=on');
  const program = start('qemu-system-x86_64', [
    ...['-nodefaults', '-display', 'none', '-S', '-accel', 'tcg', '-m', '64M'],
    ...['-machine', shared ? `${type},memory-backend=ram` : type],
    ...['-qmp', `unix:${qmp},server=on,wait=off`, ...args],
    ...['-qmp', `unix:${qmp}-2,server=on,wait=off`],
  ]);
  await vi.waitFor(() => {
    if (program.child.exitCode !== null) throw new Error(program.stderr());
    expect(existsSync(`${qmp}-2`)).toBe(true);
  }, PATIENCE);
  return { ...program, qmp };
}

async function attach(qmp: string, ...args: string[]): Promise<Program> {
  const words = ['attach', disk, '--qmp', qmp, '--id', 'd', ...store, ...args];
  const program = start(process.execPath, [MAIN, ...words]);
  await vi.waitFor(() => {
    if (program.child.exitCode !== null) throw new Error(program.stderr());
    expect(program.stdout()).toContain('\n');
  }, PATIENCE);
  return program;
}

async function ask(qmp: string, command: string, args = {}): Promise<unknown> {
  using monitor = await QmpConnection.connect(qmp);
  return await monitor.execute(command, args);
}

/** A guest that gives up what it is asked for: a reset completes what is pending. */
async function obliging<T>(qmp: string, work: Promise<T>): Promise<T> {
  using monitor = await QmpConnection.connect(`${qmp}-2`);
  let done = false;
  const ended = work.finally(() => {
    done = true;
  });
  ended.catch(() => {}); // it is thrown below
  while (!done) {
    await monitor.execute('system_reset');
    await sleep(50);
  }
  return await ended;
}

const chardevs = async (qmp: string) =>
  ((await ask(qmp, 'query-chardev')) as { label: string }[]).map(({ label }) => label).sort();
const devices = async (qmp: string) =>
  ((await ask(qmp, 'qom-list', { path: '/machine/peripheral' })) as { name: string }[]).map(
    ({ name }) => name,
  );

describe('pqblk attach', () => {
  it('plugs a disk in and serves it until it is detached', async () => {
    const { qmp } = await machine('q35', ...SHARED, ...PORT);
    const server = await attach(qmp, '--queues', '2');
    expect(server.stdout()).toBe(`attached: d at rp1, served on ${at('d.sock')}\n`);
    expect(await devices(qmp)).toContain('d');
    const queues = { path: '/machine/peripheral/d', property: 'num-queues' };
    expect(await ask(qmp, 'qom-get', queues)).toBe(2);
    expect((await pqblk('check', disk, ...store)).code).toBe(exitCode('locked'));
    // QEMU is told, and does not mind.
    expect(await pqblkJson('resize', disk, '+1M')).toMatchObject({ served: true });
    const detached = await obliging(qmp, pqblk('detach', 'd', '--qmp', qmp));
    expect(detached.stdout).toBe('detached: d\n');
    expect(await server.ended).toBe(0);
    expect(server.stderr()).toBe('pqblk: d is detached\n');
    expect(await devices(qmp)).not.toContain('d');
    expect(await chardevs(qmp)).toEqual(MONITORS);
    expect(existsSync(at('d.sock'))).toBe(false);
    expect((await pqblk('check', disk, ...store)).code).toBe(0);
    expect((await pqblk('detach', 'd', '--qmp', qmp)).code).toBe(exitCode('not_found'));
  });

  it.each(['q35', 'pc'] as const)('takes the disk out of a %s at SIGTERM', async (type) => {
    const { qmp } = await machine(type, ...SHARED, ...(type === 'q35' ? PORT : []));
    const server = await attach(qmp, '--json', '--vhost-user', at('own.sock'));
    expect(JSON.parse(server.stdout())).toMatchObject({ id: 'd', socket: at('own.sock') });
    server.child.kill('SIGTERM');
    expect(await obliging(qmp, server.ended)).toBe(0);
    expect(await devices(qmp)).not.toContain('d');
    expect(await chardevs(qmp)).toEqual(MONITORS);
  });

  it('serves again, under the same id, after it was killed or the guest was slow', async () => {
    const { qmp } = await machine('q35', ...SHARED, ...PORT);
    const killed = await attach(qmp);
    killed.child.kill('SIGKILL');
    await killed.ended;
    expect(await devices(qmp)).toContain('d');
    const second = await attach(qmp, '--timeout', '1');
    expect(second.stdout()).toBe(`attached again: d, served on ${at('d.sock')}\n`);
    second.child.kill('SIGTERM'); // and the guest does not answer
    expect(await second.ended).toBe(exitCode('timed_out'));
    expect(second.stderr()).toContain('hint: the guest keeps the disk and waits for its server');
    const third = await attach(qmp);
    expect(third.stdout()).toContain('attached again');
    await obliging(
      qmp,
      vi.waitFor(async () => expect(await devices(qmp)).not.toContain('d')),
    );
    expect((await pqblk('detach', 'd', '--qmp', qmp)).code).toBe(0); // what is left of it
    expect(await third.ended).toBe(0);
    expect(await devices(qmp)).not.toContain('d');
    expect(await chardevs(qmp)).toEqual(MONITORS);
  });

  it('serves again when QEMU was faster, and is connected already', async () => {
    const { qmp } = await machine('q35', ...SHARED, ...PORT);
    const killed = await attach(qmp);
    killed.child.kill('SIGKILL');
    await killed.ended;
    using identity = await new KeyStore(at('keys')).unlock('alice');
    await using open = await openDisk(disk, { format: 'sealed', identity });
    const socket = at('d.sock');
    const server = await open.serveVhostUser({ path: socket });
    const hasFrontEnd = () => server.stats().connected;
    await vi.waitFor(() => expect(hasFrontEnd()).toBe(true), PATIENCE);
    using monitor = await QmpConnection.connect(qmp);
    const plan = { id: 'd', socket, queues: 1, connectTimeoutMs: 100 };
    expect(await plugDisk(monitor, { ...plan, hasFrontEnd })).toMatchObject({ resumed: true });
    const elsewhere = plugDisk(monitor, { ...plan, hasFrontEnd: () => false });
    await expect(elsewhere).rejects.toMatchObject({ kind: 'exists' });
  });

  it('ends when its QEMU does', async () => {
    const vm = await machine('q35', ...SHARED, ...PORT);
    const server = await attach(vm.qmp);
    vm.child.kill('SIGKILL');
    expect(await server.ended).toBe(0);
    expect(server.stderr()).toContain('pqblk: d is detached');
  });

  it('plugs in what another server has, and leaves it running', async () => {
    const { qmp } = await machine('q35', ...SHARED, ...PORT);
    const socket = at('served.sock');
    const words = ['serve', disk, '--vhost-user', socket, ...store];
    const server = start(process.execPath, [MAIN, ...words]);
    await vi.waitFor(() => expect(server.stdout()).toContain('ready'), PATIENCE);
    const wanted = ['--server', socket, '--qmp', qmp, '--id', 'd'];
    const plugged = await pqblk('attach', ...wanted);
    expect(plugged).toMatchObject({ code: 0, stdout: `attached: d at rp1, served on ${socket}\n` });
    const detached = await obliging(qmp, pqblk('detach', 'd', '--qmp', qmp, '--json'));
    expect(JSON.parse(detached.stdout)).toEqual({ detached: true, id: 'd' });
    const tooMany = await pqblk('attach', ...wanted, '--queues', '9', '--json');
    expect(tooMany.code).toBe(exitCode('hypervisor'));
    expect(tooMany.stderr).toMatch(/QEMU says GenericError: .*maximum number of queues.* is 1/);
    expect(await chardevs(qmp)).toEqual(MONITORS);
    server.child.kill('SIGTERM');
    expect(await server.ended).toBe(0);
  });
});

describe('pqblk serve --vhost-user fd:N', () => {
  it('serves a machine on the socket that it inherits, as from systemd', async () => {
    const { qmp } = await machine('q35', ...SHARED, ...PORT);
    const socket = at('inherited.sock');
    const listen =
      'use Socket; $^F = 10; socket(S, PF_UNIX, SOCK_STREAM, 0); bind(S, sockaddr_un(shift)); ' +
      'listen(S, 4); fileno(S) == 3 or die fileno(S); exec @ARGV';
    const words = [MAIN, 'serve', disk, '--vhost-user', 'fd:3', ...store];
    const server = start('perl', ['-e', listen, socket, process.execPath, ...words]);
    await vi.waitFor(() => expect(server.stdout()).toContain('ready'), PATIENCE);
    const attached = await pqblk('attach', '--server', socket, '--qmp', qmp, '--id', 'd');
    expect(attached).toMatchObject({ code: 0, stderr: '' });
    // A second machine is turned away, and told so without being held up.
    const second = await machine('q35', ...SHARED, ...PORT);
    using monitor = await QmpConnection.connect(`${second.qmp}-2`);
    const wanted = { id: 'd', socket, queues: 1, connectTimeoutMs: 300 };
    const refused = await plugDisk(monitor, wanted).catch((error) => error as PqblkError);
    expect(refused).toMatchObject({
      kind: expect.stringMatching(/timed_out|hypervisor/),
      hint: expect.stringContaining('turns others away'),
    });
    expect(await chardevs(second.qmp)).toEqual(MONITORS);
    server.child.kill('SIGTERM');
    expect(await server.ended).toBe(0);
    expect(existsSync(socket)).toBe(true); // it is its maker's
  });
});

describe('pqblk attach refuses', () => {
  // In this process, which has other things to do than serve.
  const open = ['--no-sandbox', ...store];
  const words = (qmp: string) => ['attach', disk, '--qmp', qmp, '--id', 'd', ...open];

  it('memory that is not shared, and says how to share it', async () => {
    const { qmp } = await machine('q35', ...PORT);
    const { code, stderr } = await pqblk(...words(qmp));
    expect(code).toBe(exitCode('unsupported'));
    expect(stderr).toContain('memory “pc.ram” is private');
    expect(stderr).toContain('memory-backend-memfd');
    expect(await chardevs(qmp)).toEqual(MONITORS);
    const numa = await machine(
      'q35',
      ...['-object', 'memory-backend-memfd,id=good,size=32M,share=on'],
      ...['-object', 'memory-backend-memfd,id=bad,size=32M,share=off'],
      ...['-numa', 'node,memdev=good', '-numa', 'node,memdev=bad', ...PORT],
    );
    expect((await pqblk(...words(numa.qmp))).stderr).toContain('memory “bad” is private');
    const dimm = await machine(
      'q35',
      ...['-m', '64M,slots=1,maxmem=1G', ...SHARED, ...PORT],
      ...['-object', 'memory-backend-ram,id=more,size=128M', '-device', 'pc-dimm,memdev=more'],
    );
    expect((await pqblk(...words(dimm.qmp))).stderr).toContain('memory “more” is private');
  });

  it('a q35 without a free port, and says what is missing', async () => {
    const none = await machine('q35', ...SHARED);
    const without = await pqblk(...words(none.qmp));
    expect(without.code).toBe(exitCode('hypervisor'));
    expect(without.stderr).toContain("QEMU says GenericError: Bus 'pcie.0' does not support");
    expect(without.stderr).toContain('-device pcie-root-port');
    expect(await chardevs(none.qmp)).toEqual(MONITORS);
    const full = await machine('q35', ...SHARED, ...PORT, '-device', 'virtio-rng-pci,bus=rp1');
    expect((await pqblk(...words(full.qmp))).stderr).toContain('all 1 pcie-root-ports are in use');
    const unknown = await pqblk(...words(full.qmp), '--bus', 'rp7');
    expect(unknown.stderr).toContain("QEMU says GenericError: Bus 'rp7' not found");
    expect((await pqblk('check', disk, ...store)).code).toBe(0); // which is closed again
  });

  it('an id that is taken, and one that is none', async () => {
    const { qmp } = await machine('q35', ...SHARED, ...PORT, '-device', 'virtio-rng-pci,id=d');
    expect((await pqblk(...words(qmp))).code).toBe(exitCode('exists'));
    expect((await pqblk('detach', 'd', '--qmp', qmp)).stderr).toContain('is a virtio-rng-pci');
    const odd = await pqblk('attach', disk, '--qmp', qmp, '--id', '9;rm');
    expect(odd.code).toBe(exitCode('invalid_argument'));
    expect((await pqblk('attach', '--qmp', qmp)).code).toBe(exitCode('usage'));
    expect((await pqblk('attach', disk)).code).toBe(exitCode('usage'));
  });

  it('a server that is not there, without letting QEMU wait for it', async () => {
    const { qmp } = await machine('q35', ...SHARED, ...PORT);
    using monitor = await QmpConnection.connect(`${qmp}-2`);
    const wanted = { id: 'd', socket: at('nobody.sock'), queues: 1 };
    const plugged = plugDisk(monitor, { ...wanted, connectTimeoutMs: 300 });
    await expect(plugged).rejects.toMatchObject({
      kind: 'timed_out',
      message: `QEMU does not get through to ${wanted.socket}`,
    });
    const stop = AbortSignal.timeout(300);
    await expect(plugDisk(monitor, { ...wanted, signal: stop })).rejects.toMatchObject({
      kind: 'canceled',
    });
    expect(await chardevs(qmp)).toEqual(MONITORS);
  });

  it('a monitor that is busy or is not there', async () => {
    const { qmp } = await machine('q35');
    using _other = await QmpConnection.connect(qmp);
    const busy = QmpConnection.connect(qmp, { timeoutMs: 300 });
    await expect(busy).rejects.toMatchObject({
      kind: 'timed_out',
      hint: expect.stringContaining('one client at a time'),
    });
    const nowhere = await pqblk('detach', 'd', '--qmp', at('nowhere'));
    expect(nowhere.code).toBe(exitCode('not_found'));
  });
});

describe('pqblk detach', () => {
  it('waits no longer than it was told for a guest that does not answer', async () => {
    const socket = at('cold.sock');
    const words = ['serve', disk, '--vhost-user', socket, ...store];
    const server = start(process.execPath, [MAIN, ...words]);
    await vi.waitFor(() => expect(server.stdout()).toContain('ready'), PATIENCE);
    // Plugged in before power-on: the slot is live, and only a guest can let go.
    const { qmp } = await machine(
      'q35',
      ...[...SHARED, ...PORT, '-chardev', `socket,id=c,path=${socket},reconnect=1`],
      ...['-device', 'vhost-user-blk-pci,id=d,chardev=c,bus=rp1'],
    );
    for (const _again of [1, 2]) {
      const late = await pqblk('detach', 'd', '--qmp', qmp, '--timeout', '1');
      expect(late.code).toBe(exitCode('timed_out'));
      expect(late.stderr).toContain('the guest did not give up “d”');
    }
    using monitor = await QmpConnection.connect(qmp);
    const stop = new AbortController();
    const asked = unplugDisk(monitor, 'd', { signal: stop.signal });
    setTimeout(() => stop.abort(), 100);
    await expect(asked).rejects.toMatchObject({ kind: 'canceled' } satisfies Partial<PqblkError>);
  });
});

describe('the monitor', () => {
  it('of a QEMU that vanishes or hangs ends every wait', async () => {
    const vm = await machine('q35', ...SHARED, ...PORT);
    using monitor = await QmpConnection.connect(vm.qmp);
    expect(monitor.atLeast(5, 2)).toBe(true);
    vm.child.kill('SIGSTOP');
    await expect(monitor.execute('query-status', {}, 200)).rejects.toMatchObject({
      kind: 'timed_out',
    });
    const gone = plugDisk(monitor, { id: 'd', socket: at('x'), queues: 1 });
    vm.child.kill('SIGKILL');
    await expect(gone).rejects.toMatchObject({ kind: 'hypervisor' });
    await expect(monitor.execute('query-status')).rejects.toMatchObject({ kind: 'hypervisor' });
  });
});
