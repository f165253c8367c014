// Room qmp/: plugs a vhost-user-blk disk into a running machine, and takes it out again.
//
// What was added is removed when a later step fails. The server has to listen before: QEMU waits for
// one that does not with the whole machine standing still, which is why the connection is seen to work
// before the device is made.
import { setTimeout as sleep } from 'node:timers/promises';
import { PqblkError } from '../errors.js';
import { cleaned, type QmpConnection, QmpError, type QmpEvent } from './connection.js';
import {
  chardevPlace,
  checkMemoryIsShared,
  devicePath,
  deviceType,
  freePorts,
  textProperty,
} from './machine.js';

const DRIVER = 'vhost-user-blk-pci';
const CONNECT_TIMEOUT_MS = 5_000;
const CONNECT_POLL_MS = 50;
const BUSY_HINT = 'a server that has a guest turns others away';
const DEVICE_ADD_TIMEOUT_MS = 30_000;
const UNDO_TIMEOUT_MS = 3_000;
/** A guest presses for five seconds before it lets go of a PCI Express device, and may be slow. */
export const UNPLUG_TIMEOUT_MS = 30_000;

export interface PlugOptions {
  /** Name of the device in QEMU: a letter, then letters, digits, `-`, `.`, `_`. */
  id: string;
  /** Unix socket of the vhost-user-blk server, as QEMU can reach it. The server listens already. */
  socket: string;
  /** Rings of the device; at most what the server has. */
  queues: number;
  /** Bus to plug into. Default: a free PCI Express port where there are such, else QEMU's choice. */
  bus?: string | undefined;
  /** Whether the server has a front-end; unknown where it is another process. */
  hasFrontEnd?: (() => boolean) | undefined;
  /** For QEMU to get through to the server. Default: 5 s. */
  connectTimeoutMs?: number | undefined;
  /** For QEMU to make the device. Default: 30 s. */
  deviceTimeoutMs?: number | undefined;
  signal?: AbortSignal | undefined;
}

export interface Plugged {
  readonly id: string;
  readonly chardev: string;
  readonly bus: string | undefined;
  /** The device was there already, with this very socket: its server has come back. */
  readonly resumed: boolean;
}

export interface UnplugOptions {
  /** For the guest to let go. Default: 30 s. */
  timeoutMs?: number | undefined;
  signal?: AbortSignal | undefined;
}

const chardevOf = (id: string) => `${id}-vhost`;

function failure(
  kind: 'exists' | 'hypervisor' | 'timed_out' | 'not_found' | 'canceled' | 'invalid_argument',
  qmp: QmpConnection,
  message: string,
  hint?: string,
): PqblkError {
  return new PqblkError(kind, message, { path: qmp.path, hint });
}

/** Kind `invalid_argument` for what QEMU would not take as an id. */
export function checkDeviceId(id: string): void {
  if (/^[A-Za-z][A-Za-z0-9._-]{0,63}$/.test(id)) return;
  const text = `“${cleaned(id)}” is no id for a device: a letter, then letters, digits, -, . or _`;
  throw new PqblkError('invalid_argument', text);
}

/**
 * Kinds `exists` (the id is taken), `unsupported` (memory that is not shared), `hypervisor` (QEMU says
 * no), `timed_out`, `canceled`. After a failure the machine is as it was.
 */
export async function plugDisk(qmp: QmpConnection, options: PlugOptions): Promise<Plugged> {
  const { id, socket, queues } = options;
  checkDeviceId(id);
  const chardev = chardevOf(id);
  if ((await deviceType(qmp, id)) !== undefined) return await resume(qmp, options);
  await checkMemoryIsShared(qmp);
  const ports = await freePorts(qmp);
  const bus = options.bus ?? ports.free[0];
  // What an attach that was killed between its steps has left behind is of no use to anybody.
  await removeChardev(qmp, chardev);
  const reconnect = qmp.atLeast(9, 2) ? { 'reconnect-ms': 1000 } : { reconnect: 1 };
  const addr = { type: 'unix', data: { path: socket } };
  const backend = { type: 'socket', data: { addr, server: false, ...reconnect } };
  await qmp.execute('chardev-add', { id: chardev, backend });
  try {
    await untilConnected(qmp, chardev, options);
    const place = bus === undefined ? {} : { bus };
    const device = { driver: DRIVER, id, chardev, 'num-queues': queues, ...place };
    const patience = options.deviceTimeoutMs ?? DEVICE_ADD_TIMEOUT_MS;
    await qmp.execute('device_add', device, patience);
  } catch (error) {
    await takeBack(qmp, id, chardev, error);
    throw explained(error, bus, ports.all.length);
  }
  return { id, chardev, bus, resumed: false };
}

/** A device whose server ended and is back: nothing to do but to see it connect. */
async function resume(qmp: QmpConnection, options: PlugOptions): Promise<Plugged> {
  const { id } = options;
  const chardev = (await textProperty(qmp, devicePath(id), 'chardev')) ?? chardevOf(id);
  const found = await chardevPlace(qmp, chardev);
  if (!found || !(await leadsHere(found, options))) {
    const hint = 'choose another with --id, or detach it';
    throw failure('exists', qmp, `the machine has a device “${id}” already`, hint);
  }
  await untilConnected(qmp, chardev, options);
  return { id, chardev, bus: undefined, resumed: true };
}

/**
 * `place` is QEMU's `[disconnected:]unix:PATH[,options]`, without the path while it is connected. It
 * may be so already: then the server has its front-end, or is about to accept it.
 */
