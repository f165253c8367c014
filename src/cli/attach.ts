// Room cli/: `pqblk attach`: a disk for a machine that runs already.
//
// With a disk it is its server too, from the moment QEMU has it until the device is gone: taken out by
// `pqblk detach`, with its QEMU, or by the signal that ends this command. With --server it plugs in what
// somebody else serves, and returns. The monitor is not kept: it has room for one client at a time.
import { dirname, extname, join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Command, Option } from 'commander';
import { PqblkError } from '../errors.js';
import {
  checkDeviceId,
  isPlugged,
  notifyServiceManager,
  type Plugged,
  plugDisk,
  QmpConnection,
  unplugDisk,
} from '../index.js';
import {
  addEngineOptions,
  addOpenOptions,
  type EngineFlags,
  keyOption,
  type OpenFlags,
} from './opening.js';
import { examples, jsonOption, parseCount } from './options.js';
import { type Served, serveWhile } from './serving.js';
import type { Terminal } from './terminal.js';

const LOOK_EVERY_MS = 250;
/** QEMU comes back within a second when only the connection broke; else it is asked. */
const GRACE_MS = 1_200;
const ASK_AGAIN_MS = 10_000;

interface Flags extends OpenFlags, EngineFlags {
  qmp: string;
  id?: string;
  bus?: string;
  server?: string;
  vhostUser?: string;
  readOnly?: boolean;
  stats?: string;
  sandbox?: boolean;
  timeout?: number;
  json?: boolean;
}

export function qmpOption(): Option {
  return new Option(
    '--qmp <socket>',
    'monitor of the QEMU, of its `-qmp unix:SOCKET,server=on,wait=off`',
  ).makeOptionMandatory();
}

export function timeoutOption(): Option {
  return new Option('--timeout <seconds>', 'for the guest to give the disk up (default: 30)')
    .argParser(parseCount)
    .default(undefined);
}

export function addAttach(program: Command, terminal: Terminal): void {
  const command = program
    .command('attach [disk]')
    .description('Plug a disk into a running QEMU and serve it until it is detached.')
    .addOption(qmpOption())
    .option('--id <id>', "name of the device in QEMU (default: after the disk's file)")
    .option('--bus <name>', 'bus to plug into (default: a free PCI Express root port)')
    .option('--server <socket>', 'no disk: plug in what `pqblk serve --vhost-user` has there')
    .option(
      '--vhost-user <socket>',
      'socket to serve on, as QEMU sees it (default: beside the monitor)',
    )
    .option('--read-only', 'the guest cannot change the disk')
    .option('--stats <socket>', 'HTTP on a Unix socket: /metrics for Prometheus, /stats as JSON')
    .option('--no-sandbox', 'for debuggers: no system call filter, core dumps as the system allows')
    .addOption(timeoutOption())
    .addOption(keyOption());
  addOpenOptions(addEngineOptions(command))
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk attach data.sealed --key alice --qmp /run/vm.qmp --id data --queues 2',
        'pqblk detach data --qmp /run/vm.qmp',
        'pqblk attach --server /run/data.sock --qmp /run/vm.qmp --id data',
      ),
    )
    .action(async (path: string | undefined, flags: Flags) => await attach(terminal, path, flags));
}

async function attach(terminal: Terminal, path: string | undefined, flags: Flags): Promise<void> {
  if ((path === undefined) === (flags.server === undefined)) {
    const hint = 'name a disk to serve it here, or --server SOCKET of a server that runs';
    throw new PqblkError('usage', 'expected either a disk or --server', { hint });
  }
  const id = flags.id ?? idFor(path ?? flags.server ?? '');
  checkDeviceId(id);
  if (path !== undefined) return await serveAttached(terminal, path, id, flags);
  const socket = resolve(flags.server ?? '');
  announce(terminal, await plug(terminal, id, socket, flags), socket, flags);
}

