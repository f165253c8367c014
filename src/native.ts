// Room native: the one file that loads the addon, and the shapes of what is in it.
//
// It knows where the build puts pqblk.node and how native errors become PqblkErrors; what the
// functions mean is native/node/*.h and the room disk/. Nobody else imports the addon.
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { fromNative, type NativeErrorShape, PqblkError } from './errors.js';
import { packageRoot } from './package-root.js';

export type DiskFormat = 'raw' | 'qcow2' | 'sealed';

/** Secrets on their way to the engine, which wipes these very bytes once it has its own copy. */
export interface NativeKeys {
  integrity: Uint8Array;
  data: { epoch: number; key: Uint8Array }[];
  currentEpoch: number;
  /** See VolumeKeys in native/sealed/keys.h. */
  keyAreaState?: Uint8Array | undefined;
}

export interface NativeToken {
  cancel(): void;
}

export interface NativeChannelMemory {
  buffer: ArrayBuffer;
  /** Byte offsets into `buffer`; the layout is told in native/node/channel.h. */
  completions: number;
  submissions: number;
  arena: number;
  arenaBytes: number;
}

export interface NativeChannel {
  add(
    slot: number,
    type: number,
    flags: number,
    offset: number,
    data: Uint8Array | Uint8Array[] | number,
  ): void;
  /** False: the disk is closed and nothing was submitted. */
  kick(entries: number): boolean;
  error(slot: number): NativeErrorShape;
  /** Once only. */
  memory(): NativeChannelMemory;
}

/** See KeyAreaChange in native/sealed/backend_api.h. */
export interface NativeKeyAreaChange {
  keyArea?: Uint8Array;
  copy?: number;
  number?: number;
  expected?: Uint8Array;
}

export interface NativeDisk {
  close(): Promise<void>;
  resize(options: { size: number }): Promise<void>;
  /** From the beginning of the range on; the next call goes on where these end. */
  extents(options: { offset: number; length: number }): Promise<{ length: number; kind: string }[]>;
  facts(): Record<string, unknown>;
  stats(): Record<string, unknown>;
  setLimits(limits: object): void;
  limits(): Record<string, number>;
  channel(
    options: { queue: number; slots: number; arenaBytes: number },
    onCompletions: () => void,
  ): NativeChannel;
  bench(spec: object, token?: NativeToken): Promise<unknown>;
  changeKeyArea(change: NativeKeyAreaChange): Promise<void>;
  /** The key is copied before this returns; it is from the key area of that state. */
  beginEpoch(options: { epoch: number; key: Uint8Array; keyAreaState: Uint8Array }): Promise<void>;
  rekey(spec: object, token?: NativeToken): Promise<unknown>;
  requireWithinSize(): Promise<void>;
  finishEpoch(): Promise<void>;
  serveNbd(options: object): Promise<NativeNbdServer>;
  serveVhostUser(options: object): Promise<NativeVhostUserServer>;
}

/** A running server of a disk. */
export interface NativeServer {
  takeReports(): string[];
  /** Called when there are reports to take. */
  onReports?: () => void;
  close(): Promise<void>;
}

export interface NativeVhostUserServer extends NativeServer {
  serving(): boolean;
  stats(): Record<string, unknown>;
}

export interface NativeNbdServer extends NativeServer {
  /** TCP: the port that was chosen; 0 without. */
  readonly port: number;
  stats(): Record<string, number>;
}

/** Listens already; `serve` is called once and settles when the agent has ended. */
export interface NativeKeyAgent {
  serve(token?: NativeToken): Promise<void>;
}

