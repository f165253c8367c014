// Room cli/: disks that are served: opening them all, starting their servers, saying so, ending.
//
// Either everything that was asked for runs, or nothing does. What is asked for is the business of
// serve.ts (one disk, by options) and serve-config.ts (several, by a file).
import { basename } from 'node:path';
import { PqblkError } from '../errors.js';
import {
  type ControlServer,
  type Disk,
  noCoreDumps,
  noNewPrivileges,
  notifyServiceManager,
  openDisk,
  type RateLimits,
  refuseSystemCalls,
  serveControl,
} from '../index.js';
import type { ServedDisk, ServerNumbers } from './metrics.js';
import { serveMetrics } from './metrics-server.js';
import { type EngineFlags, type OpenFlags, unlocking } from './opening.js';
import type { Terminal } from './terminal.js';

export interface TcpAddress {
  host: string;
  port: number;
}

/** One disk and its ways in. */
export interface DiskPlan extends OpenFlags, EngineFlags, RateLimits {
  path: string;
  /** What it is called in metrics and messages. Default: the file's name. */
  name?: string;
  readOnly?: boolean;
  vhostUser?: string;
  nbd?: string;
  nbdTcp?: TcpAddress;
  tlsPsk?: string;
  tlsCert?: string;
  insecure?: boolean;
  exportName?: string;
  maxClients?: number;
  idleTimeout?: number;
}

export interface ServePlan {
  disks: readonly DiskPlan[];
  stats?: string | undefined;
  json?: boolean | undefined;
  /** False: for debuggers; any system call, and core dumps where the system allows them. */
  sandbox?: boolean | undefined;
}

/** What this process has given up. */
interface Sandbox {
  noNewPrivileges: boolean;
  noCoreDumps: boolean;
  systemCallFilter: boolean;
}

/** One way in to a disk that is open now. */
type Running = ServerNumbers & {
  /** How a client reaches it. */
  readonly addresses: readonly string[];
  close(): Promise<void>;
};

export interface Served extends ServedDisk {
  readonly servers: Running[];
  /** Where `pqblk resize`, `pqblk slot`, `pqblk rotate-data-key` and others ask for a change. */
  control?: ControlServer;
}

/** Serves until the terminal's signal. Kinds: those of opening each disk, and of its servers. */
export async function serveAll(terminal: Terminal, plan: ServePlan): Promise<void> {
  await serveWhile(terminal, plan, async (served, sandbox) => {
    announce(terminal, served, sandbox, plan.json);
    await untilAborted(terminal.signal);
  });
}

/** Serves for as long as `work` takes, which begins when everything runs. */
export async function serveWhile(
  terminal: Terminal,
  plan: ServePlan,
  work: (served: readonly Served[], sandbox: Sandbox) => Promise<void>,
): Promise<void> {
  for (const disk of plan.disks) requireWayIn(disk);
  const sandbox = enterSandbox(plan.sandbox ?? true);
  const served: Served[] = [];
  const many = plan.disks.length > 1;
  const remark = (name: string, text: string) =>
    terminal.remark(many ? `pqblk: ${name}: ${text}` : `pqblk: ${text}`);
  let metrics: { close(): Promise<void> } | undefined;
  try {
    for (const disk of plan.disks) await start(disk, served, remark);
    if (plan.stats !== undefined) metrics = await serveMetrics(plan.stats, served);
    if (plan.sandbox ?? true) closeSandbox(terminal, sandbox);
    await work(served, sandbox);
  } catch (error) {
    await end(served, metrics).catch(() => {}); // a disk that failed may fail to close as well
    throw error;
  }
  notifyServiceManager('STOPPING=1');
  await end(served, metrics);
}

/** Before there are secrets. */
function enterSandbox(wanted: boolean): Sandbox {
  return {
    noNewPrivileges: noNewPrivileges(),
    noCoreDumps: wanted && noCoreDumps(),
    systemCallFilter: false,
  };
}

/** Once everything runs: what it took to get there may be more than what it takes to go on. */
function closeSandbox(terminal: Terminal, sandbox: Sandbox): void {
  const problem = refuseSystemCalls();
  sandbox.systemCallFilter = problem === undefined;
  if (problem !== undefined) terminal.remark(`pqblk: warning: serving without a ${problem}`);
}

function describe({ noNewPrivileges, noCoreDumps, systemCallFilter }: Sandbox): string {
  const parts = [
    noNewPrivileges && 'no new privileges',
    noCoreDumps && 'no core dumps',
    systemCallFilter && 'system call filter',
  ].filter((part) => part !== false);
  return parts.length > 0 ? parts.join(', ') : 'none';
}

function requireWayIn({ path, ...plan }: DiskPlan): void {
  if ([plan.vhostUser, plan.nbd, plan.nbdTcp].every((way) => way === undefined)) {
    const hint = 'say --vhost-user SOCKET or --nbd SOCKET';
    throw new PqblkError('usage', 'no way in was named', { path, hint });
  }
  const secure = plan.tlsPsk !== undefined || plan.tlsCert !== undefined || plan.insecure;
  if (plan.nbdTcp !== undefined && !secure) {
    const hint = 'say --tls-psk FILE or --tls-cert DIR; --insecure gives the disk to the network';
    throw new PqblkError('invalid_argument', 'NBD over TCP needs TLS', { path, hint });
  }
}