/** `/disks/my data.sealed` → `my-data`. */
function idFor(path: string): string {
  const name = path.slice(path.lastIndexOf('/') + 1);
  const plain = name.slice(0, name.length - extname(name).length).replace(/[^A-Za-z0-9._-]+/g, '-');
  return (/^[A-Za-z]/.test(plain) ? plain : `disk-${plain}`).slice(0, 64);
}

async function serveAttached(
  terminal: Terminal,
  path: string,
  id: string,
  flags: Flags,
): Promise<void> {
  const socket = resolve(flags.vhostUser ?? join(dirname(flags.qmp), `${id}.sock`));
  const { stats, sandbox } = flags;
  const plan = { disks: [{ ...flags, path, name: id, vhostUser: socket }], stats, sandbox };
  await serveWhile(terminal, plan, async ([disk]) => {
    const hasFrontEnd = () => isConnected(disk);
    announce(terminal, await plug(terminal, id, socket, flags, hasFrontEnd), socket, flags);
    notifyServiceManager(`READY=1\nMAINPID=${process.pid}`);
    await untilGone(terminal, hasFrontEnd, id, flags);
  });
}

const isConnected = (disk: Served | undefined) =>
  disk?.servers.some((one) => one.protocol === 'vhost-user-blk' && one.stats().connected) ?? false;

async function plug(
  terminal: Terminal,
  id: string,
  socket: string,
  { qmp: path, queues = 1, bus }: Flags,
  hasFrontEnd?: () => boolean,
): Promise<Plugged> {
  const { signal } = terminal;
  using qmp = await QmpConnection.connect(path, { signal });
  return await plugDisk(qmp, { id, socket, queues, bus, hasFrontEnd, signal });
}

function announce(terminal: Terminal, plugged: Plugged, socket: string, flags: Flags): void {
  const { id, bus, resumed } = plugged;
  if (flags.json) {
    terminal.json({ attached: true, ...plugged, socket, pid: process.pid });
    return;
  }
  const where = bus === undefined ? '' : ` at ${bus}`;
  terminal.line(`${resumed ? 'attached again' : 'attached'}: ${id}${where}, served on ${socket}`);
}

/** Returns once the machine does not have the device any more. A signal takes it out. */
async function untilGone(
  terminal: Terminal,
  connected: () => boolean,
  id: string,
  flags: Flags,
): Promise<void> {
  let absentSince: number | undefined;
  while (!terminal.signal.aborted) {
    await sleep(LOOK_EVERY_MS);
    if (connected()) {
      absentSince = undefined;
      continue;
    }
    absentSince ??= performance.now();
    if (performance.now() - absentSince < GRACE_MS) continue;
    if (!(await stillThere(id, flags.qmp))) {
      terminal.remark(`pqblk: ${id} is detached`);
      return;
    }
    absentSince = performance.now() + ASK_AGAIN_MS - GRACE_MS;
  }
  await unplug(terminal, id, flags);
}

/** Whether the machine runs and has the device; true when nobody can say. */
async function stillThere(id: string, path: string): Promise<boolean> {
  try {
    using qmp = await QmpConnection.connect(path);
    return await isPlugged(qmp, id);
  } catch (error) {
    return !(error instanceof PqblkError && error.kind === 'not_found');
  }
}

async function unplug(terminal: Terminal, id: string, flags: Flags): Promise<void> {
  try {
    using qmp = await QmpConnection.connect(flags.qmp);
    await unplugDisk(qmp, id, { timeoutMs: timeoutOf(flags) });
    terminal.remark(`pqblk: ${id} is detached`);
  } catch (error) {
    if (!(error instanceof PqblkError)) throw error;
    if (error.kind === 'not_found') return; // it went before it was asked
    const { kind, message, path, operation } = error;
    const hint =
      `the guest keeps the disk and waits for its server: the same command serves it again, ` +
      `\`pqblk detach ${id}\` takes it out`;
    throw new PqblkError(kind, message, { path, operation, hint, cause: error });
  }
}

export function timeoutOf(flags: { timeout?: number }): number | undefined {
  return flags.timeout === undefined ? undefined : flags.timeout * 1000;
}
