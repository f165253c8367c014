// Room cli/: disks that are served: opening them all, starting their servers, saying so, ending.
//
// Of several disks those that can be served are: a guest whose disk is in order does not wait for
// somebody to mend another's. What is asked for is the business of serve.ts (one disk, by options) and
// serve-config.ts (several, by a file).
import { fstatSync } from 'node:fs';
import { basename } from 'node:path';
import { fromSystem, PqblkError } from '../errors.js';
import {
  type ControlServer,
  type Disk,
  noCoreDumps,
  noNewPrivileges,
  notifyServiceManager,
  openDisk,
  type Pins,
  type RateLimits,
  refuseSystemCalls,
  serveControl,
} from '../index.js';
import type { ServedDisk, ServerNumbers } from './metrics.js';
import { serveMetrics } from './metrics-server.js';
import {
  type EngineFlags,
  engineOptions,
  formatOf,
  type OpenFlags,
  unlocking,
  warnOfSwap,
} from './opening.js';
import { openStore } from './options.js';
import type { Terminal } from './terminal.js';

const LOOK_MS = 500; // whether all connections that cannot be made again have ended

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
  /** Nobody can come in any more: it had one connection, which has ended. */
  over?(): boolean;
  close(): Promise<void>;
};

export interface Served extends ServedDisk {
  readonly servers: Running[];
  /** Where `pqblk resize`, `pqblk slot`, `pqblk rotate-data-key` and others ask for a change. */
  control?: ControlServer;
}

/** A disk that could not be served. */
interface Failure {
  readonly name: string;
  readonly path: string;
  readonly error: PqblkError;
}

/**
 * Serves until the terminal's signal. Kinds: those of opening each disk, and of its servers; where some
 * are served, that of the first which is not is thrown at the end.
 */
export async function serveAll(terminal: Terminal, plan: ServePlan): Promise<void> {
  await serveWhile(terminal, plan, async (served, sandbox, failures) => {
    announce(terminal, { served, sandbox, failures }, plan.json);
    await untilDone(terminal.signal, served);
  });
}

/** Serves for as long as `work` takes, which begins when everything runs that can. */
export async function serveWhile(
  terminal: Terminal,
  plan: ServePlan,
  work: (
    served: readonly Served[],
    sandbox: Sandbox,
    failures: readonly Failure[],
  ) => Promise<void>,
): Promise<void> {
  for (const disk of plan.disks) requireWayIn(disk);
  requireNew(plan.stats);
  terminal.forgetUnread();
  const sandbox = enterSandbox(plan.sandbox ?? true);
  const served: Served[] = [];
  const many = plan.disks.length > 1;
  const remark = (name: string, text: string) =>
    terminal.remark(many ? `pqblk: ${name}: ${text}` : `pqblk: ${text}`);
  let metrics: { close(): Promise<void> } | undefined;
  let failures: readonly Failure[];
  try {
    failures = await startAll(plan.disks, served, remark);
    warnOfSwap(terminal);
    if (plan.stats !== undefined) metrics = await serveMetrics(plan.stats, served);
    if (plan.sandbox ?? true) closeSandbox(terminal, sandbox);
    await work(served, sandbox, failures);
  } catch (error) {
    await end(served, metrics).catch(() => {}); // a disk that failed may fail to close as well
    throw error;
  }
  notifyServiceManager('STOPPING=1');
  await end(served, metrics);
  const [failure] = failures;
  if (failure) throw notServed(failure, failures.length, plan.disks.length);
}

/** The disk's error at the end: it was told in full at the start, and decides the exit code. */
function notServed({ path, error }: Failure, count: number, all: number): PqblkError {
  const operation = `serve (${count} of ${all} disks were not)`;
  return new PqblkError(error.kind, error.message, { path, operation });
}

/** Starts what can be started, and reports the rest. Throws what the first met when none can. */
async function startAll(
  plans: readonly DiskPlan[],
  served: Served[],
  remark: (name: string, text: string) => void,
): Promise<readonly Failure[]> {
  const failures: Failure[] = [];
  for (const plan of plans) {
    const name = nameOf(plan);
    try {
      requirePinUntried(plan, failures);
      await start(plan, served, remark);
    } catch (thrown) {
      failures.push({ name, path: plan.path, error: fromSystem(thrown, { path: plan.path }) });
    }
  }
  const [first, ...others] = failures;
  for (const { name, error } of served.length > 0 ? failures : others) {
    remark(name, `not served: ${error.toLine()}${error.hint ? `; hint: ${error.hint}` : ''}`);
  }
  if (first && served.length === 0) throw first.error;
  return failures;
}

/** In metrics and messages. */
export const nameOf = ({ name, path }: Pick<DiskPlan, 'name' | 'path'>): string =>
  name ?? basename(path);

