// Room cli/: `pqblk serve`: a disk for hypervisors and other programs, until a signal ends it.
import { type Command, InvalidArgumentError, Option } from 'commander';
import { PqblkError } from '../errors.js';
import { type Disk, noNewPrivileges, notifyServiceManager } from '../index.js';
import { serveMetrics } from './metrics.js';
import {
  addEngineOptions,
  addOpenOptions,
  type EngineFlags,
  keyOption,
  type OpenFlags,
  withDisk,
} from './opening.js';
import { examples, jsonOption, parseCount } from './options.js';
import type { Terminal } from './terminal.js';

interface TcpAddress {
  host: string;
  port: number;
}

interface Flags extends OpenFlags, EngineFlags {
  vhostUser?: string;
  nbd?: string;
  nbdTcp?: TcpAddress;
  tlsPsk?: string;
  tlsCert?: string;
  insecure?: boolean;
  exportName?: string;
  maxClients?: number;
  idleTimeout?: number;
  readOnly?: boolean;
  stats?: string;
  json?: boolean;
}

/** One way in to the disk that is open now. */
interface Running {
  readonly protocol: string;
  /** How a client reaches it. */
  readonly addresses: string[];
  stats(): Record<string, number>;
  close(): Promise<void>;
}

export function addServe(program: Command, terminal: Terminal): void {
  const command = program
    .command('serve <disk>')
    .description('Serve a disk to hypervisors and other programs, until SIGINT or SIGTERM.')
    .addOption(
      new Option(
        '--vhost-user <socket>',
        'virtio-blk for QEMU and others, a ring for each of --queues; fd:N: an inherited socket',
      ),
    )
    .option('--nbd <socket>', 'NBD on a Unix socket, mode 0600')
    .addOption(
      new Option('--nbd-tcp <host:port>', 'NBD over TCP; needs TLS or --insecure').argParser(
        parseAddress,
      ),
    )
    .option('--tls-psk <file>', 'TLS with pre-shared keys, lines name:hex as psktool writes them')
    .option('--tls-cert <dir>', 'TLS with server-cert.pem, server-key.pem; ca-cert.pem for clients')
    .option('--insecure', 'allow TCP in plain text: whoever reaches the port has the disk')
    .option('--export-name <name>', 'name of the NBD export; the empty one works in any case')
    .addOption(new Option('--max-clients <n>', 'NBD clients at once').argParser(parseCount))
    .addOption(
      new Option(
        '--idle-timeout <seconds>',
        'disconnect NBD clients that ask for nothing (default: never)',
      ).argParser(parseCount),
    )
    .option('--read-only', 'refuse to change the disk')
    .option('--stats <socket>', 'HTTP on a Unix socket: /metrics for Prometheus, /stats as JSON')
    .addOption(keyOption());
  addOpenOptions(addEngineOptions(command))
    .addOption(jsonOption())
    .addHelpText(
      'after',
      examples(
        'pqblk serve vm.sealed --key alice --vhost-user /run/vm.sock --queues 4',
        'pqblk serve vm.sealed --key alice --nbd /run/vm-nbd.sock',
        'pqblk serve vm.sealed --key alice --nbd-tcp 0.0.0.0:10809 --tls-psk keys.psk --queues 4',
      ),
    )
    .action(async (path: string, flags: Flags) => await serve(terminal, path, flags));
}

function parseAddress(text: string): TcpAddress {
  const found = /^(?:\[([^\]]+)\]|([^:]+)):(\d{1,5})$/.exec(text);
  const port = Number(found?.[3]);
  if (!found || port > 65535) throw new InvalidArgumentError('expected HOST:PORT.');
  return { host: found[1] ?? found[2] ?? '', port };
}

async function serve(terminal: Terminal, path: string, flags: Flags): Promise<void> {
  if ([flags.vhostUser, flags.nbd, flags.nbdTcp].every((way) => way === undefined)) {
    const hint = 'say --vhost-user SOCKET or --nbd SOCKET';
    throw new PqblkError('usage', 'no way in was named', { hint });
  }
  noNewPrivileges();
  const { cache = 'none', engine = 'auto', queues = 1, readOnly = false } = flags;
  await withDisk(path, flags, { cache, engine, queues, readOnly }, async (disk) => {
    const servers: Running[] = [];
    try {
      servers.push(...(await startVhostUser(terminal, disk, flags)));
      servers.push(...(await startNbd(terminal, disk, flags)));
      if (flags.stats !== undefined) servers.push(await startStats(flags.stats, disk, servers));
      announce(terminal, disk, servers, flags.json);
      await untilAborted(terminal.signal);
    } finally {
      notifyServiceManager('STOPPING=1');
      await Promise.all(servers.map((server) => server.close()));
    }
  });
}

async function startVhostUser(terminal: Terminal, disk: Disk, flags: Flags): Promise<Running[]> {
  const { vhostUser: place } = flags;
  if (place === undefined) return [];
  const inherited = /^fd:(\d+)$/.exec(place)?.[1];
  const server = await disk.serveVhostUser({
    ...(inherited === undefined ? { path: place } : { fd: Number(inherited) }),
    onReport: (text) => terminal.remark(`pqblk: ${text}`),
  });
  const stats = () => ({ serving: Number(server.serving) });
  const addresses = [`vhost-user-blk:${place}`];
  return [{ protocol: 'vhost-user-blk', addresses, stats, close: () => server.close() }];
}

async function startNbd(terminal: Terminal, disk: Disk, flags: Flags): Promise<Running[]> {
  const { nbd: path, nbdTcp: tcp, tlsPsk, tlsCert, insecure, exportName, maxClients } = flags;
  if (path === undefined && tcp === undefined) return [];
  const tls = { pskFile: tlsPsk, certificates: tlsCert };
  const server = await disk.serveNbd({
    ...{ path, tls, insecure, exportName, maxClients, idleSeconds: flags.idleTimeout },
    ...(tcp && { host: tcp.host, port: tcp.port }),
    onReport: (text) => terminal.remark(`pqblk: nbd: ${text}`),
  });
  const secure = tlsPsk !== undefined || tlsCert !== undefined ? 'nbds' : 'nbd';
  const name = encodeURIComponent(exportName ?? '');
  const addresses: string[] = [];
  if (path !== undefined) {
    addresses.push(`${secure}+unix:///${name}?socket=${encodeURI(path)}`);
  }
  if (tcp !== undefined) {
    const host = tcp.host.includes(':') ? `[${tcp.host}]` : tcp.host;
    addresses.push(`${secure}://${host}:${server.port}/${name}`);
  }
  const stats = () => ({ ...server.stats() });
  return [{ protocol: 'nbd', addresses, stats, close: () => server.close() }];
}

async function startStats(path: string, disk: Disk, servers: Running[]): Promise<Running> {
  const { close } = await serveMetrics(path, disk, [...servers]);
  return { protocol: 'stats', addresses: [], stats: () => ({}), close };
}

/** The line that scripts wait for, and the word that systemd waits for. */
function announce(terminal: Terminal, disk: Disk, servers: Running[], json?: boolean): void {
  const ways = servers.map(({ protocol, addresses }) => ({ protocol, addresses }));
  if (json) {
    terminal.json({ ready: true, pid: process.pid, disk: disk.facts, servers: ways });
  } else {
    for (const { addresses } of ways) {
      for (const address of addresses) terminal.line(`ready: ${address}`);
    }
  }
  notifyServiceManager(`READY=1\nMAINPID=${process.pid}`);
}

async function untilAborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return;
  await new Promise<void>((resolve) => {
    signal.addEventListener('abort', () => resolve(), { once: true });
  });
}