export interface NativeAddon {
  version: string;
  JobToken: new (onProgress?: (done: number, total: number) => void) => NativeToken;
  openDisk(options: object, keys?: NativeKeys): Promise<NativeDisk>;
  createDisk(options: object, keys?: NativeKeys, token?: NativeToken): Promise<void>;
  diskInfo(options: { path: string; format?: DiskFormat }): Promise<Record<string, unknown>>;
  checkDisk(options: object, keys?: NativeKeys, token?: NativeToken): Promise<unknown>;
  replaceKeyArea(options: { path: string } & NativeKeyAreaChange): Promise<void>;
  handKeys(options: { fd: number; uuid: Uint8Array }, keys: NativeKeys): Promise<void>;
  keyAgent(
    options: { path: string; uuid: Uint8Array; count?: number; timeoutMs?: number },
    keys: NativeKeys,
  ): NativeKeyAgent;
  backUpHeader(options: {
    path: string;
  }): Promise<{ uuid: Uint8Array; header: Uint8Array; sessions: Uint8Array }>;
  lookAtHeader(
    options: { path: string; uuid: Uint8Array; header: Uint8Array; sessions: Uint8Array },
    keys: NativeKeys,
  ): Promise<{
    readable: boolean;
    lacksNewest: boolean;
    keyAreaCopies: readonly [
      { number: bigint; blob: Uint8Array },
      { number: bigint; blob: Uint8Array },
    ];
    keyAreaState: Uint8Array;
  }>;
  restoreHeader(
    options: {
      path: string;
      uuid: Uint8Array;
      header: Uint8Array;
      sessions: Uint8Array;
      withSessions: boolean;
    },
    keys: NativeKeys,
  ): Promise<{ header: boolean; sessions: number; sessionsLost: boolean; byLogAlone: boolean }>;
  /** Of the header that begins with `checked`; without, of any. */
  clearCorrupt(options: { path: string; checked?: Uint8Array }): Promise<void>;
  engineInfo(): Promise<unknown>;
  /** 0, or the errno of flock(2). */
  lockFile(descriptor: number): number;
  /** Listens on, or connects to, a name in the abstract namespace: a descriptor, or -errno. */
  listenLocal(name: string): number;
  connectLocal(name: string): number;
  /** Who is at the other end of a Unix socket. */
  peerOf(descriptor: number): { readonly pid: number; readonly uid: number } | undefined;
  freeSpace(options: { path: string }): Promise<number>;
  inSystemDirectory(options: { path: string }): boolean;
  /** As sd_notify(3); false where nobody asked for it. */
  notifyServiceManager(state: string): boolean;
  noNewPrivileges(): boolean;
  noCoreDumps(): boolean;
  noCoreFiles(): boolean;
  keysAreLocked(): boolean;
  /** Why it was not possible, or undefined. */
  refuseSystemCalls(): string | undefined;
}

const PLACES = ['build/Release/pqblk.node', 'build/release/pqblk.node'];

function load(): NativeAddon {
  const require = createRequire(import.meta.url);
  // Tests load builds with sanitizers this way.
  const chosen = process.env.PQBLK_ADDON;
  const file = chosen ?? PLACES.map((place) => join(packageRoot, place)).find(existsSync);
  if (file === undefined) {
    throw new PqblkError('not_found', 'the native engine is not built', {
      path: join(packageRoot, PLACES[0] as string),
      hint: 'run scripts/setup',
    });
  }
  try {
    return require(file) as NativeAddon;
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new PqblkError('unsupported', `the native engine does not load: ${why}`, {
      path: file,
      hint: 'run scripts/setup',
      cause,
    });
  }
}

let addon: NativeAddon | undefined;

/** The engine, loaded on first use. Kinds `not_found` (not built), `unsupported` (does not load). */
export function native(): NativeAddon {
  addon ??= load();
  return addon;
}

/** Turns what the addon rejected or threw into a PqblkError; misuse stays the TypeError it is. */
export function asPqblkError(error: unknown): unknown {
  const shape = error as NativeErrorShape & { errno?: number };
  if (error instanceof Error && typeof shape.kind === 'string' && !(error instanceof PqblkError)) {
    return fromNative(shape);
  }
  return error;
}

/** Awaits a call of the addon; errors come out as PqblkErrors. */
export async function calling<T>(call: () => Promise<T> | T): Promise<T> {
  try {
    return await call();
  } catch (error) {
    throw asPqblkError(error);
  }
}

export type Progress = (done: number, total: number) => void;

export interface LongWork {
  /** Called now and then; what is counted depends on the work. */
  onProgress?: Progress | undefined;
  /** Stops the work; the promise then rejects with kind `canceled`. */
  signal?: AbortSignal | undefined;
}

export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) {
    throw new PqblkError('canceled', 'stopped on request', { cause: signal.reason });
  }
}

/** A call of the addon that reports progress and can be stopped. */
export async function longCall<T>(
  work: LongWork,
  call: (token: NativeToken) => Promise<T>,
): Promise<T> {
  throwIfAborted(work.signal);
  const token = new (native().JobToken)(work.onProgress);
  const stop = () => token.cancel();
  work.signal?.addEventListener('abort', stop, { once: true });
  try {
    return await calling(() => call(token));
  } finally {
    work.signal?.removeEventListener('abort', stop);
  }
}