/** Keys on one token share a PIN, and the token counts the wrong ones: a file of disks tries it once. */
function requirePinUntried(plan: DiskPlan, failures: readonly Failure[]): void {
  const wrong = failures.find(({ error }) => ['wrong_pin', 'pin_locked'].includes(error.kind));
  if (!wrong || formatOf(plan.path, plan) !== 'sealed') return;
  throw new PqblkError(wrong.error.kind, `not tried after ${wrong.name}: ${wrong.error.message}`, {
    path: plan.path,
  });
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

/**
 * Before anything of this process is open, and could be taken for what was inherited: the next disk's
 * socket is as good a Unix socket.
 */
function requireInherited(place: string | undefined, path: string): void {
  if (!isInherited(place)) return;
  const fd = inheritedSocket(place);
  const hint = 'fd:N with N from 3 is an inherited socket; ./fd:… is a path';
  if (fd === undefined || !isSocket(fd)) {
    throw new PqblkError('invalid_argument', `no socket: ${place}`, { path, hint });
  }
}

function requireNew(place: string | undefined, path?: string): void {
  if (!isInherited(place)) return;
  const hint = 'an inherited socket is for --vhost-user; ./fd:… is a path';
  throw new PqblkError('invalid_argument', `no socket: ${place}`, { path, hint });
}

function isSocket(fd: number): boolean {
  try {
    return fstatSync(fd).isSocket();
  } catch {
    return false; // nothing has this number
  }
}

/** A way in that is no path. */
export function isInherited(place: unknown): place is string {
  return typeof place === 'string' && place.startsWith('fd:');
}

/** The number of an inherited descriptor: `fd:3` and above, written in one way only. */
export function inheritedSocket(place: string): number | undefined {
  const found = /^fd:(0|[1-9]\d*)$/.exec(place)?.[1];
  return found !== undefined && Number(found) > 2 ? Number(found) : undefined;
}

function requireWayIn({ path, ...plan }: DiskPlan): void {
  requireInherited(plan.vhostUser, path);
  requireNew(plan.nbd, path);
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

/** Opens a disk and its servers, and adds it to `served`, or leaves nothing of it. */
async function start(
  plan: DiskPlan,
  served: Served[],
  remark: (name: string, text: string) => void,
): Promise<void> {
  const one: Served = { name: nameOf(plan), disk: await openPlanned(plan), servers: [] };
  const onReport = (text: string) => remark(one.name, text);
  try {
    const { iopsMax, iopsBurst, bpsMax, bpsBurst } = plan;
    one.disk.setLimits({ iopsMax, iopsBurst, bpsMax, bpsBurst });
    one.servers.push(...(await startVhostUser(onReport, one.disk, plan)));
    one.servers.push(...(await startNbd(onReport, one.disk, plan)));
    if (!one.disk.facts.readOnly) await startControl(onReport, one, openStore(plan).pins);
    served.push(one);
  } catch (error) {
    await end([one], undefined).catch(() => {}); // a disk that failed may fail to close as well
    throw error;
  }
}

/** Guests need their disk more than anybody needs to change its keys. */
async function startControl(
  onReport: (text: string) => void,
  one: Served,
  pins: Pins,
): Promise<void> {
  try {
    one.control = await serveControl(one.disk, { pins });
  } catch (error) {
    const why = fromSystem(error).toLine();
    onReport(`warning: nobody can change size and keys while the disk is served: ${why}`);
  }
}

async function openPlanned(plan: DiskPlan): Promise<Disk> {
  const { path, readOnly = false } = plan;
  using unlocked = await unlocking(path, plan);
  return await openDisk(path, { ...unlocked.options, ...engineOptions(plan), readOnly });
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
  const fd = inheritedSocket(place);
  const server = await disk.serveVhostUser({
    ...(fd === undefined ? { path: place } : { fd }),
    onReport,
  });
  const addresses = [`vhost-user-blk:${place}`];
  const stats = () => server.stats();
  const over = () => !server.serving;
  return [{ protocol: 'vhost-user-blk', addresses, stats, over, close: () => server.close() }];
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
  state: { served: readonly Served[]; sandbox: Sandbox; failures: readonly Failure[] },
  json?: boolean,
): void {
  const { served, sandbox, failures } = state;
  if (json) {
    const disks = served.map(({ name, disk, servers }) => ({
      name,
      ...disk.facts,
      servers: servers.map(({ protocol, addresses }) => ({ protocol, addresses })),
    }));
    terminal.json({ ready: true, pid: process.pid, sandbox, disks, failures });
  } else {
    const addresses = served.flatMap(({ servers }) => servers.flatMap((one) => one.addresses));
    const ready = addresses.map((address) => `ready: ${address}`);
    terminal.line([...ready, `sandbox: ${describe(sandbox)}`].join('\n'));
  }
  const status = `serving ${served.length} of ${served.length + failures.length} disks`;
  notifyServiceManager(`READY=1\nMAINPID=${process.pid}\nSTATUS=${status}`);
}

/** Until the signal, or until there is no way in to any disk. */
async function untilDone(signal: AbortSignal, served: readonly Served[]): Promise<void> {
  if (signal.aborted) return;
  const servers = served.flatMap((one) => one.servers);
  const canEnd = servers.every(({ over }) => over !== undefined);
  let look: NodeJS.Timeout | undefined;
  await new Promise<void>((resolve) => {
    signal.addEventListener('abort', () => resolve(), { once: true });
    if (!canEnd) return;
    look = setInterval(() => {
      if (servers.every((server) => server.over?.())) resolve();
    }, LOOK_MS);
  });
  clearInterval(look);
}
