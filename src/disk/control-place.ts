// Room disk/: where the process that serves a disk is found, and whether it is to be believed.
//
// Its control socket is in Linux's abstract namespace, under a name that is made of the disk's file: it
// depends on no directory and on nothing in anybody's environment, and ends with its process. There
// everybody on this host may listen and connect. So a name ends in random digits, that nobody can take
// in advance; a client tries all that there are for the disk; and each end asks the kernel whom it
// has before it, the user id of the other process.
import { randomBytes } from 'node:crypto';
import { readFile, stat } from 'node:fs/promises';
import { createServer, type Server, Socket } from 'node:net';
import { constants } from 'node:os';
import { setTimeout } from 'node:timers/promises';
import { fromSystem, PqblkError } from '../errors.js';
import { monotonicMs } from '../keys/monotonic.js';
import { native } from '../native.js';

const RANDOM_BYTES = 8;
/** For a server with many who wait for it. */
const PATIENCE_MS = 2000;
const POLL_MS = 20;
/** For a client that is refused to read why. */
const FAREWELL_MS = 1000;
/** In /proc/net/unix: somebody listens there. */
const LISTENING = 0x10000;

export interface Peer {
  readonly pid: number;
  readonly uid: number;
}

/** What the names of control sockets of the disk's file begin with; both ends derive it. */
async function prefixOf(path: string): Promise<{ prefix: string; owner: number }> {
  const found = await stat(path, { bigint: true }).catch((error: unknown) => {
    throw fromSystem(error, { path, operation: 'look at the disk' });
  });
  // A device may have any number of nodes.
  const file = found.isBlockDevice() ? `device-${found.rdev}` : `${found.dev}-${found.ino}`;
  return { prefix: `pqblk/control/${file}/`, owner: Number(found.uid) };
}

/** Who may ask for changes: the user of this process, and root. */
function mayAsk(peer: Peer | undefined): boolean {
  return peer !== undefined && (peer.uid === process.geteuid?.() || peer.uid === 0);
}

/** Who is told a new data key: the same, and by root also whoever the disk's file belongs to. */
function mayServe(peer: Peer | undefined, owner: number): boolean {
  return mayAsk(peer) || (process.geteuid?.() === 0 && peer?.uid === owner);
}

/**
 * Listens for changes of the disk at `path`. `onClient` gets connections of this user and root, at most
 * `clientsMax` at once; `onForeign` those of others, as many, and for a moment. Returns the socket's name,
 * as /proc/net/unix and ss(8) show it.
 */
export async function listenForControl(
  path: string,
  clientsMax: number,
  { onClient, onForeign }: Record<'onClient' | 'onForeign', (socket: Socket) => void>,
): Promise<{ server: Server; name: string }> {
  const { prefix } = await prefixOf(path);
  const name = prefix + randomBytes(RANDOM_BYTES).toString('hex');
  const fd = native().listenLocal(name);
  if (fd < 0) throw systemError(-fd, `@${name}`, 'listen for control');
  const count = { ours: 0, foreign: 0 };
  const server = createServer((socket) => {
    const whose = mayAsk(peerOf(socket)) ? 'ours' : 'foreign';
    if (count[whose] >= clientsMax) {
      socket.destroy();
      return;
    }
    count[whose] += 1;
    socket.once('close', () => {
      count[whose] -= 1;
    });
    if (whose === 'ours') {
      onClient(socket);
    } else {
      onForeign(socket);
      socket.resume();
      void setTimeout(FAREWELL_MS, undefined, { ref: false }).then(() => socket.destroy());
      socket.on('error', () => {}); // nobody's concern
    }
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error) => reject(fromSystem(error, { operation: 'listen for control' })));
    server.listen({ fd }, resolve);
  });
  return { server, name: `@${name}` };
}

export interface Search {
  /** The process that serves the disk; the caller's to destroy. */
  readonly socket: Socket | undefined;
  /** Who listens under the disk's name and is not to be believed. */
  readonly foreign: readonly Peer[];
  /** How the names begin that were looked for. */
  readonly prefix: string;
}

/** Looks for the process that serves the disk at `path`. Kinds of the file system. */
export async function findControl(path: string): Promise<Search> {
  const { prefix, owner } = await prefixOf(path);
  const foreign: Peer[] = [];
  const deadline = monotonicMs() + PATIENCE_MS;
  for (const name of await namesWith(prefix)) {
    const fd = await connect(name, deadline);
    if (fd === undefined) continue;
    const peer = native().peerOf(fd);
    const socket = new Socket({ fd });
    if (mayServe(peer, owner)) return { socket, foreign, prefix: `@${prefix}` };
    socket.destroy();
    if (peer) foreign.push(peer);
  }
  return { socket: undefined, foreign, prefix: `@${prefix}` };
}

/** A descriptor, or nothing where nobody listens any more. */
async function connect(name: string, deadline: number): Promise<number | undefined> {
  for (;;) {
    const fd = native().connectLocal(name);
    if (fd >= 0) return fd;
    if (-fd !== constants.errno.EAGAIN || monotonicMs() >= deadline) return undefined;
    await setTimeout(POLL_MS);
  }
}

/** Listening abstract sockets of this network namespace. */
async function namesWith(prefix: string): Promise<Set<string>> {
  const table = await readFile('/proc/net/unix', 'utf8').catch(() => '');
  const names = new Set<string>();
  for (const line of table.split('\n')) {
    const [, , , flags = '', , , , name = ''] = line.split(/\s+/);
    if (!name.startsWith(`@${prefix}`)) continue;
    if ((Number.parseInt(flags, 16) & LISTENING) !== 0) names.add(name.slice(1));
  }
  return names;
}

function peerOf(socket: Socket): Peer | undefined {
  const { fd } = (socket as Socket & { _handle?: { fd?: number } })._handle ?? {};
  return fd === undefined ? undefined : native().peerOf(fd);
}

function systemError(errno: number, path: string, operation: string): PqblkError {
  const [code = `errno ${errno}`] =
    Object.entries(constants.errno).find(([, value]) => value === errno) ?? [];
  return fromSystem(Object.assign(new Error(code), { code }), { path, operation });
}

/**
 * The same error; where the disk is locked and nobody was found to ask, with what was looked for and
 * what can be done.
 */
export async function explainLocked(error: unknown, path: string): Promise<unknown> {
  if (!(error instanceof PqblkError) || error.kind !== 'locked' || error.hint) return error;
  const hint = await whyNobody(path).catch(() => undefined);
  const { message, operation, cause } = error;
  return new PqblkError('locked', message, { path: error.path ?? path, operation, hint, cause });
}

async function whyNobody(path: string): Promise<string | undefined> {
  const { socket, foreign, prefix } = await findControl(path);
  socket?.destroy();
  if (socket) return 'a `pqblk serve` has it now: run the same command again';
  const looked = `no \`pqblk serve\` of this user listens for changes of it (looked for ${prefix}* in /proc/net/unix)`;
  const [peer] = foreign;
  if (peer) {
    const owner = `process ${peer.pid} of user ${peer.uid}`;
    return `${looked}, but ${owner} does: run the command as that user, \`runuser -u '#${peer.uid}' -- …\``;
  }
  return (
    `${looked}: one with --read-only never does, nor do other programs; one in a network namespace of its ` +
    'own (a container) is asked from inside, `nsenter --net --target PID …`'
  );
}