async function leadsHere(
  { place, connected }: { place: string; connected: boolean },
  { socket, hasFrontEnd, connectTimeoutMs = CONNECT_TIMEOUT_MS }: PlugOptions,
): Promise<boolean> {
  const path = place.replace(/^disconnected:/, '').replace(/^unix:/, '');
  if (path === socket || path.startsWith(`${socket},`) || path.startsWith(`${socket} `))
    return true;
  if (!connected || path !== '' || hasFrontEnd === undefined) return false;
  const end = performance.now() + connectTimeoutMs;
  while (!hasFrontEnd() && performance.now() < end) await sleep(CONNECT_POLL_MS);
  return hasFrontEnd();
}

async function untilConnected(
  qmp: QmpConnection,
  chardev: string,
  { socket, signal, connectTimeoutMs = CONNECT_TIMEOUT_MS }: PlugOptions,
): Promise<void> {
  const end = performance.now() + connectTimeoutMs;
  while (!(await chardevPlace(qmp, chardev))?.connected) {
    if (signal?.aborted) throw failure('canceled', qmp, 'stopped on request');
    if (performance.now() > end) {
      const hint = `QEMU needs the right to use it, and the same view of the file system; ${BUSY_HINT}`;
      throw failure('timed_out', qmp, `QEMU does not get through to ${socket}`, hint);
    }
    await sleep(CONNECT_POLL_MS);
  }
}

/** After a failure: as far as QEMU still listens. What fails here hides behind what failed first. */
async function takeBack(qmp: QmpConnection, id: string, chardev: string, why: unknown) {
  const attempt = (command: string, what: string) =>
    qmp.execute(command, { id: what }, UNDO_TIMEOUT_MS).catch(() => {});
  // A device_add that QEMU has not answered may still come to pass.
  if (!(why instanceof QmpError)) await attempt('device_del', id);
  await attempt('chardev-remove', chardev);
}

/** Adds to what QEMU says what its user can do about it. */
function explained(error: unknown, bus: string | undefined, ports: number): unknown {
  if (!(error instanceof QmpError)) return error;
  // A server that has a guest was seen as connected before it hung up.
  if (/vhost_backend_init failed/.test(error.description)) {
    const { path, operation, message } = error;
    return new PqblkError('hypervisor', message, {
      path,
      operation,
      hint: BUSY_HINT,
      cause: error,
    });
  }
  if (bus !== undefined) return error;
  if (!/does not support hotplugging|no slot\/function available/i.test(error.description)) {
    return error;
  }
  const { path, operation, message } = error;
  const hint =
    ports === 0
      ? 'q35 takes new disks only in ports that it was started with: -device pcie-root-port,id=rp1,slot=1'
      : `all ${ports} pcie-root-ports are in use; start QEMU with more of them, or detach something`;
  return new PqblkError('hypervisor', message, { path, operation, hint, cause: error });
}

export async function isPlugged(qmp: QmpConnection, id: string): Promise<boolean> {
  return (await deviceType(qmp, id)) !== undefined;
}

/**
 * Asks the guest to let go of the disk, waits until it has, and removes the connection to the server.
 * Kinds `not_found` (no such device), `invalid_argument` (it is none of ours), `hypervisor` (QEMU or
 * the guest refuses), `timed_out` (the guest does not answer: it may let go later), `canceled`.
 */
export async function unplugDisk(
  qmp: QmpConnection,
  id: string,
  options: UnplugOptions = {},
): Promise<void> {
  const { timeoutMs = UNPLUG_TIMEOUT_MS, signal } = options;
  checkDeviceId(id);
  const type = await deviceType(qmp, id);
  if (type === undefined) {
    // A guest that let go after the last wait was over has left the connection behind.
    if (await removeChardev(qmp, chardevOf(id))) return;
    throw failure('not_found', qmp, `the machine has no device “${id}”`);
  }
  if (!type.startsWith('vhost-user-blk')) {
    throw failure('invalid_argument', qmp, `device “${id}” is a ${cleaned(type)}, not such a disk`);
  }
  const chardev = (await textProperty(qmp, devicePath(id), 'chardev')) ?? chardevOf(id);
  const wait = qmp.listen(({ event, data }: QmpEvent) => {
    return /^DEVICE_(DELETED|UNPLUG_GUEST_ERROR)$/.test(event) && data.device === id;
  });
  try {
    if (await requestUnplug(qmp, id)) {
      const { event } = await wait.event(timeoutMs, signal);
      if (event !== 'DEVICE_DELETED') {
        throw failure('hypervisor', qmp, `the guest refuses to give up “${id}”`);
      }
    }
  } catch (error) {
    throw tooLate(error, qmp, id);
  } finally {
    wait.stop();
  }
  await removeChardev(qmp, chardev);
}

async function removeChardev(qmp: QmpConnection, id: string): Promise<boolean> {
  if (!(await chardevPlace(qmp, id))) return false;
  await qmp.execute('chardev-remove', { id });
  return true;
}

/** False when there is nothing to wait for. */
async function requestUnplug(qmp: QmpConnection, id: string): Promise<boolean> {
  try {
    await qmp.execute('device_del', { id });
    return true;
  } catch (error) {
    if (!(error instanceof QmpError)) throw error;
    // Somebody asked before. The guest's answer is ours as well: it is still to come, or came now.
    if (/already in the process of unplug/.test(error.description)) return true;
    if (error.qmpClass === 'DeviceNotFound') return false;
    throw error;
  }
}

function tooLate(error: unknown, qmp: QmpConnection, id: string): unknown {
  if (!(error instanceof PqblkError) || error.kind !== 'timed_out') return error;
  const hint =
    'it was asked, and may still do it: is it running, with a driver for PCI hot-plug? ' +
    'Asking again waits longer';
  return failure('timed_out', qmp, `the guest did not give up “${id}”: ${error.message}`, hint);
}