/** Opens a disk and its servers; what was started is in `served` even when the rest fails. */
async function start(
  plan: DiskPlan,
  served: Served[],
  remark: (name: string, text: string) => void,
): Promise<void> {
  const one: Served = {
    name: plan.name ?? basename(plan.path),
    disk: await openPlanned(plan),
    servers: [],
  };
  served.push(one);
  const { iopsMax, iopsBurst, bpsMax, bpsBurst } = plan;
  one.disk.setLimits({ iopsMax, iopsBurst, bpsMax, bpsBurst });
  const onReport = (text: string) => remark(one.name, text);
  one.servers.push(...(await startVhostUser(onReport, one.disk, plan)));
  one.servers.push(...(await startNbd(onReport, one.disk, plan)));
  if (!one.disk.facts.readOnly) one.control = await serveControl(one.disk);
}

async function openPlanned(plan: DiskPlan): Promise<Disk> {
  const { path, cache = 'none', engine = 'auto', queues = 1, readOnly = false } = plan;
  using unlocked = await unlocking(path, plan);
  return await openDisk(path, { ...unlocked.options, cache, engine, queues, readOnly });
}

/** The last things first; every disk is closed, and the first failure is thrown. */
async function end(
  served: readonly Served[],
  metrics: { close(): Promise<void> } | undefined,
): Promise<void> {
  await metrics?.close();
  await Promise.all(served.map(({ control }) => control?.close()));
  await Promise.all(served.flatMap(({ servers }) => servers.map((server) => server.close())));
  const closed = await Promise.allSettled(served.map(({ disk }) => disk.close()));
  for (const result of closed) if (result.status === 'rejected') throw result.reason;
}

async function startVhostUser(
  onReport: (text: string) => void,
  disk: Disk,
  { vhostUser: place }: DiskPlan,
): Promise<Running[]> {
  if (place === undefined) return [];
  const inherited = /^fd:(\d+)$/.exec(place)?.[1];
  const server = await disk.serveVhostUser({
    ...(inherited === undefined ? { path: place } : { fd: Number(inherited) }),
    onReport,
  });
  const addresses = [`vhost-user-blk:${place}`];
  const stats = () => server.stats();
  return [{ protocol: 'vhost-user-blk', addresses, stats, close: () => server.close() }];
}

async function startNbd(
  onReport: (text: string) => void,
  disk: Disk,
  plan: DiskPlan,
): Promise<Running[]> {
  const { nbd: path, nbdTcp: tcp, tlsPsk, tlsCert, insecure, exportName, maxClients } = plan;
  if (path === undefined && tcp === undefined) return [];
  const tls = { pskFile: tlsPsk, certificates: tlsCert };
  const server = await disk.serveNbd({
    ...{ path, tls, insecure, exportName, maxClients, idleSeconds: plan.idleTimeout },
    ...(tcp && { host: tcp.host, port: tcp.port }),
    onReport: (text) => onReport(`nbd: ${text}`),
  });
  const secure = tlsPsk !== undefined || tlsCert !== undefined ? 'nbds' : 'nbd';
  const name = encodeURIComponent(exportName ?? '');
  const addresses: string[] = [];
  if (path !== undefined) {
    const socket = path.split('/').map(encodeURIComponent).join('/');
    addresses.push(`${secure}+unix:///${name}?socket=${socket}`);
  }
  if (tcp !== undefined) {
    const host = tcp.host.includes(':') ? `[${tcp.host}]` : tcp.host;
    addresses.push(`${secure}://${host}:${server.port}/${name}`);
  }
  const stats = () => server.stats();
  return [{ protocol: 'nbd', addresses, stats, close: () => server.close() }];
}

/** The lines that scripts wait for, in one write, and the word that systemd waits for. */
function announce(
  terminal: Terminal,
  served: readonly Served[],
  sandbox: Sandbox,
  json?: boolean,
): void {
  if (json) {
    const disks = served.map(({ name, disk, servers }) => ({
      name,
      ...disk.facts,
      servers: servers.map(({ protocol, addresses }) => ({ protocol, addresses })),
    }));
    terminal.json({ ready: true, pid: process.pid, sandbox, disks });
  } else {
    const addresses = served.flatMap(({ servers }) => servers.flatMap((one) => one.addresses));
    const ready = addresses.map((address) => `ready: ${address}`);
    terminal.line([...ready, `sandbox: ${describe(sandbox)}`].join('\n'));
  }
  notifyServiceManager(`READY=1\nMAINPID=${process.pid}`);
}

async function untilAborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return;
  await new Promise<void>((resolve) => {
    signal.addEventListener('abort', () => resolve(), { once: true });
  });
}
